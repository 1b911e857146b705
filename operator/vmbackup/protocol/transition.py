"""How each action changes the record. Pure; the driver writes the result to the journal, the model keeps it in its
state.

A mutating call changes the record twice: `begun` before it is sent, `answered` when it was carried out.

No other module changes a record, but the planner (reconcile/admission) and those that start one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import inf

from vmbackup.protocol.record import Call, Copy, Freeze, Guard, Image, Record, Settled, Snapshot, Throttle
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
            released = _unfrozen(record.with_every_disk(throttle=None), Freeze.NONE)
            return replace(released, guard=Guard.NONE, pause_until=0.0, io_error=False)
        case Do.RECORD_IO_ERROR:
            return replace(record, io_error=True)
        case Do.FAIL_BACKUP | Do.REFUSE:
            return replace(record, copy=Copy.FAILED, copy_error=action.reason, copy_reason=action.cause or "")
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
        case Do.THAW:  # before the snapshot: freeze again, unless freezing has failed
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
    seen: QEMU may have died after it. Other actions are not counted; they are decided again.
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
    """The record as a new run takes it up: a guest that an earlier run had frozen is thawed at once.

    A guest that it had suspended for a commit or a snapshot is resumed at once; the snapshot is planned again.
    """
    record = replace(record, pause_until=0.0, replan=record.snapshot is Snapshot.INTENDED)
    if record.freeze is not Freeze.FROZEN:
        return record
    return _unfrozen(record, Freeze.THAW_DUE)


def of_this_boot(record: Record, boot_id: str, now: float) -> Record:
    """The record as it is valid after a reboot, which has reset CLOCK_BOOTTIME and ended every QEMU.

    A guest that is paused now was paused by somebody else.

    A copy that goes on has its deadline counted from `now` (CLOCK_BOOTTIME, seconds); nothing waits for its next
    attempt any more.
    """
    if record.boot_id == boot_id:
        return record
    rebooted = recorded(record, Action(Do.FORGET_GUEST)).with_every_disk(commit_started=None, retry_at=0.0)
    snapshot_at = None if record.snapshot_at is None else now
    return replace(rebooted, boot_id=boot_id, snapshot_at=snapshot_at, suspended_at=None)


def _unfrozen(record: Record, freeze: Freeze) -> Record:
    """Not frozen any more: a snapshot that is still to be taken would not be quiesced."""
    taken = record.snapshot is Snapshot.DONE
    return replace(record, freeze=freeze, quiesced=record.quiesced if taken or not record.quiesced else None)


def without_switches(record: Record) -> Record:
    """The record in which no switch of images is due: the guest is resumed and thawed. Never for the journal."""
    copy = Copy.FAILED if record.copy is Copy.OPEN else record.copy
    return replace(record.with_every_disk(retry_at=inf), copy=copy)


def planned_again(record: Record) -> Record:
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


# -- edits that are journalled before a call


def with_call(record: Record, call: Call | None) -> Record:
    """The record while this call is unanswered (R4); None: no call is unanswered any more."""
    return replace(record, call=call)


def suspending(record: Record, now: float) -> Record:
    """The record as the guest is about to be suspended. `now`: CLOCK_BOOTTIME, seconds."""
    return replace(record, suspended_at=now)


def snapshotting(record: Record, *, at: float, now: float, nvram: str) -> Record:
    """The record as the snapshot is about to be taken: `at` in seconds since the epoch, `now` in CLOCK_BOOTTIME.

    `nvram`: where the UEFI variables of that moment are kept, if the guest has any.
    """
    return replace(record, snapshot_time=at, snapshot_at=now, nvram=nvram)


def attempted(record: Record, target: str, now: float) -> Record:
    """The record as an attempt to merge the overlay of this disk begins. `now`: CLOCK_BOOTTIME, seconds."""
    return record.with_disk(target, commit_started=now, attempts=record.disk(target).attempts + 1)


# -- the guest


def freeze_refused(record: Record) -> Record:
    """There is no guest agent: nothing is frozen, and no further attempt is made."""
    return replace(record, freeze=Freeze.TRIED)


def thaw_given_up(record: Record) -> Record:
    """The guest agent was asked too often: a human must thaw the guest."""
    return replace(record, freeze=Freeze.TRIED)


def pause_failed(record: Record) -> Record:
    """The guest could not be suspended for a commit to converge."""
    return replace(record, pause_until=0.0)


def throttled(record: Record, target: str, throttle: Throttle) -> Record:
    """How the guest's writes to this disk are slowed down now."""
    return record.with_disk(target, throttle=throttle)


# -- the copy


def copy_failed(record: Record, why: str, reason: str) -> Record:
    """There will be no good copy. `reason`: why, for a condition; empty where only the message says it."""
    return replace(record, copy=Copy.FAILED, copy_error=why, copy_reason=reason)


def copy_taken(record: Record, images: Mapping[str, tuple[str, int]]) -> Record:
    """The content of the snapshot is safe outside the chain: file in the store and bytes, by target."""
    for target, (file, size) in images.items():
        record = record.with_disk(target, file=file, total_bytes=size, copied_bytes=size)
    return replace(record, copy=Copy.TAKEN)


def copy_stored(record: Record, location: str, digests: Mapping[str, str]) -> Record:
    """The backup is published in the store. `digests` by target."""
    for target, digest in digests.items():
        record = record.with_disk(target, digest=digest)
    return replace(record, copy=Copy.STORED, location=location)


# -- the way home and the end


def overlay_removed(record: Record, target: str, *, seconds: float | None, merged_bytes: int) -> Record:
    """This disk is home. `seconds`: how long that took since its last attempt began; None: not known."""
    return record.with_disk(
        target,
        commit_running=False,
        commit_started=None,
        commit_seconds=seconds,
        merged="",
        merged_bytes=merged_bytes,
    )


def finished(record: Record, completed: float) -> Record:
    """The end. `completed`: seconds since the epoch."""
    return replace(recorded(record, Action(Do.FINISH)), completed=completed)


def refused(record: Record, why: str, reason: str, completed: float) -> Record:
    """The end of a backup that has not begun. `completed`: seconds since the epoch."""
    failed_copy = replace(copy_failed(record, why, reason), freeze=Freeze.NONE)
    return replace(failed_copy, finished=True, completed=completed)


def brought_home(record: Record) -> Record:
    """R7: a later backup of the domain has merged what this one had left."""
    home = replace(record, gave_up=False, quarantined="", finished=True, orphan=False)
    if home.copy in (Copy.OPEN, Copy.TAKEN):
        return replace(home, copy=Copy.FAILED, copy_error="the backup ended before its copy was complete")
    return home


# -- a new run


def taken_up_again(record: Record, retry: str) -> Record:
    """The record after a request to try again: all attempts to bring the chain home are open once more.

    A copy that failed stays failed: that needs a new VMBackup.
    """
    fresh = record.with_every_disk(failures=0, retry_at=0.0)
    ended = record.finished and not record.gave_up
    return replace(fresh, handled_retry=retry, gave_up=False, finished=ended)


def asked_again(record: Record, retry: str) -> Record:
    """The record of a backup that is over, for a status that answers this request to try again."""
    return replace(record, handled_retry=retry)


def of_domain(record: Record, name: str, uuid: str) -> Record:
    """The record with the domain that was found. An earlier run's plan is dropped: the domain may have changed."""
    disks = () if record.snapshot is Snapshot.NONE else record.disks
    return replace(record, disks=disks, domain=name, domain_uuid=uuid)


def with_commits_of(record: Record, others: Iterable[Record]) -> Record:
    """The record, knowing which of its overlays another backup has adopted and begun to commit (PROTOCOL R7).

    Such a base is not the point in time any more: a copy of it would be of no moment at all.
    """
    committing = {disk.overlay for other in others for disk in other.disks if disk.commit_begun}
    for disk in record.disks:
        if disk.overlay in committing:
            record = record.with_disk(disk.target, commit_begun=True)
    return record


def with_call_of(record: Record, others: Iterable[Record], boot: str) -> Record:
    """The record, waiting for the last call that another backup of this domain has left unanswered (PROTOCOL R4)."""
    calls = [other.call for other in (record, *others) if other.call is not None and other.call.boot_id == boot]
    return with_call(record, max(calls, key=lambda call: call.boottime, default=None))
