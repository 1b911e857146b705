"""How `vmbackup run` ends: the exit code, and the last line or lines that it prints. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from vmbackup.api.status import DiskState, Outcome, Reason, Report
from vmbackup.commands.amounts import size
from vmbackup.protocol.record import Record, Snapshot

READY, FAILED_HOME, REFUSED, ON_OVERLAY, INTERRUPTED = 0, 1, 2, 3, 130  # exit codes (README.md)


@dataclass(frozen=True)
class Line:
    """A word, a sentence about it, and a style of rich."""

    word: str
    message: str
    style: str = ""


@dataclass(frozen=True)
class Verdict:
    """The end of a run."""

    exit_code: int
    lines: tuple[Line, ...]


def ended(last: Report) -> Verdict:
    """The backup is over; `last` is its last report."""
    if last.outcome is Outcome.SUCCEEDED:
        disks = [disk for disk in last.disks if disk.state is not DiskState.SKIPPED]
        copies = [Line(disk.target, f"{disk.format}, {size(disk.total_bytes)}, {disk.digest}") for disk in disks]
        return Verdict(READY, (Line("Ready", last.message, "bold green"), *copies))
    if last.outcome is Outcome.REFUSED:
        return _one(REFUSED, "Refused", f"{last.reason}: {last.message}", "bold red")
    if last.chain_clean:
        return _one(FAILED_HOME, "Failed", f"{last.reason}: {last.message}; every disk is home", "bold red")
    why = last.chain_message or last.message
    cure = f"the guest runs on its overlay and lost nothing: {why}; fix the cause, then run again with --retry"
    return _one(ON_OVERLAY, "Failed", f"{last.reason}: {cure}", "bold red")


def needs_you(last: Report) -> Verdict:
    """The backup was stopped because it cannot continue before somebody has acted."""
    cure = "start the guest, then run again" if last.reason == Reason.DOMAIN_OFF else "then run again"
    return _one(ON_OVERLAY, "Stopped", f"{last.reason}: {last.message}; {cure}", "bold red")


def interrupted(last: Report) -> Verdict:
    """The backup was stopped by a signal."""
    where = "the backup had not started" if last.chain_clean else "the guest runs on its overlay"
    return _one(INTERRUPTED, "Interrupted", f"{where}; run again to continue", "bold yellow")


def broken(why: str, record: Record | None, *, unknown: bool = False) -> tuple[int, str]:
    """The backup could not be run. `record`: the last known state of the chain; `unknown`: there is none to be had.

    Returns the exit code and a line for stderr.
    """
    begun = record is not None and record.snapshot is not Snapshot.NONE and (record.gave_up or not record.finished)
    held = record is not None and record.holds_guest
    if unknown or begun or held:
        return ON_OVERLAY, f"vmbackup run: {why}; the guest may be on its overlay: fix the cause, then run again"
    return REFUSED, f"vmbackup run: {why}; nothing was touched"


def _one(exit_code: int, word: str, message: str, style: str) -> Verdict:
    return Verdict(exit_code, (Line(word, message, style),))
