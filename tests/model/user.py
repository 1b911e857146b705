"""What users and other tools do to the domain meanwhile, each counted as a fault. The setting says which of it.

Assumption A (docs/protocol.md): not between an observation of the agent and the act that follows from it, and not while
a call of the agent is under way. `--residual window` lifts that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tests.model.merging import NONE, may_start
from tests.model.world import Disk, Kind, Setting, Step, World, named, on, put, put_all
from vmbackup.protocol.record import Copy, Guard


def user_faults(world: World, setting: Setting) -> Iterator[Step]:
    """One more thing that somebody does."""
    if world.vmbackup in ("wanted", "cancelled"):
        yield _does("deletes the VMBackup", world._replace(vmbackup="deleted"))
    if setting.cancel and world.vmbackup == "wanted":
        yield _does("cancels the backup", world._replace(vmbackup="cancelled"))
    if setting.residual == "resume" and world.guest == "suspended":
        yield _does("resumes the guest that we suspended", world._replace(guest="running"))
    if not world.libvirtd or world.guest == "away":
        return
    if setting.foreign and on(world):
        yield from _starts_a_job(world)
    if not _between(world) and setting.residual != "window":
        return
    if setting.foreign and on(world) and not world.migrating:
        yield from _takes_a_snapshot(world)
    if setting.edits:
        yield from _edits(world)
    if setting.snapshots:
        yield from _takes_an_internal_snapshot(world)
    record = world.record.it
    if setting.pauses and world.guest == "running" and (record.guard is Guard.NONE or record.quarantined):
        yield _does("pauses the guest", world._replace(guest="paused"))
    if setting.migration and world.guest in ("running", "paused") and all(disk.job == "-" for disk in world.disks):
        yield _does("starts a migration", world._replace(migrating=True))


def user_steps(world: World, idle: Callable[[], bool]) -> Iterator[Step]:
    """How jobs and edits that were begun end, sooner or later."""
    for index, disk in enumerate(world.disks):
        if disk.job == "foreign":
            yield Step(named("user's block job ends", world, index), put(world, index, job="-"))
        if disk.kept and world.guest != "away" and world.libvirtd and world.agent and idle():
            yield Step(named("user deletes his snapshot", world, index), put(world, index, kept=False))
    if world.migrating and on(world):
        yield Step("user's migration fails", world._replace(migrating=False))
        if world.frozen or world.guest == "suspended" or world.call or (world.agent and not idle()):
            return  # A: a migration takes seconds
        yield Step("user's migration succeeds: the guest is away", _migrated(world))
        yield Step("user's migration succeeds: the guest is away, and undefined here", _undefined(_migrated(world)))


def may_boot(world: World, idle: Callable[[], bool], residual: str) -> bool:
    """A: whether the user, or autostart, boots the guest now. Who has edited its disks waits for the agent's look."""
    if world.guest != "off" or not world.libvirtd:
        return False
    if residual == "reboot":
        return may_start(world)
    if world.call or world.config != "saved":
        return False
    between = world.plan is None or world.plan[0] != "do" or _merging(world)
    return between and may_start(world) and (not world.edited or idle())


def _merging(world: World) -> bool:
    """An overlay is merged offline, or was: then the guest may be booted at any moment, and locks must do."""
    pairs = zip(world.disks, world.record.it.disks, strict=True)
    return any(disk.merge != NONE or (disk.unwritten and not record.pivot_intended) for disk, record in pairs)


def _does(label: str, world: World) -> Step:
    return Step("FAULT: the user " + label, world, Kind.FAULT)


def _between(world: World) -> bool:
    """Nothing that was observed is about to be acted upon."""
    return (world.plan is None or world.plan[0] != "do") and world.call is None


def _starts_a_job(world: World) -> Iterator[Step]:
    """A block copy, say, at any moment: libvirt allows one job a disk."""
    for index, disk in enumerate(world.disks):
        if disk.job == "-" and not disk.known and disk.mirror == "-" and not world.migrating:
            yield _does(named("starts a block job", world, index), put(world, index, job="foreign"))


def _takes_a_snapshot(world: World) -> Iterator[Step]:
    """An external snapshot of one disk, on top of what the guest uses now."""
    for index, disk in enumerate(world.disks):
        if disk.job == "-" and disk.live == disk.writes != "X" and disk.persistent == disk.durable == disk.live:
            changes = {"live": "X", "writes": "X", "persistent": "X", "durable": "X", "locked": False}
            after = put(world, index, below=disk.live, **changes)
            yield _does(named("takes a snapshot of his own", world, index), after)


def _takes_an_internal_snapshot(world: World) -> Iterator[Step]:
    """Inside our overlay: libvirt refuses it during a block job."""
    for index, disk in enumerate(world.disks):
        free = disk.job == "-" and not disk.known and not world.migrating
        if on(world) and free and disk.writes == disk.live == "O" and not disk.kept:
            yield _does(named("takes an internal snapshot", world, index), put(world, index, kept=True))


def _edits(world: World) -> Iterator[Step]:
    """A definition from an old file, or another image for the next start."""
    for index, disk in enumerate(world.disks):
        was_on_overlay = disk.overlay is not None and world.record.it.copy is not Copy.OPEN
        for image in ("B", "O", "Y"):
            if image == disk.persistent or disk.persistent == "-" or (image == "O" and not was_on_overlay):
                continue
            after = put(world, index, persistent=image)
            config = "saved" if all(d.persistent == d.durable for d in after.disks) else "cached"
            label = f"redefines the domain: P={image}"
            yield _does(named(label, world, index), after._replace(config=config, edited=True))


def _migrated(world: World) -> World:
    """QEMU is gone here, and writes the same images there."""
    return put_all(world, live="-")._replace(guest="away", migrating=False)


def _undefined(world: World) -> World:
    return put_all(world, persistent="-", durable="-")._replace(config="saved")


def others(disk: Disk) -> bool:
    """The disk is not, or will not be, on an image of ours, by somebody else's doing."""
    return disk.live in ("X", "Y") or disk.persistent in ("X", "Y", "-")
