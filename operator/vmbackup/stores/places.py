"""Where things are in a directory store, from names that are checked before they become paths."""

from __future__ import annotations

import re
from pathlib import Path

from vmbackup.errors import RefusedError
from vmbackup.stores.base import BackupKey

_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # DNS label
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")  # DNS subdomain
_UID = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9]{0,62}[A-Za-z0-9])?")
_TARGET = re.compile(r"[A-Za-z][A-Za-z0-9]{0,31}")  # no dash: `backing-1` is never a target
_LONGEST_FILE_NAME = 255  # bytes, on every file system of Linux


class Places:
    """The paths of one backup. Raises RefusedError if a name of the key is not fit for a path."""

    def __init__(self, root: Path, key: BackupKey) -> None:
        _check("namespace", key.namespace, _NAMESPACE)
        _check("name", key.name, _NAME)
        _check("uid", key.uid, _UID)
        folder = f"{key.name}.{key.uid}"
        if len(f".{folder}.taken.json.new") > _LONGEST_FILE_NAME:
            raise RefusedError(f"the name {key.name} is too long for a folder: choose a shorter one", reason="BadName")
        self.namespace = root / key.namespace
        self.final = self.namespace / folder
        self.partial = self.namespace / f".{folder}.partial"
        self.notes = self.namespace / f".{folder}.taken.json"
        self.deleted = self.namespace / f".{folder}.deleted"

    @classmethod
    def of_location(cls, root: Path, location: str, uid: str) -> Places:
        """The paths of a published backup. Raises RefusedError if it is not a backup of this store with this uid."""
        path = Path(location)
        name = path.name.removesuffix(f".{uid}")
        if path.parent.parent != root or name == path.name:
            raise RefusedError(f"{location} is not a backup with the uid {uid} in {root}", reason="NotOurs")
        return cls(root, BackupKey(path.parent.name, name, uid))


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
