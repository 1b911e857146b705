"""What every store can do, and the terms it is spoken to in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vmbackup.api.identity import BackupId
from vmbackup.imaging import CopyControl


@dataclass(frozen=True)
class SourceImage:
    """One image file or block device, as QEMU uses it."""

    path: str
    format: str


@dataclass(frozen=True)
class DiskSource:
    """The frozen content of one disk: `chain[0]` is its base, then come its backing images, the template last."""

    target: str
    chain: tuple[SourceImage, ...]
    virtual_bytes: int


@dataclass(frozen=True)
class TakenImage:
    """One image in the store. `bytes` is its length; `digest` (`sha256:<hex>`) is empty until it is known."""

    file: str
    format: str
    bytes: int
    digest: str
    source: str  # the path it was taken from


@dataclass(frozen=True)
class TakenDisk:
    """One disk in the store: `images[0]` is the disk, each image's backing image is the next one."""

    target: str
    virtual_bytes: int
    images: tuple[TakenImage, ...]


@dataclass(frozen=True)
class GuestFacts:
    """What a restore needs besides the disks. `snapshot_time` is seconds since the epoch, UTC."""

    domain: str
    domain_uuid: str
    domain_xml: str
    nvram: Path | None
    snapshot_time: float


@dataclass(frozen=True)
class Published:
    """A backup that can be restored: where it is, and the digest (`sha256:<hex>`) of each disk by target."""

    location: str
    digests: Mapping[str, str]


@dataclass(frozen=True)
class Writes:
    """What taking a disk writes: `bytes` that have to be copied, 0 where all is cloned.

    `device`: the file system (st_dev) of this node on which they go; None if they go elsewhere.
    """

    bytes: int
    device: int | None = None


class Store(Protocol):
    """Where backups are kept. One call at a time for each key; different keys at will, from any threads.

    All raise the errors of vmbackup.errors, and Cancelled where a control is given.
    """

    def check(self, key: BackupId, sources: Sequence[DiskSource]) -> Mapping[str, Writes]:
        """What `take` of each disk would write, more rather than less, by target.

        Refuses (RefusedError, with a reason) what cannot go well: not writable, no room, stored already.
        """
        ...

    def take(self, key: BackupId, source: DiskSource, control: CopyControl) -> TakenDisk:
        """Make one disk's frozen content independent of its chain, and durable, but not visible yet.

        Where the file system can clone it takes milliseconds and the digests stay empty; else it is a copy. A second
        take of a disk starts that disk over.
        """
        ...

    def taken(self, key: BackupId) -> tuple[TakenDisk, ...]:
        """The disks that were taken and are not published yet, after a restart too."""
        ...

    def publish(self, key: BackupId, taken: Sequence[TakenDisk], facts: GuestFacts, control: CopyControl) -> Published:
        """Complete the backup (missing digests, domain XML, manifest) and make it visible in one step.

        A second publish, after a crash too, returns the same again.
        """
        ...

    def published(self, key: BackupId) -> str:
        """Where the backup is, perhaps by a run that was killed before it could note that; '' if it is not there."""
        ...

    def discard(self, key: BackupId) -> None:
        """Forget what was taken and not published. May be repeated."""
        ...

    def delete(self, location: str, uid: str) -> None:
        """Delete a published backup, if it is in this store and is that of `uid`. May be repeated."""
        ...
