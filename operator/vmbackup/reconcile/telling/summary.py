"""Sums up a backup for its status: from its record and the last decision to a Report (docs/concepts.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from vmbackup.api.names import RETRY_ANNOTATION
from vmbackup.api.status import DiskReport, DiskState, Outcome, Phase, Reason, Report
from vmbackup.protocol import advice
from vmbackup.protocol.record import Copy, DiskRecord, Image, Record, Snapshot
from vmbackup.protocol.terms import Action, DiskSeen, Do, Observation, Power

NOT_CONVERGED = "the commit has not converged within spec.commit.deadlineSeconds"


@dataclass(frozen=True)
class Progress:
    """Progress that only the running driver knows: bytes copied and merged so far, by target."""

    copied: Mapping[str, int]
    merged: Mapping[str, int]
    last_progress: float | None = None
    stuck: bool = False  # an earlier copy attempt is blocked in the store, and no new one begins until it ends


def summarize(record: Record, seen: Observation | None, action: Action | None, progress: Progress) -> Report:
    """The report of this moment."""
    home = chain_home(record, seen)
    phase = phase_of(record, home=home)
    outcome = outcome_of(record, home=home)
    quarantining = action is not None and action.do is Do.QUARANTINE  # it says what to do; the guest is not to start
    parked = not home and seen is not None and seen.power is Power.OFF and not quarantining
    reason, message = _headline(record, seen, action, phase, outcome, parked=parked)
    if progress.stuck and reason in (Reason.COPYING, Reason.SHIPPING):
        message = "a previous copy attempt is still blocked in the store; copying resumes when it ends"
    complete = {Copy.STORED: True, Copy.FAILED: False}.get(record.copy)
    chain_reason, chain_message = _chain(record, seen, home=home)
    return Report(
        phase=phase,
        reason=reason,
        message=message,
        outcome=outcome,
        backup_complete=complete,
        backup_reason="" if complete is not False else copy_failure(record),
        backup_message=record.copy_error,
        chain_clean=home,
        chain_reason=chain_reason,
        chain_message=chain_message,
        domain_uuid=record.domain_uuid,
        snapshot_time=record.snapshot_time,
        quiesced=record.quiesced,
        start_time=record.started,
        completion_time=record.completed if outcome else None,
        last_progress_time=progress.last_progress,
        location=record.location,
        last_handled_retry=record.handled_retry,
        disks=tuple(
            [_disk(record, disk, seen, progress) for disk in record.disks]
            + [DiskReport(target, DiskState.SKIPPED, message=why) for target, why in record.skipped]
        ),
    )


def chain_home(record: Record, seen: Observation | None) -> bool:
    """Every disk is on its base, and no overlay is left. True before the backup has begun, False in quarantine."""
    if record.quarantined:
        return False
    if seen is None:
        return record.snapshot is Snapshot.NONE or (record.finished and not record.gave_up)
    return all(_is_home(disk) for disk in seen.disks)


def phase_of(record: Record, *, home: bool) -> Phase:
    """The phase, which is only for humans."""
    if record.quarantined or (record.finished and (record.gave_up or record.copy is not Copy.STORED)):
        return Phase.FAILED
    if record.snapshot in (Snapshot.NONE, Snapshot.ADOPTED):
        return Phase.FAILED if record.copy is Copy.FAILED else Phase.PENDING
    if record.snapshot is Snapshot.INTENDED:
        return Phase.SNAPSHOTTING
    if record.copy is Copy.OPEN:
        return Phase.COPYING
    return Phase.COMMITTING if not home or record.copy is Copy.FAILED else Phase.PIVOTED


def outcome_of(record: Record, *, home: bool) -> Outcome | None:
    """How it ended; None while it runs. A quarantine is an end as far as people are concerned, until it is lifted."""
    if record.quarantined:
        return Outcome.FAILED
    if not record.finished:
        return None
    if record.copy_reason == Reason.DELETED:
        return Outcome.DELETED
    if record.copy_reason == Reason.CANCELLED and not record.gave_up:
        return Outcome.CANCELLED
    if record.copy is Copy.STORED and home and not record.gave_up:
        return Outcome.SUCCEEDED
    begun = record.snapshot is Snapshot.DONE or record.gave_up
    return Outcome.FAILED if begun or not record.copy_reason else Outcome.REFUSED


def copy_failure(record: Record) -> str:
    """Why there is no good copy, as a reason."""
    return record.copy_reason or Reason.COPY_FAILED


def _headline(
    record: Record,
    seen: Observation | None,
    action: Action | None,
    phase: Phase,
    outcome: Outcome | None,
    *,
    parked: bool,
) -> tuple[str, str]:
    if record.quarantined:
        return Reason.QUARANTINED, record.quarantined
    if outcome is Outcome.SUCCEEDED:
        return Reason.SUCCEEDED, f"stored at {record.location}, and every disk is home"
    if outcome is not None and record.gave_up:
        again = f"fix that, then set the annotation {RETRY_ANNOTATION} to a new value"
        return Reason.COMMIT_LIMIT_REACHED, f"{_last_error(record) or 'the commit failed too often'}; {again}"
    if outcome is not None:
        return copy_failure(record), record.copy_error
    if action is not None and action.do is Do.WAIT and seen is not None and seen.call_in_flight:
        return Reason.WAITING_FOR_CALLS, action.reason
    if action is not None and action.others:
        return Reason.WAITING_FOR_OTHERS, action.reason
    if parked and record.snapshot in (Snapshot.DONE, Snapshot.ADOPTED):
        return _while_off(record, seen, action)
    return _running(record, seen, phase)


def _while_off(record: Record, seen: Observation | None, action: Action | None) -> tuple[str, str]:
    if seen is not None and seen.migrated:
        return Reason.DOMAIN_MIGRATED, advice.migrated(record)
    held = seen is not None and any(disk.overlay is not None and disk.overlay.held for disk in seen.disks)
    if action is not None and action.do is Do.COMPARE:
        overlay = record.disk(action.target).overlay
        compared = f"the guest went off during a pivot; its overlay ({overlay}) is being compared with its base"
        return Reason.COMMITTING, f"{compared}; it cannot start until that is done"
    if action is not None and (held or action.do in (Do.BEGIN_COMMIT, Do.MERGE_OFFLINE)):
        return (
            Reason.COMMITTING,
            "the guest is off; its overlay is being merged; it cannot start until that is done",
        )
    if action is not None and action.do is Do.WAIT and not action.parked:  # commit.offline
        return Reason.COMMIT_RETRYING, _last_error(record) or action.reason
    if action is not None and seen is not None and any(disk.overlay and disk.overlay.locked for disk in seen.disks):
        return Reason.DOMAIN_OFF, action.reason
    left = ", ".join(overlays_left(record, seen))
    return Reason.DOMAIN_OFF, f"the guest is off on its overlay ({left}); the commit continues when it starts"


def _running(record: Record, seen: Observation | None, phase: Phase) -> tuple[str, str]:
    match phase:
        case Phase.PENDING if record.snapshot is Snapshot.ADOPTED:
            overlays = ", ".join(overlays_left(record, None))
            return Reason.ADOPTING_OVERLAY, f"an earlier backup left its overlay, which is merged first: {overlays}"
        case Phase.PENDING:
            return Reason.PENDING, "checking whether the domain can be backed up"
        case Phase.SNAPSHOTTING:
            return Reason.SNAPSHOTTING, "the guest is being switched to its overlay"
        case Phase.COPYING:
            return Reason.COPYING, "the frozen base is being copied"
        case Phase.PIVOTED if record.copy is Copy.STORED:
            return Reason.FINISHED, "every disk is home, and the copy is stored"
        case Phase.PIVOTED:
            return Reason.SHIPPING, "every disk is home; the copy is being completed in the store"
        case _ if overdue := _overdue(record, seen):
            return Reason.COMMIT_NOT_CONVERGING, overdue
        case _ if record.copy is Copy.FAILED:
            return Reason.BRINGING_CHAIN_HOME, record.copy_error
        case _ if any(disk.failures for disk in record.disks):
            return Reason.COMMIT_RETRYING, _last_error(record)
        case _:
            return Reason.COMMITTING, "the overlay is being merged into its base"


def overlays_left(record: Record, seen: Observation | None) -> list[str]:
    """Each disk that is away from its base or has left something behind, with its overlay, in words."""
    away = (
        [disk.target for disk in seen.disks if not _is_home(disk)] if seen else [disk.target for disk in record.disks]
    )
    return [_named(record.disk(target)) for target in away]


def _named(disk: DiskRecord) -> str:
    return f"disk {disk.target}: {disk.overlay}" + (f" of {disk.owner}" if disk.owner else "")


def _is_home(disk: DiskSeen) -> bool:
    here = disk.persistent if disk.live is None else disk.live
    return here in (Image.BASE, None) and disk.overlay is None


def _overdue(record: Record, seen: Observation | None) -> str:
    """The commits that do not converge, and the remedy."""
    late = [record.disk(disk.target) for disk in seen.disks if disk.overdue] if seen else []
    return "; ".join(f"disk {disk.target}: {NOT_CONVERGED}: {_remedy(record, disk)}" for disk in late)


def _remedy(record: Record, disk: DiskRecord) -> str:
    if record.pause_until:
        return "the guest is suspended until the commit converges, for at most spec.commit.stallPauseSeconds"
    if disk.throttle is not None and disk.throttle.limits and not disk.throttle.yielded:
        return f"the guest may write {disk.throttle.limits[-1]} bytes/s to it until the commit converges"
    cure = "raise spec.commit.bandwidth, reduce the guest's writes, or change spec.commit.stallPolicy"
    return f"the commit continues; {cure}"


def _chain(record: Record, seen: Observation | None, *, home: bool) -> tuple[str, str]:
    if home:
        return "", ""
    left = overlays_left(record, seen)
    where = f"not home: {', '.join(left)}" if left else ""
    if record.quarantined:
        return Reason.QUARANTINED, "; ".join(filter(None, (record.quarantined, where)))
    if record.gave_up or any(disk.failures for disk in record.disks):
        return Reason.COMMIT_FAILED, "; ".join(filter(None, (_last_error(record), where)))
    return Reason.OVERLAY_ACTIVE, where


def _last_error(record: Record) -> str:
    return "; ".join(f"disk {disk.target}: {disk.last_error}" for disk in record.disks if disk.last_error)


def _disk(record: Record, disk: DiskRecord, seen: Observation | None, progress: Progress) -> DiskReport:
    report = DiskReport(
        target=disk.target,
        state=_state(record, disk, seen),
        format=disk.format,
        base=disk.base,
        overlay=disk.overlay,
        copied_bytes=max(disk.copied_bytes, progress.copied.get(disk.target, 0)),
        total_bytes=disk.total_bytes,
        digest=disk.digest,
        merged_bytes=max(disk.merged_bytes, progress.merged.get(disk.target, 0)),
        commit_seconds=disk.commit_seconds,
        attempts=disk.attempts,
        last_error=disk.last_error,
    )
    return replace(report, overlay="") if report.state is DiskState.HOME else report


def _state(record: Record, disk: DiskRecord, seen: Observation | None) -> DiskState:
    if record.quarantined:
        return DiskState.QUARANTINED
    if record.snapshot in (Snapshot.NONE, Snapshot.INTENDED):
        return DiskState.PENDING
    found = {each.target: each for each in seen.disks}.get(disk.target) if seen else None
    if found is not None and found.overlay is None and found.live is not Image.OVERLAY:
        return DiskState.HOME
    if found is not None and found.live is None:
        return DiskState.ON_OVERLAY
    if record.gave_up:
        return DiskState.ON_OVERLAY
    if record.copy is Copy.OPEN:
        return DiskState.COPIED if disk.file else DiskState.COPYING
    return DiskState.COMMITTING
