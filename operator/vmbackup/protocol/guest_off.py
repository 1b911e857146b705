"""The rules while the guest is off. The first that has an action decides: their order is part of the protocol."""

from __future__ import annotations

from dataclasses import replace

from vmbackup.protocol import advice
from vmbackup.protocol.record import Copy, Guard, Image, Settled, Snapshot
from vmbackup.protocol.situation import (
    Case,
    Rule,
    Situation,
    end,
    fail_unwanted,
    finish,
    quarantine,
    release_deleted,
    settle,
    settled,
    snapshot_wanted,
    spare_changed_base,
    while_a_snapshot_is_kept,
)
from vmbackup.protocol.table import row
from vmbackup.protocol.terms import Action, Do


@row(
    "suspended, frozen or throttled by us",
    "forget that: QEMU is gone",
    "the next QEMU of this domain is not ours to resume",
)
def forget_guest(s: Situation) -> Action | None:
    """QEMU is gone, so nothing is suspended, frozen or slowed down by us any more."""
    touched = s.record.guard is not Guard.NONE or s.record.frozen or s.record.throttles_guest or s.record.io_error
    if touched:
        return Action(Do.FORGET_GUEST)
    return None


@row(
    "quarantined, the domain is undefined, no O, and B is there",
    "lift the quarantine",
    "it was migrated and merged on the other host: nothing is left here",
)
def lift_quarantine(s: Situation) -> Action | None:
    """Gone from this host, and so is O, while B is seen: merged on the host to which its guest was migrated."""
    if not s.record.quarantined or not s.undefined or any(disk.overlay is not None for disk in s.disks):
        return None
    if any(disk.seen.base_changed for disk in s.disks):  # their file system may not be mounted any more
        return None
    return Action(Do.LIFT_QUARANTINE)


@row(
    "P=O, O missing",
    "settled on B: settle B; migrated: ignore the disk; else quarantine",
    "settled on B: O was removed only after everything was proven to be in B (V11). Else the guest's newest "
    "data is gone: no machine may decide that",
)
@row(
    "P=O, pivot intended, settled on B since",
    "settle B",
    "somebody has redefined the domain: a guarded guest has not run between the intent and the settling of P "
    "on B, so it has written nothing to O",
)
@row(
    "P=O, pivot intended",
    "Guarded: clear the intent. Live: compare; different: quarantine",
    "Guarded: QEMU died before the guest could write B, so O has everything. Live: the guest may have written "
    "to either",
)
@row(
    "P=O, not in our journal",
    "adopt (R7)",
    "an earlier backup left it: it is merged before this backup takes its own snapshot",
)
@row(
    "P=O, snapshot intended",
    "record the snapshot",
    "it was taken, whatever the call said",
)
@row(
    "P=O, merged, and O's lock held by us ever since",
    "settle B",
    "proven equal, and no guest could start on O since",
)
@row(
    "P=O, not settled",
    "settle O",
    "a power cut could bring back an older P, which names B",
)
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
                continue  # it was merged on the host where the guest is
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


@row(
    "P is neither B nor O, O left, pivot intended, not settled on B",
    "clear the intent",
    "if P becomes B later, a user did it: that is no proof of a pivot",
)
@row(
    "P=B, O left, pivot intended, Guarded, and not settled on B",
    "compare; the same: sync; different: clear the intent, quarantine",
    "libvirt writes P=B only after QEMU's pivot, but a user may write it too: only comparing tells",
)
@row(
    "P=B, all of O is in B, but O holds a snapshot of the user",
    "quarantine",
    "the snapshot would be lost with O: the user must delete it first",
)
@row(
    "P=B, O left: pivot intended, or merged and not written since, or empty and unlocked",
    "settle B, remove O",
    "everything of O is in B, and everything on disk names B first (V4, V5, V11)",
)
@row(
    "the domain is undefined, O left",
    "quarantine",
    "O may be written, and its base committed into, on the host to which the domain was migrated",
)
@row(
    "P is not O, O left, else",
    "quarantine",
    "the guest would boot without what O holds (V5, V9)",
)
def off_with_overlay_left(s: Situation) -> Action | None:
    """P=B and O is left: R6: libvirt writes P=B only after QEMU's pivot, so with a pivot intended O is done with.

    The same holds if it was merged, and not written since. A user may write P=B as well; but a guarded guest has not
    run from the intent until P was settled on B, so then both images show the same.
    """
    for disk in s.disks:
        if disk.seen.persistent is Image.OVERLAY or disk.overlay is None:
            continue
        if disk.record.pivot_intended and disk.seen.persistent is Image.OTHER and not settled(disk, Image.BASE):
            return Action(Do.CLEAR_PIVOT, disk.target)  # if P ever becomes B, a user did it
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


@row(
    "P=O, copy decided, `commit.offline`, O holds a snapshot of the user",
    "wait until the user has deleted it",
    "the snapshot would be lost with O",
)
@row(
    "P=O, copy decided, `commit.offline`; no saved state, not migrated",
    "journal, merge O into B, hold O's lock, compare, journal; the limit of attempts reached: give up",
    "`qemu-img commit` under QEMU's locks; while we compare we hold the lock of O, so the guest cannot start",
)
def merge_offline(s: Situation) -> Action | None:
    """P=O, settled, and commit.offline: merge, one disk after the other. Failed attempts are made again after a while.

    QEMU's locks keep the guest from starting meanwhile. The result counts only while we hold O's lock: after a restart
    of the agent the guest may have run, and O is merged and compared again. A saved state names O; and where the
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
        waiting = next((action for action in actions if action.others), actions[0])
        meanwhile = while_a_snapshot_is_kept(s) if waiting.others else None
        return meanwhile or replace(waiting, target="", until=min(until, default=None))
    if not left:
        return None
    return (None if s.record.gave_up else Action(Do.GIVE_UP)) or end(s) or release_deleted(s) or Action(Do.DONE)


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


@row(
    "P=O or O left, copy open",
    "copy; the copy has failed if deleted, cancelled, migrated, a commit was begun, or only some disks are on O",
    "base does not change while the guest is off; base without O matches no moment of the guest (V3)",
)
@row(
    "P=O or O left, copy decided",
    "complete the copy in the store; then wait for the guest to start, and commit then. Deleted: record the "
    "orphan, release",
    "O is what counts and boots. A finalizer must not wait for a guest that may never start",
)
def park(s: Situation) -> Action | None:
    """Nothing can be done for the chain until the guest starts; base is frozen meanwhile, so a copy can go on."""
    if not any(disk.seen.persistent is Image.OVERLAY or disk.overlay is not None for disk in s.disks):
        return None
    copying = s.record.copy is Copy.OPEN and s.record.snapshot is Snapshot.DONE
    if copying and s.record.quarantined and s.undefined:
        return Action(Do.FAIL_BACKUP, reason=s.record.quarantined)  # base may be changed on another host
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
    return release_deleted(s) or Action(Do.WAIT, reason=reason, parked=True)


@row(
    "no snapshot taken",
    "refuse",
    "a disk-only snapshot of a domain that is off succeeds, and is useless",
)
def refuse_off(s: Situation) -> Action | None:
    """No snapshot was taken, and the guest does not run."""
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
