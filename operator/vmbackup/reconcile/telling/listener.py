"""The listeners of a backup: a reporter for status and events, and metrics (telemetry/metrics.py satisfies them)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from vmbackup.api.status import Outcome, Phase, Report, RetryReason


class Reporter(Protocol):
    """Gets status and events. Neither method may block or raise."""

    def report(self, report: Report) -> None:
        """The present state; called often."""
        ...

    def event(self, reason: str, message: str, *, warning: bool = False) -> None:
        """An event, for people and the log."""
        ...


class BackupMetrics(Protocol):
    """Gets the figures of the backups of a node. No method may block or raise; times are in seconds since the epoch."""

    def told(self, domain: str, report: Report) -> None:
        """The present state of the backup of a domain."""
        ...

    def idle(self, domain: str) -> None:
        """No backup works on a domain any more."""
        ...

    def phase_left(self, phase: Phase, seconds: float) -> None:
        """A backup left a phase after this time."""
        ...

    def copied(self, count: int) -> None:
        """More bytes were copied."""
        ...

    def frozen(self, seconds: float) -> None:
        """The file systems of a guest were thawed after this time."""
        ...

    def suspended(self, domain: str, since: float, limit: float = 0.0) -> None:
        """We have suspended a guest since then, for at most `limit` seconds if its spec sets a limit."""
        ...

    def resumed(self, domain: str) -> None:
        """We no longer suspend a guest."""
        ...

    def overlay(self, domain: str, target: str, path: Path, since: float) -> None:
        """A disk has been on this overlay since then."""
        ...

    def overlay_gone(self, domain: str, target: str) -> None:
        """A disk is on its base again."""
        ...

    def stalled(self, domain: str, target: str) -> None:
        """The commit of a disk is past its deadline."""
        ...

    def converged(self, domain: str, target: str) -> None:
        """The commit of a disk has converged."""
        ...

    def committed(self, seconds: float, merged_bytes: int) -> None:
        """The overlay of a disk is merged."""
        ...

    def retried(self, reason: RetryReason) -> None:
        """A commit is, or may have to be, tried again."""
        ...

    def succeeded(self, domain: str, at: float, ended: float) -> None:
        """A backup of a domain succeeded: its snapshot was taken at `at`, and it ended at `ended`."""
        ...

    def failed(self, domain: str, at: float) -> None:
        """A backup of a domain failed, or was refused."""
        ...

    def finished(self, outcome: Outcome) -> None:
        """A backup ended."""
        ...

    def released(self, domain: str) -> None:
        """The VMBackup of a domain is gone."""
        ...


class NodeMetrics(BackupMetrics, Protocol):
    """Gets the figures of a node, too."""

    def domains(self, names: Iterable[str]) -> None:
        """The domains of this node, by name or UUID."""
        ...

    def orphans(self, count: int) -> None:
        """The number of overlays that no backup will merge."""
        ...

    def unreported(self, uid: str, since: float | None) -> None:
        """The status of a VMBackup has not reached the API server since then; None: it has."""
        ...
