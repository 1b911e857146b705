"""commit.offline: the overlay of a guest that is off, merged by qemu-img under QEMU's locks, compared, and held.

The guest may be started between any two steps. What keeps it from running on images that are just merged are locks:
those of qemu-img while it merges and, after an instant with none, that of a reader on the overlay, held by the agent
until the overlay is gone. They go with the process that holds them; a qemu-img outlives a killed agent.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.model.libvirt import lagging
from tests.model.world import Disk, Step, World, named, on, put, put_all

NONE, MERGES, STRAYS, MERGED, COMPARES, HELD = "-", "merges", "strays", "merged", "compares", "held"
RUNNING = (MERGES, MERGED, COMPARES)


def locked(disk: Disk) -> bool:
    """No guest can start on the overlay."""
    return disk.merge in (MERGES, STRAYS, COMPARES, HELD)


def under_way(disk: Disk) -> bool:
    """Nothing is to be done about it now."""
    return disk.merge == MERGES or (disk.merge == MERGED and disk.writes == "-")


def begin(world: World, index: int) -> World | None:
    """qemu-img opens the images. None: they are in use."""
    disk = world.disks[index]
    if disk.writes != "-" or disk.overlay is None or locked(disk):
        return None
    return put(world, index, merge=MERGES)


def merge_steps(world: World) -> Iterator[Step]:
    """The merge in the background, block by block; then the comparison, if nobody has started the guest in between."""
    for index, disk in enumerate(world.disks):
        if disk.merge in (MERGES, STRAYS):
            lag = lagging(disk)
            if lag is not None:
                assert disk.overlay
                base = (*disk.base[:lag], disk.overlay[lag], *disk.base[lag + 1 :])
                yield Step(named(f"qemu-img merges block {lag}", world, index), put(world, index, base=base))
            else:
                merge = MERGED if disk.merge == MERGES else NONE
                yield Step(
                    named("qemu-img has merged, and releases its locks", world, index), put(world, index, merge=merge)
                )
        elif disk.merge == MERGED and disk.writes == "-":
            yield Step(named("agent holds the overlay", world, index), put(world, index, merge=COMPARES))


def same(disk: Disk) -> bool:
    """Whether base shows all that the overlay holds."""
    assert disk.overlay
    return all(o in (None, b) for o, b in zip(disk.overlay, disk.base, strict=True))


def let_go(world: World) -> World:
    """Whatever runs is ended, and guests may start again."""
    if all(disk.merge in (NONE, STRAYS) for disk in world.disks):
        return world
    return put_all(world, merge=NONE)


def left_by_a_dead_agent(world: World) -> World:
    """Its locks are gone, its qemu-img is not."""
    disks = tuple(d._replace(merge=STRAYS if d.merge in (MERGES, STRAYS) else NONE) for d in world.disks)
    return world if disks == world.disks else world._replace(disks=disks)


def may_start(world: World) -> bool:
    """QEMU gets the locks of the images that P names: base is not held while the overlay is only compared or held."""
    return not any(
        locked(disk) and (disk.persistent == "O" or disk.merge in (MERGES, STRAYS)) for disk in world.disks
    ) and not on(world)
