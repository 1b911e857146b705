"""The Prometheus metrics of one agent (docs/monitoring.md)."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
)

from vmbackup.api.status import Outcome, Phase, Reason, Report, RetryReason
from vmbackup.imaging.sizes import free_bytes
from vmbackup.telemetry.gauges import StateGauge, StateGauges
from vmbackup.version import __version__

# 10 ms (a pivot of an idle guest) to 8 hours (a commit of terabytes), three steps to a decade and whole minutes later.
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 180.0, 600.0, 1800.0, 3600.0, 7200.0, 14400.0, 28800.0)
_FREEZE_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 300.0)
_ST_BLOCKS_UNIT = 512  # stat(2): st_blocks counts these, whatever the file system

_DOMAIN, _DISK = ("domain",), ("domain", "target")
_STATE = StateGauge(
    "vmbackup_backup_state",
    "1 while a backup of a domain runs, with its phase and the reason of its condition Ready.",
    ("domain", "phase", "reason"),
    keys=1,
)
_PROGRESSED = StateGauge(
    "vmbackup_backup_last_progress_timestamp_seconds",
    "When the running backup of a domain last made progress.",
    _DOMAIN,
    1,
)
_COPIED = StateGauge(
    "vmbackup_backup_copied_bytes", "Bytes that the running backup of a domain has copied.", _DOMAIN, 1
)
_TOTAL = StateGauge("vmbackup_backup_total_bytes", "Bytes that the running backup of a domain has to copy.", _DOMAIN, 1)
_MERGED = StateGauge(
    "vmbackup_backup_merged_bytes", "Bytes that the running backup of a domain has merged into its bases.", _DOMAIN, 1
)
_QUARANTINED = StateGauge("vmbackup_quarantined", "1 while the chain of a domain is quarantined.", _DOMAIN, 1)
_OVERLAY = StateGauge("vmbackup_overlay_bytes", "Disk space that the overlay of a disk occupies.", _DISK, 2)
_OVERLAY_FREE = StateGauge(
    "vmbackup_overlay_free_bytes", "Free space on the file system of the overlay of a disk.", _DISK, 2
)
_OVERLAY_AGE = StateGauge("vmbackup_overlay_age_seconds", "How long a disk has been on its overlay.", _DISK, 2)
_STALLED = StateGauge(
    "vmbackup_commit_stalled", "1 while the commit of a disk is past commit.deadlineSeconds.", _DISK, 2
)
_SUSPENDED = StateGauge("vmbackup_guest_suspended_seconds", "How long vmbackup has kept a guest suspended.", _DOMAIN, 1)
_SUSPENDED_LIMIT = StateGauge(
    "vmbackup_guest_suspended_limit_seconds",
    "How long the backup may keep the guest suspended: commit.stallPauseSeconds during a Pause, else 0.",
    _DOMAIN,
    1,
)
_SUCCESS = StateGauge(
    "vmbackup_last_success_timestamp_seconds", "Time of the snapshot of the last good backup of a domain.", _DOMAIN, 1
)
_FAILURE = StateGauge(
    "vmbackup_last_failure_timestamp_seconds",
    "When the last backup of a domain failed; absent if it succeeded.",
    _DOMAIN,
    1,
)
_RUNNING = (_STATE, _PROGRESSED, _COPIED, _TOTAL, _MERGED)
_GAUGES = (
    *_RUNNING, _QUARANTINED, _OVERLAY, _OVERLAY_FREE, _OVERLAY_AGE, _STALLED, _SUSPENDED, _SUSPENDED_LIMIT, _SUCCESS,
    _FAILURE,
)  # fmt: skip


class Metrics:
    """One method for each thing that happens; every counter starts at 0 for every label value.

    All methods may be called from any thread. All times are seconds, all points in time seconds since the epoch.
    """

    def __init__(self) -> None:
        disable_created_metrics()  # a second series for each counter, useless to Prometheus
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        Info("vmbackup_build", "The version that is running.", registry=registry).info({"version": __version__})
        self._commit_seconds = Histogram(
            "vmbackup_commit_duration_seconds",
            "Time from the start of a commit until the guest uses its base again; for each disk and attempt.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._phase_seconds = Histogram(
            "vmbackup_phase_duration_seconds", "Time spent in a phase.", ["phase"], buckets=_SECONDS, registry=registry
        )
        self._freeze_seconds = Histogram(
            "vmbackup_freeze_duration_seconds",
            "How long the file systems of a guest were frozen.",
            buckets=_FREEZE_SECONDS,
            registry=registry,
        )
        self._merged = Counter(
            "vmbackup_commit_merged_bytes", "Bytes merged from overlays into bases.", registry=registry
        )
        self._copied = Counter("vmbackup_copied_bytes", "Bytes copied into stores.", registry=registry)
        self._backups = Counter("vmbackup_backups", "Backups that ended, by result.", ["result"], registry=registry)
        self._retries = Counter(
            "vmbackup_commit_retries", "Commits tried again, by reason.", ["reason"], registry=registry
        )
        self._orphans = Gauge(
            "vmbackup_orphan_overlays",
            "Overlays on this node that no VMBackup will merge.",
            registry=registry,
        )
        self._policies = Gauge(
            "vmbackup_policies",
            "Number of VMBackupPolicies. With 0 every namespace may back up every domain of this node.",
            registry=registry,
        )
        self._policies.set(math.nan)  # until they were read: 0 says that all is allowed
        for phase in Phase:
            self._phase_seconds.labels(phase)
        for result in Outcome:
            self._backups.labels(result)
        for reason in RetryReason:
            self._retries.labels(reason)
        Gauge(
            "vmbackup_report_lag_seconds",
            "How long the oldest unwritten status has been waiting for the API server.",
            registry=registry,
        ).set_function(self._lag)
        self._gauges = StateGauges(_GAUGES)
        registry.register(self._gauges)
        self._lock = threading.Lock()
        self._succeeded: dict[str, float] = {}  # time of the snapshot of the last good backup, by domain
        self._ended: dict[str, float] = {}  # when that backup ended
        self._failed: dict[str, float] = {}
        self._unreported: dict[str, float] = {}
        self._here: frozenset[str] | None = None  # None: not known yet, so it counts as here

    def committed(self, seconds: float, merged_bytes: int) -> None:
        """A disk came home: the duration of its commit, and the bytes that were merged."""
        self._commit_seconds.observe(seconds)
        self._merged.inc(merged_bytes)

    def phase_left(self, phase: Phase, seconds: float) -> None:
        """A backup left a phase after this time."""
        self._phase_seconds.labels(phase).observe(seconds)

    def frozen(self, seconds: float) -> None:
        """The file systems of a guest were thawed after this time."""
        self._freeze_seconds.observe(seconds)

    def copied(self, count: int) -> None:
        """More bytes were copied."""
        self._copied.inc(count)

    def finished(self, outcome: Outcome) -> None:
        """A backup ended."""
        self._backups.labels(outcome).inc()

    def retried(self, reason: RetryReason) -> None:
        """A commit is tried again."""
        self._retries.labels(reason).inc()

    def told(self, domain: str, report: Report) -> None:
        """The backup that works on a domain is like this now."""
        with self._lock:
            self._here = None if self._here is None else self._here | {domain}
        if report.reason == Reason.QUARANTINED:
            self._gauges.put(_QUARANTINED, (domain,))
        else:
            self._gauges.drop(_QUARANTINED, domain)
        if report.outcome is not None:
            self.idle(domain)
            return
        progressed = report.last_progress_time or report.start_time or time.time()
        self._gauges.put(_STATE, (domain, str(report.phase), str(report.reason)))
        self._gauges.put(_PROGRESSED, (domain,), progressed)
        self._gauges.put(_COPIED, (domain,), sum(disk.copied_bytes for disk in report.disks))
        self._gauges.put(_TOTAL, (domain,), sum(disk.total_bytes for disk in report.disks))
        self._gauges.put(_MERGED, (domain,), sum(disk.merged_bytes for disk in report.disks))

    def idle(self, domain: str) -> None:
        """No backup works on a domain any more."""
        for gauge in _RUNNING:
            self._gauges.drop(gauge, domain)

    def released(self, domain: str) -> None:
        """The backup that had quarantined a domain is gone."""
        self._gauges.drop(_QUARANTINED, domain)

    def overlay(self, domain: str, target: str, path: Path, since: float) -> None:
        """A disk has been on this overlay since then. Its size is read at each scrape."""
        disk = (domain, target)
        self._gauges.put(_OVERLAY, disk, partial(_taken, path))
        self._gauges.put(_OVERLAY_FREE, disk, partial(_free, path))
        self._gauges.put(_OVERLAY_AGE, disk, partial(_age, since))

    def overlay_gone(self, domain: str, target: str) -> None:
        """A disk is home, or its overlay is accounted for elsewhere."""
        for gauge in (_OVERLAY, _OVERLAY_FREE, _OVERLAY_AGE, _STALLED):
            self._gauges.drop(gauge, domain, target)

    def stalled(self, domain: str, target: str) -> None:
        """The commit of a disk is past its deadline."""
        self._gauges.put(_STALLED, (domain, target))

    def converged(self, domain: str, target: str) -> None:
        """The commit of a disk has converged."""
        self._gauges.drop(_STALLED, domain, target)

    def suspended(self, domain: str, since: float, limit: float = 0.0) -> None:
        """We have suspended a guest since then. `limit`: how long the backup's spec allows that, in seconds."""
        self._gauges.put(_SUSPENDED, (domain,), partial(_age, since))
        self._gauges.put(_SUSPENDED_LIMIT, (domain,), limit)

    def resumed(self, domain: str) -> None:
        """A guest runs again or is off, so we no longer suspend it."""
        self._gauges.drop(_SUSPENDED, domain)
        self._gauges.drop(_SUSPENDED_LIMIT, domain)

    def succeeded(self, domain: str, at: float, ended: float) -> None:
        """A backup of a domain succeeded: snapshot taken at `at`, ended at `ended`.

        Also called for old backups after a restart, in any order: the latest one counts.
        """
        with self._lock:
            self._succeeded[domain] = max(at, self._succeeded.get(domain, 0.0))
            self._ended[domain] = max(ended, self._ended.get(domain, 0.0))
            self._tell_last(domain)

    def failed(self, domain: str, at: float) -> None:
        """A backup of a domain failed, or was refused; else as `succeeded`."""
        with self._lock:
            self._failed[domain] = max(at, self._failed.get(domain, 0.0))
            self._tell_last(domain)

    def domains(self, names: Iterable[str]) -> None:
        """The domains of this node, by name or UUID. The last backups of other domains are not shown."""
        with self._lock:
            self._here = frozenset(names)
            for domain in {*self._succeeded, *self._failed}:
                self._tell_last(domain)

    def unreported(self, uid: str, since: float | None) -> None:
        """The status of a VMBackup has been waiting to be written since then; None: it was written."""
        with self._lock:
            if since is None:
                self._unreported.pop(uid, None)
            else:
                self._unreported[uid] = since

    def policies(self, count: int) -> None:
        """The number of VMBackupPolicies."""
        self._policies.set(count)

    def orphans(self, count: int) -> None:
        """The number of overlays on this node that no VMBackup will merge."""
        self._orphans.set(count)

    def _tell_last(self, domain: str) -> None:
        here = self._here is None or domain in self._here
        if here and domain in self._succeeded:
            self._gauges.put(_SUCCESS, (domain,), self._succeeded[domain])
        else:
            self._gauges.drop(_SUCCESS, domain)
        failed = self._failed.get(domain)
        if here and failed is not None and failed > self._ended.get(domain, 0.0):
            self._gauges.put(_FAILURE, (domain,), failed)
        else:
            self._gauges.drop(_FAILURE, domain)

    def _lag(self) -> float:
        with self._lock:
            since = min(self._unreported.values(), default=None)
        return 0.0 if since is None else _age(since)


def _taken(path: Path) -> float | None:
    """Disk space that a file occupies, in bytes; None if it cannot be read."""
    try:
        return path.stat().st_blocks * _ST_BLOCKS_UNIT
    except OSError:
        return None


def _free(path: Path) -> float | None:
    """Free space on the file system of a file, in bytes; None if it cannot be read."""
    try:
        return free_bytes(path)
    except OSError:
        return None


def _age(since: float) -> float:
    return max(0.0, time.time() - since)
