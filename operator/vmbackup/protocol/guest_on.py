"""The rules while the guest is on. The first that has an action decides: their order is part of the protocol."""

from __future__ import annotations

from dataclasses import replace

from vmbackup.api.status import Reason
from vmbackup.protocol import advice
from vmbackup.protocol.record import Copy, Freeze, Guard, Image, Snapshot
from vmbackup.protocol.situation import (
    OURS,
    Case,
    Rule,
    Situation,
    consistent,
    end,
    fail_unwanted,
    finish,
    let_go,
    quarantine,
    settle,
    settle_if_possible,
    settle_live,
    snapshot_wanted,
    spare_astray_base,
    spare_changed_base,
    thaw_guest,
    unthrottle,
)
from vmbackup.protocol.terms import Action, Do, Mirror, Power


def wait_for_migration(s: Situation) -> Action | None:
    """Libvirt refuses a migration during our block job, and we switch nothing during a migration."""
    if not s.seen.migrating:
        return None
    if s.suspended_by_us:
        return settle_if_possible(s) or Action(Do.RESUME)
    return thaw_guest(s) or Action(Do.WAIT, reason=advice.migrating(s.record), others=True)


def follow_the_truth(s: Situation) -> Action | None:
    """R3: T≠L, libvirt lost a save, and its block API is of no use until a cold restart."""
    astray = [disk for disk in s.disks if disk.seen.truth is not disk.seen.live]
    if not astray:
        return None
    if not s.seen.config_failing and (action := settle(s, ((disk, disk.seen.truth) for disk in s.disks))):
        return action
    if s.suspended_by_us:
        return Action(Do.RESUME)
    return quarantine(s, _astray(astray[0]))


def _astray(disk: Case) -> str:
    files = {Image.BASE: disk.record.base, Image.OVERLAY: disk.record.overlay}
    written = files.get(disk.seen.truth or Image.OTHER)
    return advice.written_elsewhere(disk.record, written) if written else advice.written_to_foreign_image(disk.record)


def lift_quarantine(s: Situation) -> Action | None:
    """L=P=T again, and nothing left behind: the guest was restarted, or a human has helped."""
    if s.record.quarantined and all(consistent(disk) for disk in s.disks):
        return Action(Do.LIFT_QUARANTINE)
    return None


def leave_others_alone(s: Situation) -> Action | None:
    """The guest uses an image that is neither base nor O: somebody else's doing, perhaps with O below it."""
    for disk in s.disks:
        if disk.seen.live is Image.OTHER and disk.overlay is not None:
            return quarantine(s, advice.foreign_image(disk.record))
    return None


def record_io_error(s: Situation) -> Action | None:
    """Paused while it had an overlay, which may be full: to be resumed once it is home."""
    had_overlay = any(disk.on_overlay or disk.overlay is not None for disk in s.disks)
    due = had_overlay and s.seen.power is Power.IO_ERROR and not s.record.io_error
    return Action(Do.RECORD_IO_ERROR) if due else None


def adopt(s: Situation) -> Action | None:
    """R7: an overlay that this backup's journal does not know goes home before anything else, and is never copied."""
    if s.on_overlay and s.record.snapshot is Snapshot.NONE:
        return Action(Do.ADOPT)
    return None


def record_snapshot(s: Situation) -> Action | None:
    """L=O and a snapshot was intended: it is there, whatever the call said."""
    if s.on_overlay and s.record.snapshot is Snapshot.INTENDED:
        return Action(Do.RECORD_SNAPSHOT)
    return None


def correct_persistent(s: Situation) -> Action | None:
    """L=B with O locked is beyond us; P≠L, both ways, is put right at once."""
    for disk in s.disks:
        if not disk.on_overlay and disk.overlay is not None and disk.overlay.locked:
            return quarantine(s, advice.overlay_in_use(disk.record))
    pairs = [(disk.seen.persistent, disk.seen.live) for disk in s.disks]
    apart = any(persistent in OURS and live in OURS and persistent is not live for persistent, live in pairs)
    return settle_if_possible(s) if apart else None


def resume_guest(s: Situation) -> Action | None:
    """Suspended by us, and neither a switch of images nor a commit needs it: settle P=L (R2), then resume."""
    if s.record.guard is Guard.NONE or s.pivot_due or s.pausing:
        return None
    if s.snapshot_due and s.record.snapshot is Snapshot.INTENDED and not s.record.replan:
        return None
    if not s.suspended_by_us:
        return Action(Do.CLEAR_GUARD)
    return settle_if_possible(s) or Action(Do.RESUME)


def thaw(s: Situation) -> Action | None:
    """Frozen by us, and no longer needed."""
    needed = s.record.freeze is Freeze.FROZEN and s.snapshot_due
    return None if needed else thaw_guest(s)


def stop(s: Situation) -> Action | None:
    """This run is to end: what is suspended or frozen by us comes first, and there is no more to it."""
    until = s.seen.thaw_after if s.seen.now < s.seen.thaw_after else None
    return Action(Do.WAIT, reason="this run is to end", until=until) if s.intent.leaving else None


def clear_pivot(s: Situation) -> Action | None:
    """A pivot was intended; the job is not READY (any more), or the attempt has failed: L says so, not the call."""
    for disk in s.on_overlay:
        if disk.record.pivot_intended and not s.may_pivot(disk):
            return Action(Do.CLEAR_PIVOT, disk.target)
    return None


def settle_overlay(s: Situation) -> Action | None:
    """R2: L=O is made durable in P as soon as it is seen."""
    return settle_if_possible(s) if s.on_overlay and not s.pivot_due else None


def copy_or_fail(s: Situation) -> Action | None:
    """The frozen base is copied, unless the guest comes first or base is not the point in time any more."""
    if not s.on_overlay or s.record.copy is not Copy.OPEN or s.record.snapshot is Snapshot.ADOPTED:
        return None
    if s.seen.power is Power.IO_ERROR:
        return Action(Do.FAIL_BACKUP, reason=advice.no_room([disk.record for disk in s.on_overlay]))
    if s.seen.room_low:
        return Action(Do.FAIL_BACKUP, reason=s.seen.room_low, cause=Reason.OVERLAY_SPACE_LOW)
    if s.intent.unwanted:
        return fail_unwanted(s.intent.unwanted)
    if begun := [disk.record for disk in s.disks if disk.record.commit_begun]:
        return Action(Do.FAIL_BACKUP, reason=advice.commit_begun(begun[0]))
    if others := [disk.record for disk in s.on_overlay if disk.seen.job]:
        return Action(Do.FAIL_BACKUP, reason=advice.foreign_commit(others[0]))
    if len(s.on_overlay) < len(s.disks):  # R6
        return Action(Do.FAIL_BACKUP, reason=advice.disks_apart([d.record for d in s.disks if not d.on_overlay]))
    return Action(Do.COPY)


def remove_overlay(s: Situation) -> Action | None:
    """L=B and O is left: it goes only on a settled P (R2), and only if it was pivoted, merged or holds nothing."""
    for disk in s.disks:
        if disk.on_overlay or disk.overlay is None:
            continue
        if action := settle_live(s):
            return action
        if disk.seen.persistent is Image.OTHER:
            return quarantine(s, advice.foreign_definition(disk.record))
        if disk.holds_snapshot:
            return quarantine(s, advice.holds_snapshot(disk.record))
        if not disk.done_with and not disk.empty:
            return quarantine(s, advice.overlay_left_on(disk.record))
        return Action(Do.REMOVE_OVERLAY, disk.target)
    return None


def resume_after_io_error(s: Situation) -> Action | None:
    """It was our overlay that had no room; now it is gone. Only once: another error is not ours."""
    due = s.record.io_error and s.seen.power is Power.IO_ERROR and not s.on_overlay
    return Action(Do.RESUME) if due else None


def escalate(s: Situation) -> Action | None:
    """A commit does not converge: slow down the guest's writes, or suspend it, once in an attempt and for a while."""
    if s.pausing:
        return Action(Do.SUSPEND) if s.seen.power is Power.RUNNING else None
    for disk in s.on_overlay:
        if disk.seen.overdue and s.under_way(disk) and (action := _throttle(s, disk) or _pause(s, disk)):
            return action
    return None


def _throttle(s: Situation, disk: Case) -> Action | None:
    throttle = disk.record.throttle
    due = throttle is None or (not throttle.yielded and s.seen.now >= throttle.next_at)
    return Action(Do.THROTTLE, disk.target) if due and s.throttling(disk) else None


def _pause(s: Situation, disk: Case) -> Action | None:
    """Never together with a switch of images, nor with the guest frozen; and P is settled: see settle_overlay."""
    thawed = not s.record.frozen
    free = s.record.guard is Guard.NONE and s.seen.power is Power.RUNNING and thawed
    if not s.may_pause or not free or disk.record.pause_used:
        return None
    return Action(Do.INTEND_PAUSE, disk.target, until=s.seen.now + s.intent.stall_pause)


def commit_and_pivot(s: Situation) -> Action | None:
    """L=O and the copy is decided: commit, READY, guarded pivot. Failed attempts are made again after a while."""
    if not s.on_overlay or s.record.gave_up:
        return None
    actions = [_way_home(s, disk) for disk in s.on_overlay]
    for action in actions:
        if action.do is not Do.WAIT or action.parked:
            return action
    if all(s.exhausted(disk) for disk in s.on_overlay):
        return Action(Do.GIVE_UP)
    until = [action.until for action in actions if action.until is not None]
    if s.pausing:
        until.append(s.record.pause_until)
    waiting = next((action for action in actions if action.others), Action(Do.WAIT, reason="the commit is running"))
    meanwhile = _while_a_snapshot_is_kept(s) if any(disk.holds_snapshot for disk in s.on_overlay) else None
    return meanwhile or replace(waiting, until=min(until, default=None))


def _while_a_snapshot_is_kept(s: Situation) -> Action | None:
    """Its user may keep it for days: neither the stored copy nor a deleted VMBackup waits for that."""
    if s.record.copy is Copy.TAKEN and not s.intent.unwanted:
        return Action(Do.SHIP)
    return let_go(s)


def _way_home(s: Situation, disk: Case) -> Action:
    record, seen = disk.record, disk.seen
    if disk.holds_snapshot and not seen.job:
        return Action(Do.WAIT, disk.target, reason=advice.holds_snapshot(record), others=True)
    if not record.commit_begun:
        return Action(Do.BEGIN_COMMIT, disk.target)
    if s.exhausted(disk):
        return Action(Do.WAIT, disk.target)
    if record.commit_running and not seen.job and seen.mirror is Mirror.NONE:
        return Action(Do.RECORD_FAILURE, disk.target, reason="the commit job ended before it was complete")
    if s.seen.now < record.retry_at:
        return Action(Do.WAIT, disk.target, until=record.retry_at)
    if s.may_pivot(disk):
        return _pivot(s, disk)
    if seen.foreign_job:
        return Action(Do.WAIT, disk.target, reason=advice.foreign_job(disk.record), others=True)
    if not seen.job and seen.mirror is not Mirror.NONE:
        return quarantine(s, advice.job_unknown(disk.record))
    if not seen.job:
        return Action(Do.COMMIT, disk.target)
    return Action(Do.WAIT, disk.target)


def _pivot(s: Situation, disk: Case) -> Action:
    if not disk.record.pivot_intended or not _guarded(s):
        return Action(Do.INTEND_PIVOT, disk.target, guard=_guard(s))
    if not s.paused and (action := settle_live(s)):  # R2: where the config cannot be saved, the guest is not suspended
        return action
    return Action(Do.SUSPEND) if s.intent.guarded and not s.paused else Action(Do.PIVOT, disk.target)


def _guarded(s: Situation) -> bool:
    """The record says who keeps the guest still: us, or somebody who had paused it, and still does."""
    found_paused = s.record.guard is Guard.FOUND_PAUSED and s.paused
    return s.record.guard is Guard.OURS or found_paused or not s.intent.guarded


def _guard(s: Situation) -> Guard:
    """Who keeps the guest still during the switch that is about to be intended."""
    if not s.intent.guarded:
        return Guard.NONE
    return Guard.FOUND_PAUSED if s.paused and s.record.guard is not Guard.OURS else Guard.OURS


def stay_on_overlay(s: Situation) -> Action | None:
    """The limit is reached: the guest keeps running on its overlay, nothing is deleted."""
    if not s.on_overlay:
        return None
    return end(s) or let_go(s) or Action(Do.DONE)


def settle_base(s: Situation) -> Action | None:
    """All disks are on base: make that durable, before a snapshot as well as after the way home."""
    if s.record.snapshot is Snapshot.NONE and not snapshot_wanted(s):
        return None
    return settle(s, ((disk, Image.BASE) for disk in s.disks))


def take_snapshot(s: Situation) -> Action | None:
    """R1: all disks are on base, and this backup wants its snapshot: freeze, intend, suspend, observe, snapshot."""
    if not snapshot_wanted(s):
        return None
    if s.record.snapshot is Snapshot.ADOPTED or s.record.replan:
        return Action(Do.PLAN)  # R7: with a fresh record
    for disk in s.disks:
        if disk.seen.base_changed or Image.OTHER in (disk.seen.live, disk.seen.persistent):
            return Action(Do.REFUSE, reason=advice.image_changed(disk.record))
    if s.record.snapshot is Snapshot.NONE and s.seen.power is Power.IO_ERROR:
        return Action(
            Do.REFUSE, reason="the guest is paused by an I/O error: fix its disk (virsh domblkerror), resume it"
        )
    busy = [disk.record for disk in s.disks if disk.seen.foreign_job]
    if busy and not s.suspended_by_us:
        return thaw_guest(s) or Action(Do.WAIT, reason=advice.foreign_job(busy[0]), others=True)
    if s.intent.quiesce and s.record.freeze is Freeze.NONE and s.seen.power is Power.RUNNING:
        return Action(Do.FREEZE)
    if s.intent.quiesce_required and s.record.freeze is not Freeze.FROZEN:
        return Action(Do.REFUSE, reason="spec.snapshot.quiesce is Require, and a guest that is paused cannot be frozen")
    if s.record.snapshot is Snapshot.NONE or not _guarded(s):
        return Action(Do.INTEND_SNAPSHOT, guard=_guard(s))
    return Action(Do.SUSPEND) if s.intent.guarded and not s.paused else Action(Do.SNAPSHOT)


RULES_ON: tuple[Rule, ...] = (
    wait_for_migration,
    follow_the_truth,
    lift_quarantine,
    leave_others_alone,
    record_io_error,
    adopt,
    record_snapshot,
    correct_persistent,
    resume_guest,
    thaw,
    unthrottle,
    stop,
    clear_pivot,
    settle_overlay,
    spare_astray_base,
    spare_changed_base,
    copy_or_fail,
    remove_overlay,
    resume_after_io_error,
    escalate,
    commit_and_pivot,
    stay_on_overlay,
    settle_base,
    take_snapshot,
    finish,
)
