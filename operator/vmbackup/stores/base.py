"""The contract of a store: what it must do, and the types in which callers speak to it.

A location is an opaque string. Only the store that gave it knows what it means; everyone else keeps it and shows it.
tests/stores/conformance.py proves the contract for each store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vmbackup.api.identity import BackupId
from vmbackup.imaging import CopyControl
from vmbackup.stores.manifest import Manifest


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
    """A backup that can be restored: its location, and the digest (`sha256:<hex>`) of each disk by target."""

    location: str
    digests: Mapping[str, str]


@dataclass(frozen=True)
class Writes:
    """The amount that taking a disk writes: `bytes` that have to be copied, 0 where all is cloned.

    `device`: the file system of this node (st_dev) that takes them; None if they leave the node.
    """

    bytes: int
    device: int | None = None


@dataclass(frozen=True)
class StoredBackup:
    """A published backup whose manifest is readable. Nothing is said about the content of its images."""

    location: str
    manifest: Manifest


@dataclass(frozen=True)
class DamagedBackup:
    """Something at the place of a published backup that cannot be restored. `problem` is for people."""

    location: str
    problem: str


class Store(Protocol):
    """Where backups are kept. One call at a time for each key; different keys at will, from any threads.

    All raise the errors of vmbackup.errors, and Cancelled where a control is given.
    """

    def check(self, key: BackupId, sources: Sequence[DiskSource]) -> Mapping[str, Writes]:
        """What `take` of each disk would write, more rather than less, by target.

        Refuses (RefusedError, with a reason) what cannot succeed: not writable, no space, stored already.
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
        """The location of the backup, also if the run that published it died at once; '' if it is not there."""
        ...

    def discard(self, key: BackupId) -> None:
        """Forget what was taken and not published. May be repeated."""
        ...

    def delete(self, location: str, uid: str) -> None:
        """Delete a published backup, if it is in this store and has this `uid`. May be repeated."""
        ...

    def list(self) -> Sequence[StoredBackup | DamagedBackup]:
        """All published backups, in any order. Reads manifests and no image.

        A damaged backup is an entry of the list, and does not hide the others. Other files are left out. Raises
        where the store itself cannot be read: an empty list says that the store is there and has no backup.
        """
        ...

    def open(self, location: str, uid: str) -> StoredBackup:
        """One published backup, if it is in this store and has this `uid`.

        Raises RefusedError (NotOurs) if not, PermanentError if it is gone (NotFound) or damaged (BadManifest).
        """
        ...

    def read(self, backup: StoredBackup, file: str) -> bytes:
        """The domain XML or the UEFI variables of a backup. Raises PermanentError (NotFound) for any other file."""
        ...

    def fetch(self, backup: StoredBackup, file: str, destination: Path, control: CopyControl) -> None:
        """Copy one image of a backup to a new sparse file of this node, durable but for its directory entry.

        It is the image as it is stored: one with a backing image names that by its name in the manifest. Raises
        PermanentError if the backup has no such image (NotFound), or as `verify` does. After an error the destination
        is worthless.
        """
        ...

    def verify(self, backup: StoredBackup, file: str, control: CopyControl) -> None:
        """Read one image of a backup back. Raises PermanentError (DigestMismatch) if it is not as the manifest says."""
        ...
