"""Renders a report as the status that `kubectl`, Flux (kstatus) and Argo CD read. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from vmbackup.api.resource import condition
from vmbackup.api.status import DiskReport, DiskState, Outcome, Reason, Report

# Ready first: kstatus takes Reconciling and Stalled in list order, and people read from the top.
CONDITION_TYPES = ("Ready", "BackupComplete", "ChainClean", "Reconciling", "Stalled")

_LONGEST_TEXT = 2000  # characters; the output of a tool may be long, and every watcher receives each write
_WORD = {True: "True", False: "False", None: "Unknown"}
_STANDARD_MESSAGE: dict[tuple[str, bool | None], str] = {
    ("BackupComplete", True): "The copy of every disk is stored and verified.",
    ("BackupComplete", False): "There is no complete copy of the snapshot.",
    ("BackupComplete", None): "The copy is not finished yet.",
    ("ChainClean", True): "Every disk runs on its own image; no overlay is left.",
    ("ChainClean", False): "The guest runs on an overlay.",
    ("ChainClean", None): "The chain of the disks has not been checked yet.",
}


def render(report: Report, *, generation: int, previous: Mapping[str, Any], now: float) -> dict[str, Any]:
    """The whole status of a VMBackup.

    `generation` is that of the spec being acted on; `previous` is the status as last known, whose lastTransitionTime
    is kept for every condition that has not changed; `now` is seconds since the epoch.
    """
    status: dict[str, Any] = {
        "observedGeneration": generation,
        "phase": str(report.phase),
        "message": _shortened(report.message),
        "conditions": _conditions(report, generation, previous, now),
    }
    optional = {
        "domainUUID": report.domain_uuid,
        "quiesced": report.quiesced,
        "snapshotTime": timestamp(report.snapshot_time),
        "startTime": timestamp(report.start_time),
        "completionTime": timestamp(report.completion_time),
        "lastProgressTime": timestamp(report.last_progress_time),
        "lastHandledRetry": report.last_handled_retry,
        "location": report.location,
    }
    status |= {name: value for name, value in optional.items() if value not in (None, "")}
    if report.disks:
        status["progress"] = _progress(report)
        status["disks"] = [_disk(disk) for disk in report.disks]
    return status


def timestamp(seconds: float | None) -> str | None:
    """Seconds since the epoch as RFC 3339 in UTC, whole seconds, as metav1.Time writes it."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[: _LONGEST_TEXT - 1]}…"


def _conditions(report: Report, generation: int, previous: Mapping[str, Any], now: float) -> list[dict[str, Any]]:
    running = report.outcome is None
    stalled = report.outcome in (Outcome.FAILED, Outcome.REFUSED, Outcome.CANCELLED)
    reason = Reason.SUCCEEDED if report.outcome is Outcome.SUCCEEDED else report.reason
    idle = Reason.PROGRESSING if running else Reason.FINISHED
    rows: dict[str, tuple[bool | None, str, str]] = {
        "Ready": (report.ready, reason, report.message),
        "BackupComplete": (report.backup_complete, *_backup_words(report)),
        "ChainClean": (report.chain_clean, *_chain_words(report)),
        "Reconciling": (running, reason if running else Reason.FINISHED, report.message if running else ""),
        "Stalled": (stalled, reason if stalled else idle, report.message if stalled else ""),
    }
    unseen = previous.get("observedGeneration", -1) < 0  # the CRD's default, which is of 1970
    rendered: list[dict[str, Any]] = []
    for kind in CONDITION_TYPES:
        value, why, message = rows[kind]
        before = condition({} if unseen else previous, kind)
        kept = before.get("lastTransitionTime") if before.get("status") == _WORD[value] else None
        rendered.append({
            "type": kind,
            "status": _WORD[value],
            "reason": str(why),
            "message": _shortened(message),
            "observedGeneration": generation,
            "lastTransitionTime": kept or timestamp(now),
        })  # fmt: skip
    return rendered


def _backup_words(report: Report) -> tuple[str, str]:
    """Reason and message of BackupComplete."""
    usual = {True: Reason.STORED, False: report.reason, None: Reason.PENDING}[report.backup_complete]
    standard = _STANDARD_MESSAGE["BackupComplete", report.backup_complete]
    return report.backup_reason or usual, report.backup_message or standard


def _chain_words(report: Report) -> tuple[str, str]:
    """Reason and message of ChainClean."""
    usual = {True: Reason.CHAIN_HOME, False: Reason.OVERLAY_ACTIVE, None: Reason.PENDING}[report.chain_clean]
    standard = _STANDARD_MESSAGE["ChainClean", report.chain_clean]
    return report.chain_reason or usual, report.chain_message or standard


def _progress(report: Report) -> dict[str, Any]:
    copied = sum(disk.copied_bytes for disk in report.disks)
    total = sum(disk.total_bytes for disk in report.disks)
    percent = _percentage(report, copied, total)
    return {
        "percent": percent,
        "summary": f"{percent}%",
        "copiedBytes": copied,
        "totalBytes": total,
        "mergedBytes": sum(disk.merged_bytes for disk in report.disks),
    }


def _percentage(report: Report, copied: int, total: int) -> int:
    """Progress. It is 100 only at the end: the copy verified and stored, and every disk home."""
    if report.outcome is Outcome.SUCCEEDED:
        return 100
    if total <= 0:
        return 99 if report.backup_complete else 0
    return min(99, copied * 100 // total)


def _disk(disk: DiskReport) -> dict[str, Any]:
    entry: dict[str, Any] = {"target": disk.target, "state": str(disk.state)}
    words = {
        "format": disk.format,
        "base": disk.base,
        "overlay": disk.overlay,
        "message": _shortened(disk.message),
        "digest": disk.digest,
        "commitSeconds": None if disk.commit_seconds is None else round(disk.commit_seconds, 3),
        "lastError": _shortened(disk.last_error),
    }
    if disk.state is not DiskState.SKIPPED:
        entry |= {
            "copiedBytes": disk.copied_bytes,
            "totalBytes": disk.total_bytes,
            "mergedBytes": disk.merged_bytes,
            "attempts": disk.attempts,
        }
    return entry | {name: value for name, value in words.items() if value not in (None, "")}


def is_significant(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether the change must be sent at once (phase, condition, retry), because it is more than progress."""
    return _verdict(before) != _verdict(after)


def _verdict(status: Mapping[str, Any]) -> tuple[object, ...]:
    conditions: Iterable[Mapping[str, Any]] = status.get("conditions") or ()
    judged = tuple((known.get("type"), known.get("status"), known.get("reason")) for known in conditions)
    return status.get("phase"), status.get("observedGeneration"), status.get("lastHandledRetry"), judged
