"""The spec of a VMBackup and of a VMBackupStore: what the user asked for, parsed and checked.

The API server has checked all of this already by the CRD's schema and CEL rules; `vmbackup run -f` has no API server,
so parsing checks again and names the field and the cure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from vmbackup.api.quantity import parse_quantity
from vmbackup.errors import RefusedError

GROUP = "vmbackup.dev"
VERSION = "v1alpha1"
RETRY_ANNOTATION = f"{GROUP}/retry"
CANCEL_ANNOTATION = f"{GROUP}/cancel"  # "true": no copy is wanted any more
FINALIZER = f"{GROUP}/chain-home"

# What of a spec identifies the backup: it may not change once the resource exists.
IMMUTABLE_FIELDS = ("nodeName", "domain", "storeRef", "disks", "snapshot", "switchPolicy")

# The same as in crds/, rule by rule.
OBJECT_NAME = re.compile(
    r"(?=.{1,253}\Z)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
)  # RFC 1123 subdomain
_DOMAIN = re.compile(r"[^/\x00-\x1f\x7f]{1,255}")
_TARGET = re.compile(r"[a-zA-Z][a-zA-Z0-9_]{0,31}")
_MOST_DISKS = 64
_PATH = re.compile(r"(?=.{1,1024}\Z)(/(?!\.\.?(/|\Z))[^/\x00-\x1f\x7f]+)+/?")


class Quiesce(StrEnum):
    """Whether the guest's file systems are frozen for the snapshot."""

    TRY = "Try"
    REQUIRE = "Require"
    SKIP = "Skip"


class StallPolicy(StrEnum):
    """What to do when a commit does not converge before its deadline."""

    HOLD = "Hold"
    THROTTLE = "Throttle"
    PAUSE = "Pause"


class SwitchPolicy(StrEnum):
    """Whether the guest is suspended for milliseconds at each switch of images (Guarded), or never (Live)."""

    GUARDED = "Guarded"
    LIVE = "Live"


class DeletionPolicy(StrEnum):
    """What becomes of the stored data when the VMBackup is deleted."""

    RETAIN = "Retain"
    DELETE = "Delete"


@dataclass(frozen=True)
class SnapshotSpec:
    """How the snapshot is taken."""

    quiesce: Quiesce = Quiesce.TRY
    freeze_timeout_seconds: int = 10


@dataclass(frozen=True)
class CopySpec:
    """How the base is copied. `bandwidth` is bytes per second; None means unlimited."""

    bandwidth: int | None = None
    deadline_seconds: int = 14400


@dataclass(frozen=True)
class CommitSpec:
    """How the overlay is brought home. `bandwidth` is bytes per second for each disk; None means unlimited."""

    bandwidth: int | None = None
    deadline_seconds: int = 3600
    backoff_limit: int = 6
    stall_policy: StallPolicy = StallPolicy.HOLD
    stall_pause_seconds: int = 10
    offline: bool = False


@dataclass(frozen=True)
class BackupSpec:
    """The spec of a VMBackup. `disks` empty means all eligible ones."""

    node_name: str
    domain: str
    store: str
    disks: tuple[str, ...] = ()
    snapshot: SnapshotSpec = SnapshotSpec()
    copy: CopySpec = CopySpec()
    commit: CommitSpec = CommitSpec()
    switch_policy: SwitchPolicy = SwitchPolicy.GUARDED
    deletion_policy: DeletionPolicy = DeletionPolicy.RETAIN
    ttl_seconds_after_finished: int | None = None

    @classmethod
    def parse(cls, spec: Mapping[str, Any]) -> BackupSpec:
        """Parse `spec` of a VMBackup manifest. Raises RefusedError naming the field and the cure."""
        top = _Fields("spec", spec)
        snapshot = _Fields("spec.snapshot", top.group("snapshot"))
        copy = _Fields("spec.copy", top.group("copy"))
        commit = _Fields("spec.commit", top.group("commit"))
        store = _Fields("spec.storeRef", top.group("storeRef", required=True))
        parsed = cls(
            node_name=top.string("nodeName", OBJECT_NAME, "give the name of a node, as the agent's --node-name has it"),
            domain=top.string("domain", _DOMAIN, "give the name or UUID of a libvirt domain, without '/'"),
            store=store.string("name", OBJECT_NAME, "give the name of a VMBackupStore"),
            disks=tuple(top.targets("disks")),
            snapshot=SnapshotSpec(
                quiesce=snapshot.choice("quiesce", Quiesce.TRY),
                freeze_timeout_seconds=snapshot.integer("freezeTimeoutSeconds", 10, 1, 300),
            ),
            copy=CopySpec(
                bandwidth=copy.bandwidth("bandwidth"),
                deadline_seconds=copy.integer("deadlineSeconds", 14400, 1, 31536000),
            ),
            commit=CommitSpec(
                bandwidth=commit.bandwidth("bandwidth"),
                deadline_seconds=commit.integer("deadlineSeconds", 3600, 1, 31536000),
                backoff_limit=commit.integer("backoffLimit", 6, 0, 100),
                stall_policy=commit.choice("stallPolicy", StallPolicy.HOLD),
                stall_pause_seconds=commit.integer("stallPauseSeconds", 10, 1, 300),
                offline=commit.boolean("offline", False),
            ),
            switch_policy=top.choice("switchPolicy", SwitchPolicy.GUARDED),
            deletion_policy=top.choice("deletionPolicy", DeletionPolicy.RETAIN),
            ttl_seconds_after_finished=top.optional_integer("ttlSecondsAfterFinished", 0, 315360000),
        )
        for fields in (snapshot, copy, commit, store, top):
            fields.refuse_unknown()
        if parsed.commit.stall_policy is StallPolicy.PAUSE and parsed.switch_policy is SwitchPolicy.LIVE:
            raise commit.bad("stallPolicy", "give Hold or Throttle, since switchPolicy Live never suspends the guest")
        return parsed


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
        top = _Fields("spec", spec)
        directory = _Fields("spec.directory", top.group("directory", required=True))
        path = directory.string("path", _PATH, "give an absolute path below /, without '.' and '..'")
        directory.refuse_unknown()
        top.refuse_unknown()
        return cls(directory=DirectoryStoreSpec(path=path))


Choice = TypeVar("Choice", bound=StrEnum)


class _Fields:
    """A mapping of a manifest, read field by field, with errors that name the field."""

    def __init__(self, path: str, values: Any) -> None:
        if not isinstance(values, Mapping):
            raise RefusedError(f"{path} must be a mapping")
        self._path = path
        self._values: Mapping[str, Any] = values  # pyright: ignore[reportUnknownMemberType]
        self._read: set[str] = set()

    def _get(self, name: str) -> Any:
        self._read.add(name)
        return self._values.get(name)

    def bad(self, name: str, cure: str) -> RefusedError:
        """The error that names this field, its value and the cure."""
        return RefusedError(f"{self._path}.{name} is {self._values.get(name)!r}: {cure}")

    def group(self, name: str, *, required: bool = False) -> Any:
        value = self._get(name)
        if value is None and required:
            raise RefusedError(f"{self._path}.{name} is required")
        return {} if value is None else value

    def string(self, name: str, form: re.Pattern[str], cure: str) -> str:
        value = self._get(name)
        if value is None:
            raise RefusedError(f"{self._path}.{name} is required: {cure}")
        if not isinstance(value, str) or form.fullmatch(value) is None:
            raise self.bad(name, cure)
        return value

    def targets(self, name: str) -> list[str]:
        value = self._get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.bad(name, "give a list of disk targets such as [vda, vdb]")
        items: list[Any] = value  # pyright: ignore[reportUnknownVariableType]
        if not items:
            raise self.bad(name, "name at least one disk target such as vda, or leave disks out for all")
        if len(items) > _MOST_DISKS:
            raise self.bad(name, f"name at most {_MOST_DISKS} disks")
        if any(not isinstance(item, str) or _TARGET.fullmatch(item) is None for item in items):
            raise self.bad(name, "give the target of a disk such as vda, as `virsh domblklist` shows it")
        if len(set(items)) != len(items):
            raise self.bad(name, "give each disk target once")
        return items

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        value = self.optional_integer(name, low, high)
        return default if value is None else value

    def optional_integer(self, name: str, low: int, high: int) -> int | None:
        value = self._get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.bad(name, f"give a whole number from {low} to {high}")
        return value

    def boolean(self, name: str, default: bool) -> bool:
        value = self._get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.bad(name, "give true or false")
        return value

    def choice(self, name: str, default: Choice) -> Choice:
        value = self._get(name)
        if value is None:
            return default
        try:
            return type(default)(value)
        except ValueError:
            known = ", ".join(type(default))
            raise self.bad(name, f"give one of {known}") from None

    def bandwidth(self, name: str) -> int | None:
        value = self._get(name)
        if value is None:
            return None
        try:
            rate = parse_quantity(value)
        except ValueError:
            raise self.bad(name, "give bytes per second as a quantity such as 200Mi") from None
        if rate < 1024 * 1024:
            raise self.bad(name, "give at least 1Mi (bytes per second), or leave it out for no limit")
        return rate

    def refuse_unknown(self) -> None:
        unknown = sorted(set(self._values) - self._read)
        if unknown:
            raise RefusedError(
                f"{self._path} has unknown fields: {', '.join(unknown)}; remove them or correct their names"
            )
