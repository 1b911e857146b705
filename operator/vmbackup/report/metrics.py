"""The Prometheus metrics of one agent (README.md)."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
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
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vmbackup.api.status import Outcome, Phase, RetryReason
from vmbackup.stores.files import free_bytes
from vmbackup.version import __version__

# 10 ms (a pivot of an idle guest) to 8 hours (a commit of terabytes), three steps to a decade and whole minutes later.
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 180.0, 600.0, 1800.0, 3600.0, 7200.0, 14400.0, 28800.0)
_FREEZE_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 300.0)
_ST_BLOCKS_UNIT = 512  # stat(2): st_blocks counts these, whatever the file system


class Metrics:
    """What happened, told by methods named for it; every counter starts at 0 for every label value.

    All methods may be called from any thread. All times are seconds, all points in time seconds since the epoch.
    """

    def __init__(self) -> None:
        disable_created_metrics()  # a second series for each counter, of no use to Prometheus
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        Info("vmbackup_build", "The version that is running.", registry=registry).info({"version": __version__})
        self._commit_seconds = Histogram(
            "vmbackup_commit_duration_seconds",
            "From the start of a commit to the guest on its base again, one disk and attempt.",
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
            "Overlays on this node that no VMBackup brings home at present.",
            registry=registry,
        )
        self._policies = Gauge(
            "vmbackup_policies",
            "VMBackupPolicies there are. With 0 every namespace may back up every domain of this node.",
            registry=registry,
        )
        self._policies.set(math.nan)  # until they were read: 0 says that all is allowed
        for phase in Phase:
            self._phase_seconds.labels(phase)
        for result in Outcome:
            self._backups.labels(result)
        for reason in RetryReason:
            self._retries.labels(reason)
        self._present = _Present()
        registry.register(self._present)

    def committed(self, seconds: float, merged_bytes: int) -> None:
        """One disk is home: a commit took this long and merged this much."""
        self._commit_seconds.observe(seconds)
        self._merged.inc(merged_bytes)

    def phase_left(self, phase: Phase, seconds: float) -> None:
        """A backup was in this phase for so long."""
        self._phase_seconds.labels(phase).observe(seconds)

    def frozen(self, seconds: float) -> None:
        """A guest's file systems were frozen for so long, and are thawed."""
        self._freeze_seconds.observe(seconds)

    def copied(self, count: int) -> None:
        """This many more bytes are copied."""
        self._copied.inc(count)

    def finished(self, outcome: Outcome) -> None:
        """A backup ended."""
        self._backups.labels(outcome).inc()

    def retried(self, reason: RetryReason) -> None:
        """A commit is tried again."""
        self._retries.labels(reason).inc()

    def overlay(self, domain: str, target: str, path: Path, since: float) -> None:
        """A disk runs on this overlay since then. Its size is looked up at each scrape."""
        self._present.overlay(domain, target, path, since)

    def overlay_gone(self, domain: str, target: str) -> None:
        """A disk is home, or its overlay is accounted for elsewhere."""
        self._present.overlay_gone(domain, target)

    def stalled(self, domain: str, target: str) -> None:
        """The commit of a disk is past its deadline."""
        self._present.stalled(domain, target)

    def converged(self, domain: str, target: str) -> None:
        """It is not any more."""
        self._present.converged(domain, target)

    def suspended(self, domain: str, since: float) -> None:
        """A guest is suspended by us since then."""
        self._present.suspended(domain, since)

    def resumed(self, domain: str) -> None:
        """A guest runs again, or is off: no longer suspended by us."""
        self._present.resumed(domain)

    def succeeded(self, domain: str, at: float) -> None:
        """A domain was backed up at that time; also called for old backups after a restart. The latest one counts."""
        self._present.succeeded(domain, at)

    def policies(self, count: int) -> None:
        """How many VMBackupPolicies there are."""
        self._policies.set(count)

    def orphans(self, count: int) -> None:
        """How many overlays on this node no VMBackup brings home at present."""
        self._orphans.set(count)


@dataclass(frozen=True)
class _Overlay:
    path: Path
    since: float

    def sizes(self) -> tuple[int, int] | None:
        """What it takes on disk, and what is free on its file system, in bytes; None where that cannot be seen."""
        try:
            return self.path.stat().st_blocks * _ST_BLOCKS_UNIT, free_bytes(self.path)
        except OSError:
            return None


class _Present(Collector):
    """What is so at this moment, by domain and disk: looked up at each scrape, and gone from it when it is no more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._overlays: dict[tuple[str, str], _Overlay] = {}
        self._stalled: set[tuple[str, str]] = set()
        self._suspended: dict[str, float] = {}
        self._last_success: dict[str, float] = {}

    def overlay(self, domain: str, target: str, path: Path, since: float) -> None:
        with self._lock:
            self._overlays[domain, target] = _Overlay(path, since)

    def overlay_gone(self, domain: str, target: str) -> None:
        with self._lock:
            self._overlays.pop((domain, target), None)
            self._stalled.discard((domain, target))

    def stalled(self, domain: str, target: str) -> None:
        with self._lock:
            self._stalled.add((domain, target))

    def converged(self, domain: str, target: str) -> None:
        with self._lock:
            self._stalled.discard((domain, target))

    def suspended(self, domain: str, since: float) -> None:
        with self._lock:
            self._suspended[domain] = since

    def resumed(self, domain: str) -> None:
        with self._lock:
            self._suspended.pop(domain, None)

    def succeeded(self, domain: str, at: float) -> None:
        with self._lock:
            self._last_success[domain] = max(at, self._last_success.get(domain, 0.0))

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            overlays = dict(self._overlays)
            stalled = set(self._stalled)
            suspended = dict(self._suspended)
            last_success = dict(self._last_success)
        now = time.time()
        size = GaugeMetricFamily(
            "vmbackup_overlay_bytes", "What the overlay of a disk takes on disk.", labels=["domain", "target"]
        )
        free = GaugeMetricFamily(
            "vmbackup_overlay_free_bytes",
            "What is free on the file system of the overlay of a disk.",
            labels=["domain", "target"],
        )
        age = GaugeMetricFamily(
            "vmbackup_overlay_age_seconds", "How long a disk has been on its overlay.", labels=["domain", "target"]
        )
        for labels, overlay in overlays.items():
            age.add_metric(labels, max(0.0, now - overlay.since))
            if (sizes := overlay.sizes()) is not None:
                size.add_metric(labels, sizes[0])
                free.add_metric(labels, sizes[1])
        late = GaugeMetricFamily(
            "vmbackup_commit_stalled",
            "1 while the commit of a disk is past commit.deadlineSeconds.",
            labels=["domain", "target"],
        )
        for labels in stalled:
            late.add_metric(labels, 1)
        pause = GaugeMetricFamily(
            "vmbackup_guest_suspended_seconds", "How long a guest has been suspended by us.", labels=["domain"]
        )
        for domain, since in suspended.items():
            pause.add_metric([domain], max(0.0, now - since))
        success = GaugeMetricFamily(
            "vmbackup_last_success_timestamp_seconds", "When a domain was last backed up.", labels=["domain"]
        )
        for domain, at in last_success.items():
            success.add_metric([domain], at)
        yield from (size, free, age, late, pause, success)
