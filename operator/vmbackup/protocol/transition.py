"""How each action changes the record. Pure; the driver writes the result to the journal, the model keeps it in its
state.

A mutating call changes the record twice: `begun` before it is sent, `answered` when it was carried out.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf

from vmbackup.protocol.record import Copy, Freeze, Guard, Image, Record, Settled, Snapshot
from vmbackup.protocol.terms import Action, Do


def recorded(record: Record, action: Action) -> Record:  # noqa: C901 — a table, one line a row
    """The record after an action that changes nothing but the record. Raises ValueError for any other."""
    target = action.target
    match action.do:
        case Do.ADOPT:
            return replace(record, snapshot=Snapshot.ADOPTED)
        case Do.INTEND_SNAPSHOT:
            fresh = record.with_every_disk(commit_begun=False, pivot_intended=False, merged="")
            return replace(fresh, snapshot=Snapshot.INTENDED, guard=action.guard)
        case Do.RECORD_SNAPSHOT:
            return replace(record.with_every_disk(settled=None), snapshot=Snapshot.DONE, replan=False)
        case Do.CLEAR_GUARD:
            return replace(record, guard=Guard.NONE, pause_until=0.0)
        case Do.FORGET_GUEST:
            anew = _unfrozen(record.with_every_disk(throttle=None), Freeze.NONE)
            return replace(anew, guard=Guard.NONE, pause_until=0.0, io_error=False)
        case Do.RECORD_IO_ERROR:
            return replace(record, io_error=True)
        case Do.FAIL_BACKUP | Do.REFUSE:
            return replace(record, copy=Copy.FAILED, copy_error=action.reason)
        case Do.BEGIN_COMMIT:
            return record.with_disk(target, commit_begun=True)
        case Do.INTEND_PAUSE:
            marked = record.with_every_disk(pause_used=True)
            return replace(marked, guard=Guard.OURS, pause_until=action.until or 0.0)
        case Do.INTEND_PIVOT:
            intended = record.with_disk(target, pivot_intended=True, settled=None)
            return replace(intended, guard=action.guard)
        case Do.CLEAR_PIVOT:
            return record.with_disk(target, pivot_intended=False)
        case Do.QUARANTINE:
            return replace(record, quarantined=action.reason)
        case Do.LIFT_QUARANTINE:
            return replace(record, quarantined="")
        case Do.GIVE_UP:
            return replace(record, gave_up=True)
        case Do.RECORD_ORPHAN:
            return replace(record, orphan=True)
        case Do.CLEAR_ORPHAN:
            return replace(record, orphan=False)
        case Do.FINISH:
            home = record.with_every_disk(commit_begun=False, pivot_intended=False, merged="")
            return replace(record if record.gave_up else home, finished=True)
        case _:
            raise ValueError(f"{action.do} does more than change the record")


def begun(record: Record, action: Action) -> Record:
    """The record that must be durable before the call is sent."""
    match action.do:
        case Do.FREEZE:
            return replace(record, freeze=Freeze.FROZEN)
        case Do.COMMIT:
            return record.with_disk(action.target, commit_running=True, pause_used=False)
        case _:
            return record


def answered(record: Record, action: Action) -> Record:
    """The record after the call was carried out."""
    match action.do:
        case Do.FREEZE:
            return replace(record, quiesced=True)
        case Do.THAW:  # before the snapshot: freeze anew, unless freezing has failed
            tried = record.quiesced is False or record.snapshot is Snapshot.DONE
            return _unfrozen(record, Freeze.TRIED if tried else Freeze.NONE)
        case Do.RESUME:
            return replace(record, io_error=False, pause_until=0.0)
        case Do.THROTTLE:
            throttle = record.disk(action.target).throttle
            return record.with_disk(action.target, throttle=throttle and replace(throttle, pending=False))
        case Do.UNTHROTTLE:
            return record.with_disk(action.target, throttle=None)
        case Do.REDEFINE | Do.SYNC_CONFIG:
            for target, image in action.images:
                settled = Settled(image, durable=action.do is Do.SYNC_CONFIG)
                record = record.with_disk(target, settled=settled)
            return record
        case _:
            return record


def failed(record: Record, action: Action, error: str, *, retry_at: float) -> Record:
    """The record after the call failed for certain, the job vanished, or SYNC_CONFIG found P naming another image.

    `retry_at` (CLOCK_BOOTTIME, seconds) is when a commit or pivot may be tried again. A pivot stays intended until L is
    seen: QEMU may have died after it. What is not counted here is simply decided again.
    """
    match action.do:
        case Do.SNAPSHOT:
            return recorded(record, Action(Do.FAIL_BACKUP, reason=error))
        case Do.COMMIT | Do.PIVOT | Do.RECORD_FAILURE | Do.MERGE_OFFLINE:
            return record.with_disk(
                action.target,
                commit_running=False,
                failures=record.disk(action.target).failures + 1,
                retry_at=retry_at,
                last_error=error,
            )
        case Do.FREEZE:  # it may have been carried out all the same: thaw, and go without
            return replace(record, freeze=Freeze.THAW_DUE, quiesced=False)
        case Do.SYNC_CONFIG:
            for target, _ in action.images:
                record = record.with_disk(target, settled=None)
            return record
        case _:
            return record


def compared(record: Record, action: Action, stamp: str) -> Record:
    """The record after COMPARE: where P names O, the pivot is over or a quarantine declared; where it names B, too.

    `stamp`: that of the overlay if it holds nothing that base lacks, else empty.
    """
    target = action.target
    if not stamp:
        told = recorded(record, Action(Do.QUARANTINE, reason=action.reason))
        return told if action.images == ((target, Image.OVERLAY),) else told.with_disk(target, pivot_intended=False)
    if action.images == ((target, Image.OVERLAY),):
        return recorded(record, Action(Do.CLEAR_PIVOT, target))
    return merged_offline(record, target, stamp)


def merged_offline(record: Record, target: str, stamp: str) -> Record:
    """The record, durable before P names base: the overlay with this stamp holds nothing that base lacks."""
    return record.with_disk(target, merged=stamp, settled=None)


def resumed_after_crash(record: Record) -> Record:
    """The record as a new run takes it up: what an earlier one had frozen is thawed at once.

    So is a guest resumed that it had suspended for a commit, or for a snapshot, which is planned anew.
    """
    record = replace(record, pause_until=0.0, replan=record.snapshot is Snapshot.INTENDED)
    if record.freeze is not Freeze.FROZEN:
        return record
    return _unfrozen(record, Freeze.THAW_DUE)


def of_this_boot(record: Record, boot_id: str, now: float) -> Record:
    """The record as it can be read after a reboot, with which CLOCK_BOOTTIME has begun anew, and every QEMU.

    Whoever has suspended a guest since, it was not us.

    A copy that goes on has its deadline counted from `now` (CLOCK_BOOTTIME, seconds); nothing waits for its next
    attempt any more.
    """
    if record.boot_id == boot_id:
        return record
    anew = recorded(record, Action(Do.FORGET_GUEST)).with_every_disk(commit_started=None, retry_at=0.0)
    snapshot_at = None if record.snapshot_at is None else now
    return replace(anew, boot_id=boot_id, snapshot_at=snapshot_at, suspended_at=None)


def _unfrozen(record: Record, freeze: Freeze) -> Record:
    """Not frozen any more: a snapshot that is still to be taken would not be quiesced."""
    taken = record.snapshot is Snapshot.DONE
    return replace(record, freeze=freeze, quiesced=record.quiesced if taken or not record.quiesced else None)


def without_switches(record: Record) -> Record:
    """The record in which no switch of images is due: the guest is resumed and thawed. Never for the journal."""
    copy = Copy.FAILED if record.copy is Copy.OPEN else record.copy
    return replace(record.with_every_disk(retry_at=inf), copy=copy)


def planned_anew(record: Record) -> Record:
    """R7: the marks of an adopted overlay do not survive into this backup's own snapshot, nor an earlier intent."""
    fresh = record.with_every_disk(
        commit_begun=False,
        commit_running=False,
        pivot_intended=False,
        merged="",
        settled=None,
        failures=0,
        retry_at=0.0,
    )
    return replace(fresh, snapshot=Snapshot.NONE, replan=False, gave_up=False)
