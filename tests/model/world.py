"""The state of the model world: one guest, its disks, libvirtd, the agent.

An image is a tuple: the version that each location holds; a location of an overlay is None until it is written, and
then falls through to base. Only which version of a location is newer matters: they are kept as ranks (`ranked`). All
guest writes are taken as flushed and acknowledged. Images are named by a letter: B (base), O (our overlay), X (an
overlay that a user put on top), Y (another image, chosen by a user), - (none).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, Generic, NamedTuple, TypeVar

from vmbackup.protocol.record import Record
from vmbackup.protocol.terms import Action

T = TypeVar("T")
Versions = tuple[int | None, ...]
TICK = 16.0  # seconds, of the clock of the barrier (R4)
ENOUGH = 2  # ticks after which more of them make no difference


class Held(Generic[T]):
    """One of many equal values, the only one that is kept: so it is compared and hashed by identity."""

    __slots__ = ("it",)

    def __init__(self, it: T) -> None:
        self.it = it


class Disk(NamedTuple):
    """One disk, as QEMU, libvirt and the file system have it."""

    writes: str = "B"  # T, the image that QEMU writes
    job: str = "-"  # QEMU's block job: -, copying, ready, concluded (has pivoted, not yet dismissed), foreign
    live: str = "B"  # L
    mirror: str = "-"  # <mirror> in the live XML: -, pending, ready
    known: bool = False  # libvirt knows a job: blockJobInfo has it
    persistent: str = "B"  # P, as the API shows it
    durable: str = "B"  # P, as a power cut would leave it
    base: Versions = ()
    overlay: Versions | None = None
    locked: bool = False  # QEMU holds the overlay's lock
    acked: Versions = ()  # the newest acknowledged version of each location
    snapshot: Versions | None = None  # the content when QEMU switched; None once the copy is decided
    copied: Versions = ()
    below: str = "-"  # what X stands on
    merge: str = "-"  # with `offline`: where merging it stands, see merging.py
    unwritten: bool = False  # the overlay's file is as it was when it was found to hold nothing new
    astray: bool = False  # QEMU has another file open than the one that is base: the name led there as it opened it
    kept: bool = False  # the overlay holds a snapshot of the user


class World(NamedTuple):
    """Everything."""

    disks: tuple[Disk, ...]
    record: Held[Record]  # what the agent's journal holds
    kept: Held[Record]  # what a power cut would leave of it: not every line is fsynced
    libvirtd: bool = True  # it answers
    stopped: bool = False  # it does not, but lives (SIGSTOP), and will go on with what it was asked
    guest: str = "running"  # off, running, suspended (by us), paused (by its user), io-error, away (migrated)
    migrating: bool = False
    frozen: bool = False  # its file systems
    config: str = "saved"  # saved: P is durable; cached: written, not yet durable; unsaved: P is libvirt's word only
    full: bool = False  # the overlays' file system
    room_low: bool = False  # there
    config_full: bool = False  # the file system of libvirt's configuration
    call: tuple[Held[Action], int] | None = None  # the libvirt call in flight, and its next step
    sent: int | None = None  # with `clock`: ticks since the call was sent that has no answer in the journal
    answering: int = ENOUGH  # with `clock`: ticks for which libvirtd has been answering
    edited: bool = False  # a user has redefined the domain
    vmbackup: str = "wanted"  # wanted, cancelled, deleted (deletionTimestamp), released (the finalizer is gone)
    agent: bool = True
    stopping: bool = False  # it is the guardian of one that is dead, or told to end: it lets the guest run, no more
    plan: tuple[str, Held[Action]] | None = None  # do: decided; wait: its call is in flight; ok, error: its answer
    doubt: bool = False  # the agent does not know whether libvirt's word can be trusted
    copying: bool = False  # in the background
    deaf: bool = False  # thawing has just failed, and is not tried again yet
    config_failing: bool = False  # settling P has failed so often that the guest does not wait for it


class Kind(Enum):
    """What a step takes from the limits of the setting."""

    FREE = 0
    WRITE = 1
    FAULT = 2


class Step(NamedTuple):
    """One step: what happens, and the world after it."""

    label: str
    world: World
    kind: Kind = Kind.FREE


@dataclass(frozen=True)
class Setting:
    """What is explored."""

    disks: int = 1
    faults: int = 2
    writes: int = 2
    orphan: bool = False  # start on an overlay that an earlier backup left, recorded in that backup's journal
    live: bool = False  # switchPolicy: Live, in a world that spares it what it accepts (see environment.py)
    quiesce: bool = False
    paused: bool = False  # the guest was paused by its user before
    config_full: bool = False  # one more fault: libvirt's configuration cannot be saved, in a world as for `live`
    config_stuck: bool = False  # the same, and it stays so
    foreign: bool = False  # other block jobs on our disks, and other overlays on top of them
    edits: bool = False  # users redefine the domain
    pauses: bool = False  # users pause the guest, and resume it
    migration: bool = False
    offline: bool = False  # commit.offline
    room: bool = False  # the overlays' file system may run low before it is full
    clock: bool = False  # the barrier (R4) sees the time, not the call; and libvirtd may be stopped for a while
    cancel: bool = False  # users cancel the backup
    stall: bool = False  # stallPolicy: Pause, and every commit is late at once
    swaps: bool = False  # the name of base leads to another file, just as QEMU opens it
    snapshots: bool = False  # users take internal snapshots, and delete them again
    residual: str = ""  # which part of assumption A is lifted: resume, reboot, journal, window (see residual.py)
    limit: int | None = None  # commit.backoffLimit; None: no limit

    @property
    def spared(self) -> bool:
        """QEMU and the host do not die while P on disk does not name the image that QEMU writes."""
        return self.live or self.config_full or self.config_stuck

    def __str__(self) -> str:
        extras = [name for name in EXTRAS if getattr(self, name)]
        extras += [f"residual {self.residual}"] if self.residual else []
        extras += [] if self.limit is None else [f"limit {self.limit}"]
        sizes = {"disk": self.disks, "fault": self.faults, "write": self.writes}
        return ", ".join([*(f"{n} {what}{'s' * (n != 1)}" for what, n in sizes.items()), *extras])


EXTRAS = tuple(field.name for field in fields(Setting) if field.type == "bool")


def start(setting: Setting, record: Held[Record]) -> World:
    """The first state."""
    empty = (0, 0) if setting.disks == 1 else (0,)
    nothing: Versions = (None,) * len(empty)
    disk = Disk(base=empty, acked=empty, copied=nothing)
    if setting.orphan:
        disk = disk._replace(writes="O", live="O", persistent="O", durable="O", overlay=nothing, locked=True)
    guest = "paused" if setting.paused else "running"
    return World(disks=(disk,) * setting.disks, record=record, kept=record, guest=guest)


def without_agent(world: World) -> World:
    """Its process is gone, and with it all that it knew but for the journal."""
    return world._replace(
        agent=False, stopping=False, plan=None, doubt=False, copying=False, deaf=False, config_failing=False
    )


def put(world: World, index: int, **changes: Any) -> World:
    """The world with one disk changed."""
    disks = world.disks
    return world._replace(disks=(*disks[:index], disks[index]._replace(**changes), *disks[index + 1 :]))


def put_all(world: World, **changes: Any) -> World:
    """The world with every disk changed alike."""
    return world._replace(disks=tuple(disk._replace(**changes) for disk in world.disks))


def content(disk: Disk, image: str) -> Versions | None:
    """What a guest would read from an image; None if it cannot be opened."""
    if image == "B":
        return disk.base
    if image == "Y" or (image == "X" and (disk.below == "B" or disk.overlay is not None)):
        return disk.acked
    if disk.overlay is None:
        return None
    return tuple(b if o is None else o for o, b in zip(disk.overlay, disk.base, strict=True))


def needed(disk: Disk) -> bool:
    """The overlay holds data newer than base."""
    return disk.overlay is not None and any(
        o is not None and o > (b or 0) for o, b in zip(disk.overlay, disk.base, strict=True)
    )


def ranked(disk: Disk) -> Disk:
    """The disk with the versions of each location counted from 0 without gaps: equal worlds look equal."""
    images = (disk.base, disk.overlay, disk.acked, disk.snapshot, disk.copied)
    ranks = [
        {version: rank for rank, version in enumerate(sorted({v for v in versions if v is not None}))}
        for versions in zip(*(image for image in images if image), strict=True)
    ]

    def rank(image: Versions) -> Versions:
        return tuple(None if v is None else ranks[n][v] for n, v in enumerate(image))

    return disk._replace(
        base=rank(disk.base),
        overlay=disk.overlay and rank(disk.overlay),
        acked=rank(disk.acked),
        snapshot=disk.snapshot and rank(disk.snapshot),
        copied=rank(disk.copied),
    )


def saved(world: World) -> World:
    """The configuration has become durable."""
    return world._replace(config="saved", disks=tuple(d._replace(durable=d.persistent) for d in world.disks))


def on(world: World) -> bool:
    """QEMU runs here."""
    return world.guest not in ("off", "away")


def clean(disk: Disk, guest: str) -> bool:
    """The disk is home: on base, and nothing is left behind."""
    return (
        disk.overlay is None
        and disk.persistent == "B"
        and (guest in ("off", "away") or (disk.live == "B" and disk.writes == "B"))
    )


def named(text: str, world: World, index: int) -> str:
    """The text, with the disk's name where there are several."""
    return text if len(world.disks) == 1 else f"{text} ({'abcd'[index]})"
