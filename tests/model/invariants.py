"""The invariants of docs/protocol.md: what no step may do (I1, I2, I3, I5, the key), and what counts as home (I4)."""

from __future__ import annotations

from tests.model.environment import BOOT_FAILS
from tests.model.merging import locked
from tests.model.user import others
from tests.model.world import Disk, Setting, Step, World, clean, content, needed
from vmbackup.protocol.record import Copy, Snapshot
from vmbackup.protocol.terms import Do

SWITCHING = (Do.FREEZE, Do.SUSPEND, Do.SNAPSHOT, Do.COMMIT, Do.PIVOT)


class Invariants:
    """Those of one setting."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def violated(self, before: World, step: Step) -> str:
        """The invariant that this step violates; empty if none."""
        after = step.world
        if before.guest == "off":
            if after.guest != "off" or step.label == BOOT_FAILS:
                return _violated_by_boot(before)
        elif what := self._violated_while_on(before, after):
            return what
        decided = after.plan[1].it.do if before.plan is None and after.plan else None
        if decided in SWITCHING and before.migrating:
            return "MIGRATION a switch of images goes on meanwhile"
        disturbed = any(others(disk) or disk.astray or disk.kept for disk in before.disks)
        undisturbed = not before.edited and not disturbed and not self.setting.swaps  # a swap is seen while QEMU lives
        alone = not self.setting.residual and undisturbed
        newly = decided is Do.QUARANTINE and not before.record.it.quarantined
        if newly and alone and all(d.writes == d.live for d in before.disks):
            return "ALARM quarantine, though libvirt and QEMU agree"
        if after.disks is not before.disks and (what := _violated_by_unlink(before, after)):
            return what
        if after.vmbackup == "released" and before.vmbackup != "released":
            return self._violated_by_release(before)
        if what := _violated_while_astray(before, after):
            return what
        taken = after.record is not before.record and _taken(after) and not _taken(before)
        if taken and any(d.copied != d.snapshot for d in before.disks):
            return "I2 the copy is not the content at the snapshot"
        return ""

    def _violated_while_on(self, before: World, after: World) -> str:
        same = after.disks is before.disks and after.guest == before.guest and after.frozen == before.frozen
        if same or after.guest == "off":
            return ""
        writable = after.guest == "running" and not after.frozen
        for disk in after.disks:
            if content(disk, disk.writes) != disk.acked:
                return "I1 the running image lacks acknowledged writes"
            excused = self.setting.spared or self.setting.residual or after.edited or others(disk)
            if writable and disk.durable != disk.writes and not excused:
                return "KEY the guest can write, and P on disk names another image"
        if before.guest == "paused" and before.call and before.call[0].it.do is Do.RESUME and after.guest == "running":
            return "GUARD a guest that its user had paused is resumed"
        return ""

    def _violated_by_release(self, world: World) -> str:
        record = world.record.it
        recorded = record.orphan or (self.setting.orphan and record.snapshot is Snapshot.NONE)
        if not recorded and not all(_at_home(disk, world.guest) for disk in world.disks):
            return "I5 finalizer released, the chain neither clean nor recorded as an orphan"
        if world.guest == "suspended" or world.frozen:
            return "I5 finalizer released with the guest suspended or frozen by us"
        return ""

    def home(self, world: World) -> bool:
        """I4: chain clean, or off with a P that holds everything, or quarantine; never left suspended or frozen."""
        if world.plan or world.guest == "suspended" or world.frozen or any(map(locked, world.disks)):
            return False
        record = world.record.it
        if record.quarantined or (world.vmbackup == "released" and not record.orphan):
            return True
        if record.finished and world.guest != "io-error" and all(_at_home(d, world.guest) for d in world.disks):
            return True
        if record.gave_up and (record.finished or world.guest == "io-error"):  # then somebody has to make room first
            return True
        if world.guest == "away" or (self.setting.config_stuck and world.config_full):
            return True
        if self.setting.offline:  # it does not wait for a start
            return False
        return world.guest == "off" and all(content(d, d.persistent) == d.acked for d in world.disks)


def _at_home(disk: Disk, guest: str) -> bool:
    """On base, or on what somebody else has chosen, and nothing of ours is left."""
    return clean(disk, guest) or (disk.overlay is None and others(disk))


def _taken(world: World) -> bool:
    return world.record.it.copy is Copy.TAKEN


def _violated_by_boot(world: World) -> str:
    if world.record.it.quarantined:
        return ""
    contents = [content(disk, disk.persistent) for disk in world.disks]
    if None in contents:
        return "I1 unbootable: P names an overlay that is gone"
    return "" if contents == [disk.acked for disk in world.disks] else "I1 boot from a stale image"


def _violated_by_unlink(before: World, after: World) -> str:
    for x, y in zip(before.disks, after.disks, strict=True):
        if x.overlay is None or y.overlay is not None:
            continue
        if what := _unlinked(x._replace(persistent=y.persistent, durable=y.durable), before, after):
            return what
    return ""


def _violated_while_astray(before: World, after: World) -> str:
    """FAULTS 51: L, P and T agree by name, and yet QEMU writes another file."""
    if after.record is before.record or not any(disk.astray for disk in after.disks) or after.guest == "off":
        return ""
    was, now = before.record.it, after.record.it
    if was.quarantined and not now.quarantined:
        return "ASTRAY the quarantine is lifted, and QEMU writes another file than base"
    if now.finished and not was.finished and not now.quarantined:
        return "ASTRAY the backup is called finished, and QEMU writes another file than base"
    return ""


def _unlinked(disk: Disk, before: World, after: World) -> str:
    if disk.astray and after.guest != "off":
        return "I3 unlink of an overlay, and QEMU writes another file than base"
    if disk.kept:
        return "I3 unlink of an overlay that holds a snapshot of the user"
    if disk.below == "O" and "X" in (disk.writes, disk.live, disk.persistent):
        return "I3 unlink of an overlay that another image stands on"
    if disk.writes == "O" and after.guest != "off":
        return "I3 unlink of the image that QEMU writes"
    if disk.persistent == "O" or (disk.live == "O" and before.guest != "off"):
        return "I3 unlink of an overlay that an XML names"
    if disk.durable == "O":
        return "I3 unlink of an overlay that the XML on disk names"
    return "I3 unlink of an overlay with data that base lacks" if needed(disk) else ""
