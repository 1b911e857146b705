"""The rules while the guest is on. The first that has an action decides: their order is part of the protocol.

Those of a commit are in commit_rules.py.
"""

from __future__ import annotations

from vmbackup.api.status import Reason
from vmbackup.protocol import advice
from vmbackup.protocol.commit_rules import commit_and_pivot, escalate
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
    guard_for_switch,
    guarded,
    quarantine,
    release_deleted,
    settle,
    settle_if_possible,
    settle_live,
    snapshot_wanted,
    spare_astray_base,
    spare_changed_base,
    thaw_guest,
    unthrottle,
)
from vmbackup.protocol.table import row
from vmbackup.protocol.terms import Action, Do, Power


@row(
    "the domain is being migrated, saved or backed up by others",
    "suspended by us: settle P=L, resume; else thaw, wait",
    "libvirt moves the guest away: no switch of images, and no guest left suspended or frozen",
)
def wait_for_migration(s: Situation) -> Action | None:
    """Libvirt refuses a migration during our block job, and we switch nothing during a migration."""
    if not s.seen.migrating:
        return None
    if s.suspended_by_us:
        return settle_if_possible(s) or Action(Do.RESUME)
    return thaw_guest(s) or Action(Do.WAIT, reason=advice.migrating(s.record), others=True)


@row(
    "T≠L",
    "settle P=T; resume if we suspended; quarantine",
    "libvirt has lost a save, and its block calls fail until a cold restart (V8, V9): P must name what QEMU "
    "writes before anything else happens",
)
def follow_the_truth(s: Situation) -> Action | None:
    """R3: T≠L, libvirt lost a save, and its block API fails until a cold restart."""
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


@row(
    "quarantined, and L=P=T with nothing left behind",
    "lift the quarantine",
    "a cold restart, or a human, has repaired it; nobody has to tell the agent",
)
def lift_quarantine(s: Situation) -> Action | None:
    """L=P=T again, and nothing left behind: the guest was restarted, or a human has helped."""
    if s.record.quarantined and all(consistent(disk) for disk in s.disks):
        return Action(Do.LIFT_QUARANTINE)
    return None


@row(
    "L is neither B nor O, and O is there",
    "quarantine; P and O are not touched",
    "somebody else's overlay, perhaps on top of ours: merging under it would corrupt it",
)
def leave_others_alone(s: Situation) -> Action | None:
    """The guest uses an image that is neither base nor O: somebody else's image, perhaps with O below it."""
    for disk in s.disks:
        if disk.seen.live is Image.OTHER and disk.overlay is not None:
            return quarantine(s, advice.foreign_image(disk.record))
    return None


@row(
    "paused by an I/O error while it has an overlay",
    "record it",
    "to distinguish it later from a pause by a user, who does not want the guest resumed",
)
def record_io_error(s: Situation) -> Action | None:
    """Paused while it had an overlay, which may be full: to be resumed once it is home."""
    had_overlay = any(disk.on_overlay or disk.overlay is not None for disk in s.disks)
    due = had_overlay and s.seen.power is Power.IO_ERROR and not s.record.io_error
    return Action(Do.RECORD_IO_ERROR) if due else None


@row(
    "L=O, snapshot not in our journal",
    "adopt: no copy, merge it, then take our own snapshot (R7)",
    "its base may have been committed into already: a copy of it would be no moment of the guest (V13)",
)
def adopt(s: Situation) -> Action | None:
    """R7: an overlay that this backup's journal does not know goes home before anything else, and is never copied."""
    if s.on_overlay and s.record.snapshot is Snapshot.NONE:
        return Action(Do.ADOPT)
    return None


@row(
    "L=O, snapshot intended",
    "record the snapshot",
    "an error of the call does not mean that it was not carried out; a second snapshot would stack overlays",
)
def record_snapshot(s: Situation) -> Action | None:
    """L=O and a snapshot was intended: it is there, whatever the call said."""
    if s.on_overlay and s.record.snapshot is Snapshot.INTENDED:
        return Action(Do.RECORD_SNAPSHOT)
    return None


@row(
    "L≠O and O locked",
    "quarantine",
    "QEMU may write O though libvirt names B (V9)",
)
@row(
    "P≠L, one is B and the other O",
    "settle P=L",
    "the key invariant: the next power cycle must boot what the guest writes (V1, V4)",
)
def correct_persistent(s: Situation) -> Action | None:
    """L=B with O locked cannot be repaired by us: quarantine. P≠L is corrected at once, in both directions."""
    for disk in s.disks:
        if not disk.on_overlay and disk.overlay is not None and disk.overlay.locked:
            return quarantine(s, advice.overlay_in_use(disk.record))
    pairs = [(disk.seen.persistent, disk.seen.live) for disk in s.disks]
    apart = any(persistent in OURS and live in OURS and persistent is not live for persistent, live in pairs)
    return settle_if_possible(s) if apart else None


@row(
    "suspended by us, no switch due (nor one that an earlier run intended), no commit waited for",
    "settle P=L (all), resume, clear the record",
    "the guest comes before the backup, and P before the guest (V1, V8)",
)
def resume_guest(s: Situation) -> Action | None:
    """Suspended by us, and neither a switch of images nor a commit needs it: settle P=L (R2), then resume."""
    if s.record.guard is Guard.NONE or s.pivot_due or s.pausing:
        return None
    if s.snapshot_due and s.record.snapshot is Snapshot.INTENDED and not s.record.replan:
        return None
    if not s.suspended_by_us:
        return Action(Do.CLEAR_GUARD)
    return settle_if_possible(s) or Action(Do.RESUME)


@row(
    "frozen by us, no longer needed",
    "thaw; a guest agent that does not answer is asked again, and blocks nothing",
    "a frozen guest hangs; a guest agent that hangs must not keep its disks on their overlay",
)
def thaw(s: Situation) -> Action | None:
    """Frozen by us, and no longer needed."""
    needed = s.record.freeze is Freeze.FROZEN and s.snapshot_due
    return None if needed else thaw_guest(s)


@row(
    "this run is to end",
    "wait for the next run",
    "what we suspended or froze was resumed and thawed by the rules above",
)
def stop(s: Situation) -> Action | None:
    """This run is to end: the guest was resumed and thawed by the rules above; nothing else is done."""
    until = s.seen.thaw_after if s.seen.now < s.seen.thaw_after else None
    return Action(Do.WAIT, reason="this run is to end", until=until) if s.intent.leaving else None


@row(
    "L=O, pivot intended, job not READY or the next attempt not due",
    "clear the intent",
    "L says whether it has pivoted, not the call's answer",
)
def clear_pivot(s: Situation) -> Action | None:
    """A pivot was intended; the job is not READY (any more), or the attempt has failed: L says so, not the call."""
    for disk in s.on_overlay:
        if disk.record.pivot_intended and not s.may_pivot(disk):
            return Action(Do.CLEAR_PIVOT, disk.target)
    return None


@row(
    "L=O, P not settled, no pivot due",
    "settle P=L (all)",
    "the same invariant, as early as possible",
)
def settle_overlay(s: Situation) -> Action | None:
    """R2: L=O is made durable in P as soon as it is seen."""
    return settle_if_possible(s) if s.on_overlay and not s.pivot_due else None


@row(
    "L=O, copy open",
    "I/O error, too little room for the overlay, deleted, cancelled, a commit begun or only some disks on O: "
    "the copy has failed; else copy",
    "from the first commit on base is not the point in time any more; and no backup is worth a guest that stops",
)
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


@row(
    "L=B, O left",
    "settle P=L; pivot intended, or merged, or O empty: remove O; else, or if O holds a user snapshot, quarantine",
    "a power cut after the removal must not bring back a P that names O (V4, V5)",
)
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


@row(
    "all L=B, I/O error recorded",
    "resume, once",
    "it was the overlay that had no room; a second error has another cause",
)
def resume_after_io_error(s: Situation) -> Action | None:
    """It was our overlay that had no room; now it is gone. Only once: another error is not ours."""
    due = s.record.io_error and s.seen.power is Power.IO_ERROR and not s.on_overlay
    return Action(Do.RESUME) if due else None


@row(
    "L=O, given up",
    "nothing is deleted, the guest keeps running; complete the copy, finish; deleted: record the orphan, release",
    "trying for ever hides the fault; on its overlay the guest is safe",
)
def stay_on_overlay(s: Situation) -> Action | None:
    """The limit is reached: the guest keeps running on its overlay, nothing is deleted."""
    if not s.on_overlay:
        return None
    return end(s) or release_deleted(s) or Action(Do.DONE)


@row(
    "all L=B, P not settled",
    "settle B",
    "before the snapshot as well as after the way home: a power cut must not bring back an older P (V4)",
)
def settle_base(s: Situation) -> Action | None:
    """All disks are on base: make that durable, before a snapshot as well as after the way home."""
    if s.record.snapshot is Snapshot.NONE and not snapshot_wanted(s):
        return None
    return settle(s, ((disk, Image.BASE) for disk in s.disks))


@row(
    "all L=B, and an earlier run intended the snapshot, or an overlay was adopted",
    "plan again",
    "disks, UEFI variables and the room for overlays may have changed since",
)
@row(
    "all L=B, snapshot wanted",
    "a disk uses another image, or the guest is paused by an I/O error: refuse. Freeze if asked, intent, "
    "suspend, observe, snapshot",
    "suspended from before the switch until P is durable (V1, V2)",
)
def take_snapshot(s: Situation) -> Action | None:
    """R1: all disks are on base, and this backup wants its snapshot: freeze, intend, suspend, observe, snapshot."""
    if not snapshot_wanted(s):
        return None
    if s.record.snapshot is Snapshot.ADOPTED or s.record.replan:
        return Action(Do.PLAN)  # R7: with a fresh record
    for disk in s.disks:
        if disk.seen.base_changed or Image.OTHER in (disk.seen.live, disk.seen.persistent):
            return Action(Do.REFUSE, reason=advice.image_changed(disk.record))
        if disk.seen.astray:
            return Action(Do.REFUSE, reason=advice.written_astray(disk.record, on_base=True))
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
    if s.record.snapshot is Snapshot.NONE or not guarded(s):
        return Action(Do.INTEND_SNAPSHOT, guard=guard_for_switch(s))
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
