"""A store that is a directory: `<root>/<namespace>/<name>.<uid>/`, ordinary files that restore without vmbackup.

A backup is built beside its final place, in `.<name>.<uid>.partial/`, and appears by rename. The disks that were taken
are noted in `.<name>.<uid>.taken.json`, so that a restarted agent can continue.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

from vmbackup.api.identity import BackupId
from vmbackup.errors import PermanentError, RefusedError
from vmbackup.imaging import CopyControl
from vmbackup.imaging.copy import can_clone, clone_or_copy, digest_file, opened_image
from vmbackup.imaging.errors import errors_of
from vmbackup.imaging.image import info, rebase
from vmbackup.imaging.sizes import allocated_bytes, free_bytes, length
from vmbackup.paths import name_of, read_trusted
from vmbackup.stores import manifest as manifests
from vmbackup.stores.base import (
    DamagedBackup,
    DiskSource,
    GuestFacts,
    Published,
    SourceImage,
    StoredBackup,
    TakenDisk,
    TakenImage,
    Writes,
)
from vmbackup.stores.directory import notes, reading
from vmbackup.stores.directory import readme as readmes
from vmbackup.stores.directory.files import fsync_file, fsync_folder, opened_folder, write_private
from vmbackup.stores.directory.layout import Places, checked_format, checked_target
from vmbackup.stores.directory.reading import manifest_of
from vmbackup.stores.manifest import Manifest, StoredDisk, StoredImage

DOMAIN_XML = "domain.xml"
NVRAM = "nvram.fd"
NVRAM_BYTES = 64 << 20  # the largest variable stores have 4 MiB
SPARE_BYTES = 64 << 20  # for the file system's own needs, the manifest and the domain XML


class DirectoryStore:
    """Backups as folders of a file system of the node."""

    def __init__(self, root: str | Path) -> None:
        self._root = Path(root)

    def check(self, key: BackupId, sources: Sequence[DiskSource]) -> Mapping[str, Writes]:
        """See Store. Writes and removes a small file, to try whether the store is writable and can clone."""
        places = Places.of(self._root, key)
        if self.published(key):
            raise RefusedError(
                f"{places.final} already exists: create a new VMBackup, or delete that folder", reason="AlreadyStored"
            )
        try:
            for source in sources:
                _check_source(source)
            with self._opened(places, make=True) as here:
                to_copy = _bytes_to_copy({image.path for source in sources for image in source.chain}, here.namespace)
                with errors_of(self._root):
                    free, device = free_bytes(here.namespace), here.namespace.stat().st_dev
        except PermanentError as error:
            raise RefusedError(str(error), reason=error.reason) from error
        copied = sum(to_copy.values())
        needed = copied + SPARE_BYTES if copied else 0
        if needed > free:
            raise RefusedError(
                f"the store {self._root} has {free} bytes free, and the backup may need {needed}: free space there, "
                "or choose another store",
                reason="NoSpace",
            )
        return {each.target: Writes(sum(to_copy[image.path] for image in each.chain), device) for each in sources}

    def take(self, key: BackupId, source: DiskSource, control: CopyControl) -> TakenDisk:
        """See Store. A backing image that another disk of this backup brought along is not copied again."""
        checked_target(source.target)
        with self._opened(Places.of(self._root, key), make=True) as here:
            others = [disk for disk in notes.read(here.notes) if disk.target != source.target]
            with opened_folder(here.namespace, here.partial.name, make=True) as partial:
                control.check()
                notes.write(here.notes, others)
                _remove_all_but(partial, {image.file for disk in others for image in disk.images})
                disk = TakenDisk(source.target, source.virtual_bytes, _take_chain(partial, source, others, control))
                with errors_of(partial):
                    fsync_folder(partial)
            control.check()  # the caller may have given up while this hung
            notes.write(here.notes, [*others, disk])
        return disk

    def taken(self, key: BackupId) -> tuple[TakenDisk, ...]:
        """See Store."""
        places = Places.of(self._root, key)
        if not os.path.lexists(places.namespace):
            return ()
        with self._opened(places) as here:
            return notes.read(here.notes)

    def publish(self, key: BackupId, taken: Sequence[TakenDisk], facts: GuestFacts, control: CopyControl) -> Published:
        """See Store."""
        places = Places.of(self._root, key)
        with self._opened(places) as here:
            if not os.path.lexists(here.final):
                with opened_folder(here.namespace, here.partial.name) as partial:
                    complete = _with_digests(partial, here.notes, taken, control)
                    _look_at_every_image(partial, complete)
                    _describe(partial, key, complete, facts)
                    with errors_of(here.final):
                        fsync_folder(partial)
                        control.check()
                        here.partial.rename(here.final)
                        fsync_folder(here.namespace)
            found = manifest_of(here)
        self.discard(key)  # the notes, and disks that a restarted run has taken again
        return Published(str(places.final), {disk.target: disk.digest for disk in found.disks})

    def published(self, key: BackupId) -> str:
        """See Store."""
        final = Places.of(self._root, key).final
        return str(final) if os.path.lexists(final) else ""

    def discard(self, key: BackupId) -> None:
        """See Store."""
        places = Places.of(self._root, key)
        if not os.path.lexists(places.namespace):
            return
        with self._opened(places) as here:
            _remove_folder(here.partial)
            with errors_of(here.notes):
                here.notes.unlink(missing_ok=True)

    def delete(self, location: str, uid: str) -> None:
        """See Store. The folder disappears by rename, so that half a backup is never visible."""
        places = Places.of_location(self._root, location, uid)
        if not os.path.lexists(places.namespace):
            return
        with self._opened(places) as here:
            if os.path.lexists(here.final):
                manifest_of(here)
                with errors_of(here.final):
                    here.final.rename(here.deleted)
                    fsync_folder(here.namespace)
            _remove_folder(here.deleted)

    def list(self) -> Sequence[StoredBackup | DamagedBackup]:
        """See Store."""
        return tuple(reading.list_backups(self._root))

    def open(self, location: str, uid: str) -> StoredBackup:
        """See Store."""
        return reading.open_backup(self._root, location, uid)

    def read(self, backup: StoredBackup, file: str) -> bytes:
        """See Store."""
        return reading.read_document(self._root, backup, file)

    def fetch(self, backup: StoredBackup, file: str, destination: Path, control: CopyControl) -> None:
        """See Store."""
        reading.fetch_image(self._root, backup, file, destination, control)

    def verify(self, backup: StoredBackup, file: str, control: CopyControl) -> None:
        """See Store."""
        reading.verify_image(self._root, backup, file, control)

    @contextmanager
    def _opened(self, places: Places, *, make: bool = False) -> Generator[Places]:
        """The same places below the folder of the namespace, held open: its name may lead elsewhere later."""
        with opened_folder(self._root, places.namespace.name, make=make) as namespace:
            yield replace(places, namespace=namespace)


def _check_source(source: DiskSource) -> None:
    """Refuse a disk that would not restore from its own files. Raises RefusedError."""
    checked_target(source.target)
    for depth, image in enumerate(source.chain):
        is_last = depth == len(source.chain) - 1
        checked_format(image.format)
        if image.format != "qcow2":
            backing = None
        else:
            found = info(Path(image.path), image.format)
            backing = found.backing
            if found.data_file:
                raise RefusedError(
                    f"{image.path} keeps its data in another file ({found.data_file}), which is not supported: "
                    "convert it with qemu-img convert",
                    reason="ExternalDataFile",
                )
        if (backing is None) != is_last:
            raise RefusedError(
                f"{image.path} has the backing file {backing or 'none'}, but libvirt's chain of {source.target} says "
                "otherwise: correct <backingStore> in the domain's XML",
                reason="ChainMismatch",
            )


def _bytes_to_copy(paths: Iterable[str], folder: Path) -> dict[str, int]:
    """Bytes that a copy of each image needs in `folder`, 0 if it can be cloned."""
    needed: dict[str, int] = {}
    with errors_of(folder), tempfile.TemporaryFile(dir=folder) as probe:
        ours, its = os.fstat(probe.fileno()).st_uid, folder.stat().st_uid
        if its != ours:  # a share may map our user to any other, but then for files and folders alike
            raise PermanentError(
                f"{name_of(folder)} belongs to the user {its}, not to {ours}, and that user could replace "
                "the files in it: move it away; the agent makes a new one",
                reason="FolderNotOurs",
            )
        for path in sorted(paths):
            with opened_image(Path(path)) as fd:
                needed[path] = 0 if can_clone(fd, probe.fileno()) else allocated_bytes(Path(path))
    return needed


def _take_chain(
    folder: Path, source: DiskSource, others: Sequence[TakenDisk], control: CopyControl
) -> tuple[TakenImage, ...]:
    """Take the images of a chain, the template first, because each copy must name the copy of its backing file."""
    there = {(image.source, image.format): image for disk in others for image in disk.images[1:]}
    new = [image for image in source.chain[1:] if (image.path, image.format) not in there]
    total = sum(length(Path(image.path)) for image in (*new, source.chain[0]))
    done = 0
    taken: list[TakenImage] = []  # the disk first, as in TakenDisk
    for image in reversed(source.chain):
        is_disk = image is source.chain[0]
        known = None if is_disk else there.get((image.path, image.format))
        if known is None:
            file = f"{source.target}.{image.format}" if is_disk else _free_name(folder, image.format)
            known = _take_image(image, folder / file, taken[:1], control.part(done, total))
            done += known.bytes
        taken.insert(0, known)
    return tuple(taken)


def _free_name(folder: Path, image_format: str) -> str:
    return next(f"backing-{n}.{image_format}" for n in count(1) if not any(folder.glob(f"backing-{n}.*")))


def _take_image(
    image: SourceImage, destination: Path, backing: Sequence[TakenImage], control: CopyControl
) -> TakenImage:
    """Take one image, and write the name of its backing image in the folder into its header."""
    copied = clone_or_copy(Path(image.path), destination, control)
    if not backing:
        return TakenImage(destination.name, image.format, copied.bytes, copied.digest, image.path)
    rebase(destination, backing[0].file, backing[0].format)
    with errors_of(destination):
        fsync_file(destination)
        size = destination.lstat().st_size
    return TakenImage(destination.name, image.format, size, "", image.path)


def _with_digests(partial: Path, noted: Path, taken: Sequence[TakenDisk], control: CopyControl) -> list[TakenDisk]:
    """Compute the missing digests and note each, so that a restart does not compute it again."""
    missing = {image.file: image.bytes for disk in taken for image in disk.images if not image.digest}
    complete, done = list(taken), 0
    for file, size in missing.items():
        digest = digest_file(partial / file, control.part(done, sum(missing.values())))
        complete = [_with_digest(disk, file, digest) for disk in complete]
        control.check()
        notes.write(noted, complete)
        done += size
    return complete


def _look_at_every_image(partial: Path, taken: Iterable[TakenDisk]) -> None:
    """Check that every file that the manifest names is there, whole and ours: another tool may have removed it.

    Ours is what belongs to the owner of the folder: a share may map our user to any other, for files and folders alike.
    """
    with errors_of(partial):
        owner = partial.stat().st_uid
    for image in {image.file: image for disk in taken for image in disk.images}.values():
        path = partial / image.file
        with errors_of(path), suppress(FileNotFoundError):
            found = path.lstat()
            if stat.S_ISREG(found.st_mode) and found.st_uid == owner and found.st_size == image.bytes:
                continue
        raise PermanentError(
            f"{name_of(path)} is not there as it was copied, with {image.bytes} bytes: check that the store is mounted "
            "and that no other tool works in it, then create a new backup",
            reason="StoreLostFile",
        )


def _with_digest(disk: TakenDisk, file: str, digest: str) -> TakenDisk:
    images = (replace(image, digest=digest) if image.file == file else image for image in disk.images)
    return replace(disk, images=tuple(images))


def _describe(folder: Path, key: BackupId, taken: Sequence[TakenDisk], facts: GuestFacts) -> None:
    """Write domain XML, NVRAM, README and, last, the manifest."""
    write_private(folder / DOMAIN_XML, facts.domain_xml.encode())
    if facts.nvram:
        with errors_of(facts.nvram):
            write_private(folder / NVRAM, read_trusted(facts.nvram, NVRAM_BYTES))
    manifest = Manifest(
        uid=key.uid,
        namespace=key.namespace,
        name=key.name,
        domain=facts.domain,
        domain_uuid=facts.domain_uuid,
        domain_xml=DOMAIN_XML,
        nvram=NVRAM if facts.nvram else None,
        snapshot_time=datetime.fromtimestamp(facts.snapshot_time, UTC),
        disks=tuple(_stored_disk(disk) for disk in taken),
        images=tuple(
            {image.file: image for disk in taken for image in _stored_images(disk.images)[1:]}.values(),
        ),
    )
    write_private(folder / readmes.FILE_NAME, readmes.readme(manifest).encode())
    write_private(folder / manifests.FILE_NAME, manifest.to_json().encode())


def _stored_images(images: Sequence[TakenImage]) -> list[StoredImage]:
    backing = [*(image.file for image in images[1:]), None]
    return [
        StoredImage(image.file, image.format, image.bytes, image.digest, below)
        for image, below in zip(images, backing, strict=True)
    ]


def _stored_disk(disk: TakenDisk) -> StoredDisk:
    top = _stored_images(disk.images)[0]
    return StoredDisk(
        top.file, top.format, top.bytes, top.digest, top.backing, target=disk.target, virtual_bytes=disk.virtual_bytes
    )


def _remove_all_but(folder: Path, kept: set[str]) -> None:
    with errors_of(folder):
        for path in folder.iterdir():
            if path.name not in kept:
                path.unlink()


def _remove_folder(folder: Path) -> None:
    with errors_of(folder), suppress(FileNotFoundError):
        shutil.rmtree(folder)
