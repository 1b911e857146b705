"""The published backups of a directory store: their list, their manifests, and their files."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from vmbackup.errors import PermanentError, RefusedError
from vmbackup.imaging import CopyControl
from vmbackup.imaging.copy import copy_stored, digest_file
from vmbackup.imaging.errors import errors_of
from vmbackup.paths import name_of
from vmbackup.stores import manifest as manifests
from vmbackup.stores.base import DamagedBackup, StoredBackup
from vmbackup.stores.directory.files import opened_folder, read_file
from vmbackup.stores.directory.layout import Places
from vmbackup.stores.manifest import Manifest, StoredImage


def list_backups(root: Path) -> Iterator[StoredBackup | DamagedBackup]:
    """See Store.list. A folder with the name of a backup is a backup, at least a damaged one."""
    with errors_of(root):
        namespaces = _folders(root)
    for namespace in namespaces:
        try:
            with opened_folder(root, namespace) as opened, errors_of(opened):
                for folder in _folders(opened):
                    if places := Places.of_folder(root, namespace, folder):
                        yield from _entry(opened, places)
        except PermanentError as error:
            yield DamagedBackup(str(root / namespace), str(error))


def _folders(path: Path) -> list[str]:
    """The folders in a folder, without links to folders and unfinished ones. Raises OSError."""
    with os.scandir(path) as entries:
        return sorted(each.name for each in entries if each.is_dir(follow_symlinks=False) and each.name[0] != ".")


def _entry(namespace: Path, places: Places) -> Iterator[StoredBackup | DamagedBackup]:
    """The backup, or nothing if it has been deleted meanwhile."""
    location = str(places.final)
    try:
        yield StoredBackup(location, manifest_of(replace(places, namespace=namespace)))
    except (PermanentError, RefusedError) as error:
        if os.path.lexists(namespace / places.folder):
            yield DamagedBackup(location, str(error))


def open_backup(root: Path, location: str, uid: str) -> StoredBackup:
    """See Store.open."""
    places = Places.of_location(root, location, uid)
    with opened_folder(root, places.namespace.name) as namespace:
        return StoredBackup(location, manifest_of(replace(places, namespace=namespace)))


def manifest_of(places: Places) -> Manifest:
    """The manifest of a published backup. Raises RefusedError (NotOurs) if it is that of another backup."""
    with opened_folder(places.namespace, places.folder) as final:
        path = final / manifests.FILE_NAME
        found = Manifest.from_json(read_file(path).decode(errors="replace"), name_of(path))
    if found.uid != places.key.uid:
        raise RefusedError(
            f"{name_of(places.final)} belongs to the VMBackup with the uid {found.uid}, not {places.key.uid}",
            reason="NotOurs",
        )
    return found


def read_document(root: Path, backup: StoredBackup, file: str) -> bytes:
    """See Store.read."""
    if file not in (backup.manifest.domain_xml, backup.manifest.nvram):
        raise _missing(backup, file)
    with _opened(root, backup) as folder:
        return read_file(folder / file)


def fetch_image(root: Path, backup: StoredBackup, file: str, destination: Path, control: CopyControl) -> None:
    """See Store.fetch."""
    image = _image_of(backup, file)
    with _opened(root, backup) as folder:
        _compare(folder / file, image, copy_stored(folder / file, destination, control).digest)


def verify_image(root: Path, backup: StoredBackup, file: str, control: CopyControl) -> None:
    """See Store.verify."""
    image = _image_of(backup, file)
    with _opened(root, backup) as folder:
        _compare(folder / file, image, digest_file(folder / file, control))


@contextmanager
def _opened(root: Path, backup: StoredBackup) -> Generator[Path]:
    places = Places.of_location(root, backup.location, backup.manifest.uid)
    with opened_folder(root, places.namespace.name, places.folder) as folder:
        yield folder


def _image_of(backup: StoredBackup, file: str) -> StoredImage:
    image = backup.manifest.image(file)
    if image is None:
        raise _missing(backup, file)
    return image


def _missing(backup: StoredBackup, file: str) -> PermanentError:
    return PermanentError(f"the backup {backup.location} has no file {file!r} of this kind", reason="NotFound")


def _compare(path: Path, image: StoredImage, digest: str) -> None:
    if digest != image.digest:
        raise PermanentError(
            f"{name_of(path)} is damaged: its digest is {digest}, and {image.digest} in the manifest; "
            "restore another backup",
            reason="DigestMismatch",
        )
