"""The part of the world that the agent can observe; T is visible only where it has asked QEMU (R3)."""

from __future__ import annotations

from typing import NamedTuple

from tests.model import merging
from tests.model.libvirt import lagging
from tests.model.world import Disk, World, on
from vmbackup.protocol.record import Image, Record
from vmbackup.protocol.terms import DiskSeen, Mirror, Observation, OverlayFile, Power

IMAGE = {"B": Image.BASE, "O": Image.OVERLAY, "X": Image.OTHER, "Y": Image.OTHER}
POWER = {
    "off": Power.OFF,
    "away": Power.OFF,
    "running": Power.RUNNING,
    "suspended": Power.PAUSED,
    "paused": Power.PAUSED,
    "io-error": Power.IO_ERROR,
}
MIRROR = {"-": Mirror.NONE, "pending": Mirror.PENDING, "ready": Mirror.READY}


class DiskView(NamedTuple):
    """One disk."""

    live: str
    persistent: str
    file: str  # -, locked (and so not looked into), data, empty
    unwritten: bool
    held: bool
    mirror: str
    known: bool
    at_end: bool
    foreign: bool
    writes: str  # seen only when QEMU is asked
    astray: bool
    kept: bool


class View(NamedTuple):
    """The world as the agent sees it; hashable, so that a decision can be cached by it."""

    guest: str
    in_flight: bool
    deaf: bool
    config_failing: bool
    room_low: bool
    migrating: bool
    disks: tuple[DiskView, ...]


def look(world: World, *, in_flight: bool) -> View:
    """Observe the world as it is now."""
    disks = tuple([_look(disk, world) for disk in world.disks])
    return View(world.guest, in_flight, world.deaf, world.config_failing, world.room_low, world.migrating, disks)


def _look(disk: Disk, world: World) -> DiskView:
    reads_itself = world.copying and disk.writes == "O" and disk.job == "-"  # its own lock is on base: nothing is told
    at_end = disk.known and disk.job in ("copying", "ready") and disk.writes == "O" and lagging(disk) is None
    return DiskView(
        disk.live,
        disk.persistent,
        _file(disk),
        disk.unwritten,
        disk.merge == merging.HELD,
        disk.mirror,
        disk.known,
        at_end,
        disk.job == "foreign",
        disk.writes,
        disk.astray and not reads_itself and on(world),
        disk.kept,
    )


def _file(disk: Disk) -> str:
    if disk.overlay is None:
        return "-"
    if disk.locked or disk.merge == merging.STRAYS:
        return "locked"
    return "data" if disk.overlay.count(None) < len(disk.overlay) else "empty"


def observation(record: Record, view: View, *, truth: bool, late: bool) -> Observation:
    """What decide() gets; `late`: every commit that is not READY is past its deadline."""
    disks = tuple(
        DiskSeen(
            target="abcd"[n],
            live=IMAGE.get(disk.live),
            persistent=IMAGE.get(disk.persistent),
            overlay=_overlay_file(record, n, disk),
            mirror=MIRROR[disk.mirror],
            job=disk.known,
            job_at_end=disk.at_end,
            overdue=late and disk.known and disk.mirror != "ready",
            foreign_job=disk.foreign,
            written=IMAGE.get(disk.writes) if truth else None,
            astray=disk.astray and disk.live in ("B", "O"),
        )
        for n, disk in enumerate(view.disks)
    )
    return Observation(
        POWER[view.guest],
        disks,
        call_in_flight=view.in_flight,
        migrating=view.migrating,
        config_failing=view.config_failing,
        room_low="low" if view.room_low else "",
        thaw_after=1.0 if view.deaf else 0.0,
    )


def _overlay_file(record: Record, n: int, disk: DiskView) -> OverlayFile | None:
    if disk.file == "-":
        return None
    merged = disk.unwritten and bool(record.disks[n].merged)
    return OverlayFile(
        locked=disk.file == "locked",
        empty=disk.file == "empty" and not disk.kept,
        merged=merged,
        held=disk.held,
        holds_snapshot=disk.kept,
    )
