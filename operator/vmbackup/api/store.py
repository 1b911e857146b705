"""The spec of a VMBackupStore: where backups are kept, parsed and checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vmbackup.api.fields import Fields

_PATH = re.compile(r"(?=.{1,1024}\Z)(/(?!\.\.?(/|\Z))[^/\x00-\x1f\x7f]+)+/?")  # the same as in crds/


@dataclass(frozen=True)
class DirectoryStoreSpec:
    """A store that is a directory of the node."""

    path: str


@dataclass(frozen=True)
class StoreSpec:
    """The spec of a VMBackupStore: exactly one kind of store."""

    directory: DirectoryStoreSpec

    @classmethod
    def parse(cls, spec: Mapping[str, Any]) -> StoreSpec:
        """Parse `spec` of a VMBackupStore manifest. Raises RefusedError naming the field and the cure."""
        top = Fields("spec", spec)
        directory = Fields("spec.directory", top.group("directory", required=True))
        path = directory.string("path", _PATH, "must be an absolute path below /, without '.' and '..'")
        directory.refuse_unknown()
        top.refuse_unknown()
        return cls(directory=DirectoryStoreSpec(path=path))
