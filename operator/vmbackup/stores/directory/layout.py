"""The paths of a directory store. Names are checked before they become parts of a path."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from vmbackup.api.identity import BackupId
from vmbackup.errors import RefusedError

_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # DNS label
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")  # DNS subdomain
_UID = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9]{0,62}[A-Za-z0-9])?")
_TARGET = re.compile(r"[A-Za-z][A-Za-z0-9]{0,31}")  # no dash: `backing-1` is never a target
_LONGEST_FILE_NAME = 255  # bytes, on every file system of Linux


@dataclass(frozen=True)
class Places:
    """The paths of one backup, in the folder `namespace`."""

    namespace: Path
    key: BackupId

    @classmethod
    def of(cls, root: Path, key: BackupId) -> Places:
        """Those in the store `root`. Raises RefusedError (BadName) if a name of the key cannot be part of a path."""
        _check("namespace", key.namespace, _NAMESPACE)
        _check("name", key.name, _NAME)
        _check("uid", key.uid, _UID)
        places = cls(root / key.namespace, key)
        if len(f"{places.notes.name}.new") > _LONGEST_FILE_NAME:
            raise RefusedError(f"the name {key.name} is too long for a folder: choose a shorter one", reason="BadName")
        return places

    @classmethod
    def of_location(cls, root: Path, location: str, uid: str) -> Places:
        """Those of a published backup. Raises RefusedError (NotOurs) if it cannot be in this store, with this uid."""
        path = Path(location)
        places = cls.of_folder(root, path.parent.name, path.name) if path.parent.parent == root else None
        if places is None or places.key.uid != uid:
            raise RefusedError(f"{location} is not a backup with the uid {uid} in {root}", reason="NotOurs")
        return places

    @classmethod
    def of_folder(cls, root: Path, namespace: str, folder: str) -> Places | None:
        """Those of the published backup with this folder; None if no backup can have a folder of this name."""
        name, _, uid = folder.rpartition(".")
        try:
            return cls.of(root, BackupId(namespace, name, uid))
        except RefusedError:
            return None

    @property
    def folder(self) -> str:
        """The name of the published backup's folder."""
        return f"{self.key.name}.{self.key.uid}"

    @property
    def final(self) -> Path:
        """The published backup."""
        return self.namespace / self.folder

    @property
    def partial(self) -> Path:
        """The backup while it is made."""
        return self.namespace / f".{self.folder}.partial"

    @property
    def notes(self) -> Path:
        """The disks that were taken so far (notes.py)."""
        return self.namespace / f".{self.folder}.taken.json"

    @property
    def deleted(self) -> Path:
        """The backup while it is deleted."""
        return self.namespace / f".{self.folder}.deleted"


def checked_target(target: str) -> str:
    """The disk target, if it can be part of a file name. Raises RefusedError."""
    return _check("disk target", target, _TARGET)


def checked_format(image_format: str) -> str:
    """The image format, if it can be part of a file name. Raises RefusedError."""
    return _check("image format", image_format, re.compile(r"[a-z0-9]{1,16}"))


def _check(what: str, value: str, pattern: re.Pattern[str]) -> str:
    if not pattern.fullmatch(value) or ".." in value:
        raise RefusedError(f"the {what} {value!r} cannot be part of a path in a store", reason="BadName")
    return value
