"""Announces the progress of a backup in status, events and metrics. It remembers only what it has announced."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from vmbackup.api.status import Outcome, Phase, Reason, Report, RetryReason
from vmbackup.hypervisor.guest import BlockJob
from vmbackup.protocol.record import Freeze, Guard, Image, Record, Snapshot
from vmbackup.protocol.terms import Action, Do, Mirror, Observation
from vmbackup.reconcile.state.clock import boottime
from vmbackup.reconcile.telling.listener import BackupMetrics, Reporter
from vmbackup.reconcile.telling.summary import NOT_CONVERGED, Progress, overlays_left, summarize

_EVENTS: dict[Do, tuple[str, str, bool]] = {
    Do.ADOPT: ("AdoptingOverlay", "an earlier backup left its overlay, which is merged first", False),
    Do.LIFT_QUARANTINE: ("QuarantineLifted", "the problem is gone", False),
    Do.RECORD_ORPHAN: (
        "OrphanRecorded",
        "deleted before its overlay could be merged; the node will merge it later",
        True,
    ),
    Do.CLEAR_ORPHAN: ("OrphanHome", "the overlay that was left has been merged", False),
}

# Appended to the message while a guest stays on its overlay until somebody acts.
_LEFT = {
    Reason.QUARANTINED: "",
    Reason.WAITING_FOR_OTHERS: "; waiting for another job on this domain to finish",
    Reason.DOMAIN_OFF: "; start the guest, and the commit continues",
    Reason.DOMAIN_MIGRATED: "; the agent on the destination host will commit it",
    Reason.COMMIT_LIMIT_REACHED: "; spec.commit.backoffLimit is reached: the guest stays on its overlay; "
    "fix the cause, then set the annotation vmbackup.dev/retry",
}


class CopyProgress(Protocol):
    """How far the copies of one backup are."""

    @property
    def copied(self) -> Mapping[str, int]:
        """Bytes copied so far, by target."""
        ...

    @property
    def last_progress(self) -> float | None:
        """When a byte was copied last, in seconds since the epoch; None: never."""
        ...

    @property
    def stuck(self) -> bool:
        """A previous attempt, which was given up, is still blocked in the store."""
        ...


class Announcer:
    """Announces one backup. `ended`: an earlier run has announced its end, and it is not tried again."""

    def __init__(
        self, reporter: Reporter, metrics: BackupMetrics, copying: CopyProgress, *, ended: bool = False
    ) -> None:
        self._reporter = reporter
        self._metrics = metrics
        self._copying = copying
        self._merged: dict[str, int] = {}
        self._phase: Phase | None = None
        self._phase_since = time.time()
        self._last_progress: float | None = None
        self._ended = ended
        self._frozen_since: float | None = None
        self._overdue: set[tuple[str, int]] = set()  # target and number of the attempt
        self._paused_since: float | None = None
        self._unproven = False
        self._left = ""

    def event(self, reason: str, message: str, *, warning: bool = False) -> None:
        """One event."""
        self._reporter.event(reason, message, warning=warning)

    def tell(self, record: Record, seen: Observation | None, action: Action | None) -> Report:
        """Report the present state, with an event for each change of phase, and metrics at the end."""
        progress = Progress(self._copying.copied, self._merged, self._progressed(), stuck=self._copying.stuck)
        report = summarize(record, seen, action, progress)
        self._reporter.report(report)
        self._metrics.told(record.domain, report)
        if self._phase is None:
            tell_suspended(self._metrics, record)  # by an earlier run
        if report.phase is not self._phase:
            self._enter(report)
        left = report.reason if report.chain_clean is False and report.reason in _LEFT else ""
        if left and left != self._left:
            self.event(left, report.chain_message + _LEFT[Reason(left)], warning=True)
        self._left = left
        if seen is not None:
            self._tell_overlays(record, seen)
            self._tell_overdue(record, seen)
        if record.finished and report.outcome is not None and not self._ended:
            self._ended = True
            self._metrics.finished(report.outcome)
            ended = record.completed or time.time()  # as status says, which a new agent reads
            if report.outcome is Outcome.SUCCEEDED:
                self._metrics.succeeded(record.domain, record.snapshot_time or ended, ended)
            elif report.outcome in (Outcome.FAILED, Outcome.REFUSED):
                self._metrics.failed(record.domain, ended)
        return report

    def run_ended(self, record: Record) -> None:
        """This run is over."""
        self._metrics.idle(record.domain)

    def recorded(self, record: Record, action: Action) -> None:
        """A decision that changed only the record."""
        if action.do in (Do.CLEAR_GUARD, Do.FORGET_GUEST):
            self._metrics.resumed(record.domain)
        if action.do is Do.ADOPT and (record.guard is Guard.OURS or record.freeze is Freeze.THAW_DUE):
            self.event(
                "GuestHeld",
                "the guest was left suspended or frozen by a backup whose journal is lost; resuming it",
                warning=True,
            )
        elif action.do is Do.INTEND_PAUSE:
            disk = f"disk {action.target}: the guest is suspended until its commit converges, for at most "
            bound = "spec.commit.stallPauseSeconds (spec.commit.stallPolicy: Pause)"
            self.event("GuestSuspended", disk + bound, warning=True)
        elif action.do in _EVENTS:
            reason, message, warning = _EVENTS[action.do]
            self.event(reason, f"{message}: {', '.join(overlays_left(record, None))}", warning=warning)

    def adopted_home(self, record: Record) -> None:
        """The overlay that an earlier backup had left is merged; this backup starts over."""
        if record.disks:
            overlays = ", ".join(overlays_left(record, None))
            self.event("AdoptedOverlayHome", f"the overlay that an earlier backup left has been merged: {overlays}")

    def suspending(self, record: Record) -> None:
        """The guest may be suspended from now on."""
        tell_suspended(self._metrics, record)

    def resumed(self, record: Record) -> None:
        """The guest runs again."""
        self._metrics.resumed(record.domain)

    def freezing(self) -> None:
        """The guest's file systems are about to be frozen."""
        self._frozen_since = time.time()

    def thawed(self) -> None:
        """The guest's file systems are thawed."""
        if self._frozen_since is not None:
            self._metrics.frozen(time.time() - self._frozen_since)
            self._frozen_since = None

    def suspended(self, record: Record) -> None:
        """The guest is suspended."""
        if record.pause_until:
            self._paused_since = boottime()

    def backup_failed(self, record: Record) -> None:
        """There will be no good copy."""
        self.event(record.copy_reason or "CopyFailed", record.copy_error, warning=True)

    def commit_failed(self, target: str, why: str, reason: RetryReason, pause: float) -> None:
        """An attempt to bring a disk home failed."""
        self.event("CommitRetrying", f"disk {target}: {why}; observing again in {pause:.0f} s", warning=True)
        self.retried(reason)

    def retried(self, reason: RetryReason) -> None:
        """A commit is, or may have to be, tried again."""
        self._metrics.retried(reason)

    def commit_progress(self, jobs: Mapping[str, BlockJob]) -> None:
        """How far the commits are."""
        for target, job in jobs.items():
            if job.current > self._merged.get(target, 0):
                self._last_progress = time.time()
            self._merged[target] = job.current

    def throttled(self, target: str, limit: int) -> None:
        """The guest's writes to a disk are slowed down, or more so."""
        self.event("GuestThrottled", f"disk {target}: the guest may write {limit} bytes/s until its commit "
                   "converges (spec.commit.stallPolicy: Throttle)", warning=True)  # fmt: skip

    def unthrottled(self, target: str) -> None:
        """The guest's writes to a disk are no longer slowed down."""
        self.event("GuestUnthrottled", f"disk {target}: the guest may write as fast as before")

    def limits_yielded(self, target: str) -> None:
        """Somebody else has changed the limits that we had set."""
        self.event("IoTuneChanged", f"disk {target}: somebody changed its iotune limits while the backup was "
                   "throttling it; keeping the new limits", warning=True)  # fmt: skip

    def not_throttled(self, target: str, why: str) -> None:
        """The guest's writes cannot be slowed down."""
        self.event("ThrottleFailed", f"disk {target}: its writes cannot be slowed down: {why}", warning=True)

    def not_unthrottled(self, target: str, original: Mapping[str, int], why: str) -> None:
        """The limits that we had set are still there."""
        tune = {"total_bytes_sec": 0, "read_bytes_sec": 0, "write_bytes_sec": 0, **original}
        options = " ".join(
            f"--{name.replace('_', '-')} {value}" for name, value in tune.items() if value or "write" in name
        )
        cure = f"virsh blkdeviotune DOMAIN {target} --live {options}"
        self.event("UnthrottleFailed", f"disk {target}: its writes are still slowed down; restore its limits by hand "
                   f"({cure}): {why}", warning=True)  # fmt: skip

    def merged(self, target: str, overlay: Path) -> int:
        """Bytes that the commit of a disk has merged: by its job, or the disk space of its overlay."""
        if target in self._merged:
            return self._merged[target]
        try:
            return overlay.stat().st_blocks * 512
        except OSError:
            return 0

    def disk_home(self, record: Record, target: str) -> None:
        """A disk is on its base again, and its overlay is removed."""
        disk = record.disk(target)
        if disk.commit_seconds is not None:
            self._metrics.committed(disk.commit_seconds, disk.merged_bytes)
        self._metrics.overlay_gone(record.domain, target)

    def config_unproven(self, why: str) -> None:
        """The durability of the persistent XML cannot be shown here. Said once."""
        if not self._unproven:
            self._unproven = True
            self.event("ConfigNotProven", why, warning=True)

    def forget(self, record: Record) -> None:
        """The VMBackup is gone."""
        self._metrics.released(record.domain)
        if not record.orphan:
            for disk in record.disks:
                self._metrics.overlay_gone(record.domain, disk.target)

    def _progressed(self) -> float | None:
        times = [moment for moment in (self._last_progress, self._copying.last_progress) if moment is not None]
        return max(times, default=None)

    def _enter(self, report: Report) -> None:
        now = time.time()
        if self._phase is not None:
            self._metrics.phase_left(self._phase, now - self._phase_since)
        self._phase, self._phase_since, self._last_progress = report.phase, now, now
        self.event(report.phase, report.message, warning=report.phase is Phase.FAILED)

    def pause_over(self) -> None:
        """The guest runs again, perhaps after a pause that let a commit converge."""
        if self._paused_since is not None:
            seconds, self._paused_since = boottime() - self._paused_since, None
            self.event("GuestResumed", f"the guest runs again; it was suspended for {seconds:.1f} s to let a commit "
                       "converge; it is not suspended again in this attempt")  # fmt: skip

    def _tell_overdue(self, record: Record, seen: Observation) -> None:
        for disk in seen.disks:
            attempt = (disk.target, record.disk(disk.target).attempts)
            if disk.overdue:
                self._metrics.stalled(record.domain, disk.target)
                if attempt not in self._overdue:
                    self.event("CommitDeadlineExceeded", f"disk {disk.target}: {NOT_CONVERGED}", warning=True)
                self._overdue.add(attempt)
            elif attempt in self._overdue:
                self._metrics.converged(record.domain, disk.target)
                self._overdue.discard(attempt)
                if disk.mirror is Mirror.READY or disk.live is Image.BASE:
                    self.event("CommitConverged", f"disk {disk.target}: the commit has converged")

    def _tell_overlays(self, record: Record, seen: Observation) -> None:
        if record.snapshot is Snapshot.NONE:
            return
        for disk in seen.disks:
            here = disk.persistent if disk.live is None else disk.live
            if disk.overlay is None and here is not Image.OVERLAY:
                self._metrics.overlay_gone(record.domain, disk.target)
            else:
                since = record.snapshot_time or record.started or time.time()
                self._metrics.overlay(record.domain, disk.target, Path(record.disk(disk.target).overlay), since)


def tell_suspended(metrics: BackupMetrics, record: Record) -> None:
    """Whether a guest is suspended by us, and since when."""
    if record.guard is Guard.OURS:
        since = record.suspended_at or boottime()
        limit = max(0.0, record.pause_until - since)
        metrics.suspended(record.domain, time.time() - boottime() + since, limit)
    else:
        metrics.resumed(record.domain)
