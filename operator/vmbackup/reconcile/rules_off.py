"""The rules while the guest is off. The first that has an action decides: their order is part of the protocol."""

from __future__ import annotations

from vmbackup.reconcile.record import Copy, Freeze, Guard, Image, Snapshot
from vmbackup.reconcile.situation import (
    Rule,
    Situation,
    finish,
    let_go,
    quarantine,
    settle,
    settled,
    snapshot_wanted,
)
from vmbackup.reconcile.terms import Action, Do


def forget_guest(s: Situation) -> Action | None:
    """QEMU is gone, and with it whatever we had suspended or frozen."""
    frozen = s.record.freeze in (Freeze.FROZEN, Freeze.THAW_DUE)
    if s.record.guard is not Guard.NONE or frozen or s.record.io_error:
        return Action(Do.FORGET_GUEST)
    return None


def off_on_overlay(s: Situation) -> Action | None:
    """P=O: the overlay is what counts; the commit waits for the next start. R6: no compare in Guarded mode."""
    for disk in s.disks:
        if disk.seen.persistent is not Image.OVERLAY:
            continue
        if disk.overlay is None:
            if settled(disk, Image.BASE) and (action := settle(s, [(disk, Image.BASE)])):
                return action
            return quarantine(s, f"disk {disk.target}: the overlay {disk.record.overlay} is gone: restore from backup")
        if disk.record.pivot_intended and s.intent.guarded:
            return Action(Do.CLEAR_PIVOT, disk.target)
        if disk.record.pivot_intended:  # Live: the guest may have written to either image
            reason = f"disk {disk.target}: {disk.record.overlay} and {disk.record.base} differ after a power cut"
            return quarantine(s, reason) if s.record.quarantined else Action(Do.COMPARE, disk.target, reason=reason)
        if s.record.snapshot is Snapshot.NONE:
            return Action(Do.ADOPT)
        if s.record.snapshot is Snapshot.INTENDED:
            return Action(Do.RECORD_SNAPSHOT)
        if not s.seen.config_failing and (action := settle(s, [(disk, Image.OVERLAY)])):
            return action
    return None


def off_with_overlay_left(s: Situation) -> Action | None:
    """P=B and O is left: R6: libvirt writes P=B only after QEMU's pivot, so with a pivot intended O is done with."""
    for disk in s.disks:
        if disk.seen.persistent is Image.OVERLAY or disk.overlay is None:
            continue
        pivoted = disk.record.pivot_intended and disk.seen.persistent is Image.BASE
        unused = disk.empty and not disk.overlay.locked and disk.seen.persistent is not Image.OTHER
        if pivoted or unused:
            return settle(s, [(disk, Image.BASE)]) or Action(Do.REMOVE_OVERLAY, disk.target)
        if not s.record.quarantined:
            return quarantine(
                s,
                f"disk {disk.target}: the guest is off and would start on {disk.record.base}, but "
                f"{disk.record.overlay} may hold newer data: compare them before you start it",
            )
    return None


def park(s: Situation) -> Action | None:
    """Nothing can be done for the chain until the guest starts; base is frozen meanwhile, so a copy can go on."""
    if not any(disk.seen.persistent is Image.OVERLAY or disk.overlay is not None for disk in s.disks):
        return None
    frozen = all(d.seen.persistent is Image.OVERLAY and not d.record.commit_begun for d in s.disks)
    if s.record.copy is Copy.OPEN and s.record.snapshot is Snapshot.DONE and not s.record.quarantined:
        if s.intent.deleted:
            return Action(Do.FAIL_BACKUP, reason="the VMBackup was deleted")
        return Action(Do.COPY) if frozen else Action(Do.FAIL_BACKUP, reason="the disks are apart")
    if s.record.copy is Copy.TAKEN and not s.intent.deleted:
        return Action(Do.SHIP)
    return let_go(s) or Action(
        Do.WAIT, reason=s.record.quarantined or "start the guest: it is off on its overlay", parked=True
    )


def refuse_off(s: Situation) -> Action | None:
    """Not begun, and there is nobody to back up."""
    if snapshot_wanted(s):
        return Action(Do.REFUSE, reason="the domain is not running: start it, or copy its disks as they are")
    return None


RULES_OFF: tuple[Rule, ...] = (
    forget_guest,
    off_on_overlay,
    off_with_overlay_left,
    park,
    refuse_off,
    finish,
)
