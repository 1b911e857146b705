"""Where things are in a directory store, from names that are checked before they become paths."""

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
    """The paths of one backup, whose folder is named `folder`, in the folder of its namespace."""

    namespace: Path
    folder: str

    @classmethod
    def of(cls, root: Path, key: BackupId) -> Places:
        """Those in the store `root`. Raises RefusedError if a name of the key is not fit for a path."""
        _check("namespace", key.namespace, _NAMESPACE)
        _check("name", key.name, _NAME)
        _check("uid", key.uid, _UID)
        folder = f"{key.name}.{key.uid}"
        if len(f".{folder}.taken.json.new") > _LONGEST_FILE_NAME:
            raise RefusedError(f"the name {key.name} is too long for a folder: choose a shorter one", reason="BadName")
        return cls(root / key.namespace, folder)

    @classmethod
    def of_location(cls, root: Path, location: str, uid: str) -> Places:
        """Those of a published backup. Raises RefusedError if it is not a backup of this store with this uid."""
        path = Path(location)
        name = path.name.removesuffix(f".{uid}")
        if path.parent.parent != root or name == path.name:
            raise RefusedError(f"{location} is not a backup with the uid {uid} in {root}", reason="NotOurs")
        return cls.of(root, BackupId(path.parent.name, name, uid))

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
        """What was taken of it so far."""
        return self.namespace / f".{self.folder}.taken.json"

    @property
    def deleted(self) -> Path:
        """The backup while it is deleted."""
        return self.namespace / f".{self.folder}.deleted"


def checked_target(target: str) -> str:
    """The disk target, if it is fit for a file name. Raises RefusedError."""
    return _check("disk target", target, _TARGET)


def checked_format(image_format: str) -> str:
    """The image format, if it is fit for a file name. Raises RefusedError."""
    return _check("image format", image_format, re.compile(r"[a-z0-9]{1,16}"))


def _check(what: str, value: str, pattern: re.Pattern[str]) -> str:
    if not pattern.fullmatch(value) or ".." in value:
        raise RefusedError(f"the {what} {value!r} cannot be part of a path in a store", reason="BadName")
    return value
