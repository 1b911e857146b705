"""The rules while the guest is off. The first that has an action decides: their order is part of the protocol."""

from __future__ import annotations

from vmbackup.protocol import advice
from vmbackup.protocol.record import Copy, Guard, Image, Settled, Snapshot
from vmbackup.protocol.situation import (
    Case,
    Rule,
    Situation,
    end,
    fail_unwanted,
    finish,
    let_go,
    quarantine,
    settle,
    settled,
    snapshot_wanted,
    spare_changed_base,
)
from vmbackup.protocol.terms import Action, Do


def forget_guest(s: Situation) -> Action | None:
    """QEMU is gone, and with it whatever we had suspended, frozen or slowed down."""
    touched = s.record.guard is not Guard.NONE or s.record.frozen or s.record.throttles_guest or s.record.io_error
    if touched:
        return Action(Do.FORGET_GUEST)
    return None


def lift_quarantine(s: Situation) -> Action | None:
    """Gone from this host, and so is O, while B is seen: brought home where its guest was migrated to."""
    if not s.record.quarantined or not s.undefined or any(disk.overlay is not None for disk in s.disks):
        return None
    if any(disk.seen.base_changed for disk in s.disks):  # their file system may not be mounted any more
        return None
    return Action(Do.LIFT_QUARANTINE)


def off_on_overlay(s: Situation) -> Action | None:
    """P=O: the overlay is what counts, unless it was merged and no guest could start on it since; R6: no compare.

    Settled on B since the pivot was intended, P names O only because somebody has redefined it.
    """
    for disk in s.disks:
        if disk.seen.persistent is not Image.OVERLAY:
            continue
        if disk.overlay is None:
            if settled(disk, Image.BASE) and (action := settle(s, [(disk, Image.BASE)])):
                return action
            if s.seen.migrated:
                continue  # it was brought home where the guest is
            return quarantine(s, advice.overlay_gone(disk.record))
        if disk.record.pivot_intended and disk.record.settled == Settled(Image.BASE, durable=True):
            return settle(s, [(disk, Image.BASE)])
        if disk.record.pivot_intended and s.intent.guarded:
            return Action(Do.CLEAR_PIVOT, disk.target)
        if disk.record.pivot_intended:  # Live: the guest may have written to either image
            reason = advice.images_differ(disk.record)
            images = ((disk.target, Image.OVERLAY),)
            compare = Action(Do.COMPARE, disk.target, images=images, reason=reason)
            return quarantine(s, reason) if s.record.quarantined else compare
        if s.record.snapshot is Snapshot.NONE:
            return Action(Do.ADOPT)
        if s.record.snapshot is Snapshot.INTENDED:
            return Action(Do.RECORD_SNAPSHOT)
        wanted = Image.BASE if disk.overlay.merged and disk.overlay.held else Image.OVERLAY
        if not s.seen.config_failing and (action := settle(s, [(disk, wanted)])):
            return action
    return None


def off_with_overlay_left(s: Situation) -> Action | None:
    """P=B and O is left: R6: libvirt writes P=B only after QEMU's pivot, so with a pivot intended O is done with.

    So it is if it was merged, and not written since. A user may write P=B as well; but a guarded guest has not run from
    the intent until P was settled on B, so then both images show the same.
    """
    for disk in s.disks:
        if disk.seen.persistent is Image.OVERLAY or disk.overlay is None:
            continue
        if disk.record.pivot_intended and disk.seen.persistent is Image.OTHER and not settled(disk, Image.BASE):
            return Action(Do.CLEAR_PIVOT, disk.target)  # P=B, should it ever come, will be a user's doing
        home = disk.done_with and disk.seen.persistent is Image.BASE
        if home and not disk.overlay.merged and s.intent.guarded and not settled(disk, Image.BASE):
            if s.record.quarantined:
                continue
            reason = advice.overlay_left_off(disk.record)
            return Action(Do.COMPARE, disk.target, images=((disk.target, Image.BASE),), reason=reason)
        unused = disk.empty and not disk.overlay.locked and disk.seen.persistent is Image.BASE
        if home and disk.holds_snapshot:
            if s.record.quarantined:
                continue
            return quarantine(s, advice.holds_snapshot(disk.record))
        if home or unused:
            return settle(s, [(disk, Image.BASE)]) or Action(Do.REMOVE_OVERLAY, disk.target)
        if not s.record.quarantined:
            undefined = disk.seen.persistent is None
            why = advice.gone_from_here(disk.record) if undefined else advice.overlay_left_off(disk.record)
            return quarantine(s, why)
    return None


def merge_offline(s: Situation) -> Action | None:
    """P=O, settled, and commit.offline: merge, one disk after the other. Failed attempts are made again after a while.

    QEMU's locks keep the guest from starting meanwhile. What comes of it is believed only while we hold O's lock: after
    a restart of ours the guest may have run, and O is merged and compared anew. A saved state names O; and where the
    guest was migrated to, it writes O.
    """
    copying = s.record.copy is Copy.OPEN and s.record.snapshot is Snapshot.DONE
    elsewhere = s.seen.saved or s.seen.migrated
    if not s.intent.offline or s.record.quarantined or s.seen.config_failing or copying or elsewhere:
        return None
    left = [disk for disk in s.disks if disk.seen.persistent is Image.OVERLAY]
    actions = [_merge(s, disk) for disk in left if not s.exhausted(disk)]
    for action in actions:
        if action.do is not Do.WAIT:
            return action
    if actions:
        until = [action.until for action in actions if action.until is not None]
        others = any(action.others for action in actions)
        return Action(Do.WAIT, reason=actions[0].reason, until=min(until, default=None), others=others)
    if not left:
        return None
    return (None if s.record.gave_up else Action(Do.GIVE_UP)) or end(s) or let_go(s) or Action(Do.DONE)


def _merge(s: Situation, disk: Case) -> Action:
    if disk.holds_snapshot:
        return Action(Do.WAIT, disk.target, reason=advice.holds_snapshot(disk.record), others=True)
    if not disk.record.commit_begun:
        return Action(Do.BEGIN_COMMIT, disk.target)
    if s.seen.now < disk.record.retry_at:
        return Action(Do.WAIT, disk.target, until=disk.record.retry_at, reason=disk.record.last_error)
    if disk.overlay is not None and disk.overlay.locked:
        return Action(Do.WAIT, disk.target, reason=advice.lost_by_libvirt(disk.record))
    return Action(Do.MERGE_OFFLINE, disk.target)


def park(s: Situation) -> Action | None:
    """Nothing can be done for the chain until the guest starts; base is frozen meanwhile, so a copy can go on."""
    if not any(disk.seen.persistent is Image.OVERLAY or disk.overlay is not None for disk in s.disks):
        return None
    copying = s.record.copy is Copy.OPEN and s.record.snapshot is Snapshot.DONE
    if copying and s.record.quarantined and s.undefined:
        return Action(Do.FAIL_BACKUP, reason=s.record.quarantined)  # who knows what is done to base elsewhere
    if copying and not s.record.quarantined:
        if s.intent.unwanted:
            return fail_unwanted(s.intent.unwanted)
        if s.seen.migrated:
            return Action(Do.FAIL_BACKUP, reason=advice.migrated(s.record))
        if on_base := [disk.record for disk in s.disks if disk.seen.persistent is not Image.OVERLAY]:
            return Action(Do.FAIL_BACKUP, reason=advice.disks_apart(on_base))
        if begun := [disk.record for disk in s.disks if disk.record.commit_begun]:
            return Action(Do.FAIL_BACKUP, reason=advice.commit_begun(begun[0]))
        return Action(Do.COPY)
    if s.record.copy is Copy.TAKEN and not s.intent.unwanted:
        return Action(Do.SHIP)
    in_use = [advice.lost_by_libvirt(disk.record) for disk in s.disks if disk.overlay and disk.overlay.locked]
    why_off = "; ".join(in_use) or advice.start(saved=s.seen.saved)
    reason = s.record.quarantined or (advice.migrated(s.record) if s.seen.migrated else why_off)
    return let_go(s) or Action(Do.WAIT, reason=reason, parked=True)


def refuse_off(s: Situation) -> Action | None:
    """Not begun, and there is nobody to back up."""
    if not snapshot_wanted(s):
        return None
    if s.seen.migrated or s.undefined:
        return Action(Do.REFUSE, reason=advice.not_here(s.record))
    return Action(Do.REFUSE, reason="the domain is not running: start it, or copy its disks as they are")


RULES_OFF: tuple[Rule, ...] = (
    forget_guest,
    lift_quarantine,
    off_on_overlay,
    spare_changed_base,
    off_with_overlay_left,
    merge_offline,
    park,
    refuse_off,
    finish,
)
