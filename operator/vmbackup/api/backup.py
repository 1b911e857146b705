"""The spec of a VMBackup: what the user asked for, parsed and checked.

The API server has checked all of this already, with the CRD's schema and its CEL rules. `vmbackup run -f` has no API
server, so parsing checks again and names the field and the cure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from vmbackup.api.fields import Fields
from vmbackup.api.names import OBJECT_NAME

# What of a spec identifies the backup: it may not change once the resource exists.
IMMUTABLE_FIELDS = ("nodeName", "domain", "storeRef", "disks", "snapshot", "switchPolicy")

_DOMAIN = re.compile(r"[^/\x00-\x1f\x7f]{1,255}")  # the same as in crds/


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
        top = Fields("spec", spec)
        snapshot = Fields("spec.snapshot", top.group("snapshot"))
        copy = Fields("spec.copy", top.group("copy"))
        commit = Fields("spec.commit", top.group("commit"))
        store = Fields("spec.storeRef", top.group("storeRef", required=True))
        parsed = cls(
            node_name=top.string("nodeName", OBJECT_NAME, "must be the name of a node, like the agent's --node-name"),
            domain=top.string("domain", _DOMAIN, "must be the name or UUID of a libvirt domain, without '/'"),
            store=store.string("name", OBJECT_NAME, "must be the name of a VMBackupStore"),
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
            raise commit.bad(
                "stallPolicy", "must be Hold or Throttle, because switchPolicy Live never suspends the guest"
            )
        return parsed
