"""The record of one backup, as its journal holds it. Pure: no I/O.

Only what libvirt and the disks cannot show is in here (the chain is the truth, see docs/concepts.md), and what status
needs after a restart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from vmbackup.api.identity import BackupId


class Image(StrEnum):
    """Which of the images of a disk is meant."""

    BASE = "base"
    OVERLAY = "overlay"
    OTHER = "other"  # neither: somebody else has set it


class Snapshot(StrEnum):
    """Where this backup's snapshot stands."""

    NONE = "none"
    ADOPTED = "adopted"  # an overlay that is not this backup's own goes home first
    INTENDED = "intended"  # the snapshot may be taken at any moment
    DONE = "done"


class Guard(StrEnum):
    """Who suspended the guest for a switch of images."""

    NONE = "none"
    OURS = "ours"  # by us: we resume it
    FOUND_PAUSED = "found-paused"  # it was paused already: we never resume it


class Freeze(StrEnum):
    """Whether the guest's file systems are frozen by us."""

    NONE = "none"
    TRIED = "tried"  # not frozen: the guest agent refused, or has thawed again
    FROZEN = "frozen"  # frozen, or a freeze may have been carried out
    THAW_DUE = "thaw-due"  # frozen by a run that is gone, or no longer needed


class Copy(StrEnum):
    """Where the content of the snapshot stands."""

    OPEN = "open"
    TAKEN = "taken"  # all of it is safe in the store's file system, outside the chain
    STORED = "stored"  # published in the store, with digests
    FAILED = "failed"


@dataclass(frozen=True)
class Settled:
    """The persistent XML was redefined to name `image`, and is durable on disk if `durable`."""

    image: Image
    durable: bool


@dataclass(frozen=True)
class Call:
    """A mutating libvirt call that was begun, and whose answer is not known (PROTOCOL R4)."""

    name: str
    boot_id: str
    boottime: float  # CLOCK_BOOTTIME, seconds


@dataclass(frozen=True)
class Throttle:
    """How we slow down the guest's writes to one disk, so that its commit converges (vmbackup.protocol.convergence)."""

    original: tuple[tuple[str, int], ...]  # of its live <iotune>: what limits bytes, as it was found, without zeros
    limits: tuple[int, ...] = ()  # bytes per second, one after the other as we set them
    pending: bool = False  # whether the last of them was really set is not known
    merged: int = 0  # bytes that the job had merged when we last looked whether it converges
    remaining: int = 0  # bytes that it had still to merge then
    next_at: float = 0.0  # CLOCK_BOOTTIME, seconds: when to look again
    yielded: bool = False  # somebody else has changed it since, or it cannot be set: it is left as it is


@dataclass(frozen=True)
class DiskRecord:
    """One disk."""

    target: str
    base: str = ""
    overlay: str = ""
    owner: str = ""  # whose overlay it is, where another backup left it
    format: str = ""
    virtual_bytes: int = 0
    base_inode: int = 0  # of the file that base is, and how long that is at least; 0: not known, or no file
    base_bytes: int = 0
    base_locked: bool = (
        False  # QEMU's locks on base were seen at admission: from then on a missing lock means something
    )
    room: int = 0  # bytes that were free for overlays on the overlay's file system when this was planned
    backing: tuple[tuple[str, str], ...] = ()  # path and format of the images below base, the template last
    persistent_disk_xml: str = ""  # the <disk> of the persistent XML while on base, to go back to
    commit_begun: bool = False  # ever: from here on base is no longer the point in time
    commit_running: bool = False  # an attempt whose end was not seen yet
    commit_started: float | None = None  # CLOCK_BOOTTIME, seconds
    commit_seconds: float | None = None
    pause_used: bool = False  # the guest was suspended already to let this attempt converge
    throttle: Throttle | None = None
    pivot_intended: bool = False
    merged: str = ""  # while off, and compared: the stamp of the overlay, which says that it was not written since
    settled: Settled | None = None
    attempts: int = 0
    failures: int = 0  # those since the last request to try again
    retry_at: float = 0.0  # CLOCK_BOOTTIME, seconds
    last_error: str = ""
    file: str = ""  # in the store
    digest: str = ""
    copied_bytes: int = 0
    total_bytes: int = 0
    merged_bytes: int = 0


@dataclass(frozen=True)
class Record:
    """One backup of one domain. `disks` holds the disks that are backed up, by target, in the domain's order.

    Times in CLOCK_BOOTTIME belong to the boot `boot_id` (transition.of_this_boot).
    """

    uid: str
    namespace: str
    name: str
    domain: str = ""
    domain_uuid: str = ""
    spec: Mapping[str, Any] = field(default_factory=dict[str, Any])  # of the VMBackup; empty for `vmbackup run`
    store: Mapping[str, Any] = field(default_factory=dict[str, Any])  # of the VMBackupStore; as `spec`
    disks: tuple[DiskRecord, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()  # target, why it is left out
    snapshot: Snapshot = Snapshot.NONE
    replan: bool = False  # an earlier run intended the snapshot: if it is not there, the domain may have changed since
    guard: Guard = Guard.NONE
    pause_until: float = 0.0  # CLOCK_BOOTTIME, seconds: how long it may stay suspended for a commit; 0: it may not
    freeze: Freeze = Freeze.NONE
    io_error: bool = False  # the guest was paused by an I/O error while on its overlay: we resume it, once
    copy: Copy = Copy.OPEN
    copy_error: str = ""
    copy_reason: str = ""
    quarantined: str = ""  # why, and what a human should do; empty: not quarantined
    orphan: bool = False
    gave_up: bool = False
    finished: bool = False
    call: Call | None = None
    started: float | None = None  # seconds since the epoch
    completed: float | None = None
    snapshot_time: float | None = None
    snapshot_at: float | None = None  # the same in CLOCK_BOOTTIME, seconds
    suspended_at: float | None = None  # when we last suspended the guest; CLOCK_BOOTTIME, seconds
    boot_id: str = ""
    quiesced: bool | None = None
    location: str = ""
    domain_xml: str = ""
    nvram: str = ""
    handled_retry: str = ""

    @property
    def identity(self) -> BackupId:
        """The VMBackup that it is the record of."""
        return BackupId(self.namespace, self.name, self.uid)

    @property
    def full_name(self) -> str:
        """Namespace and name, for people."""
        return f"{self.namespace}/{self.name}"

    @property
    def frozen(self) -> bool:
        """The guest's file systems may be frozen by us."""
        return self.freeze in (Freeze.FROZEN, Freeze.THAW_DUE)

    @property
    def holds_guest(self) -> bool:
        """The guest may be suspended or frozen by us: whatever else happens, it is to run again."""
        return self.guard is Guard.OURS or self.frozen

    @property
    def left_behind(self) -> bool:
        """It ended, or waits, without its chain being home."""
        return self.gave_up or self.orphan or bool(self.quarantined)

    @property
    def done(self) -> bool:
        """Nothing is left to do for its chain."""
        return self.finished and not self.left_behind and not self.holds_guest

    @property
    def begun(self) -> bool:
        """Its guest may be on an overlay."""
        return self.snapshot is not Snapshot.NONE and not self.done

    @property
    def throttles_guest(self) -> bool:
        """The guest's writes to one of the disks may be slowed down by us."""
        return any(disk.throttle is not None for disk in self.disks)

    def disk(self, target: str) -> DiskRecord:
        """The record of one disk. Raises KeyError."""
        for disk in self.disks:
            if disk.target == target:
                return disk
        raise KeyError(target)

    def with_disk(self, target: str, **changes: Any) -> Record:
        """This record with one disk changed."""
        return replace(self, disks=tuple(replace(d, **changes) if d.target == target else d for d in self.disks))

    def with_every_disk(self, **changes: Any) -> Record:
        """This record with every disk changed alike."""
        return replace(self, disks=tuple(replace(disk, **changes) for disk in self.disks))
