"""Parsing a manifest without an API server refuses and takes what the API server does (tests/cluster/test_crds.py)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.manifests import (
    INVALID_BACKUPS,
    INVALID_STORES,
    LIVE_PAUSE,
    VALID_BACKUPS,
    VALID_PATHS,
    Invalid,
    backup_spec,
)
from vmbackup.api.backup import (
    BackupSpec,
    CommitSpec,
    CopySpec,
    DeletionPolicy,
    Quiesce,
    SnapshotSpec,
    StallPolicy,
    SwitchPolicy,
)
from vmbackup.api.store import StoreSpec
from vmbackup.errors import RefusedError


@pytest.mark.parametrize("invalid", INVALID_BACKUPS, ids=str)
def test_an_invalid_backup_is_refused_with_its_field_and_cure(invalid: Invalid) -> None:
    path = invalid.field.removeprefix("spec.")
    with pytest.raises(RefusedError) as refusal:
        BackupSpec.parse(backup_spec(**{path: invalid.value}))
    field = path.split(".")[-1]
    assert field in str(refusal.value)
    assert invalid.cure in str(refusal.value)


@pytest.mark.parametrize("invalid", INVALID_STORES, ids=str)
def test_an_invalid_store_is_refused_with_its_field_and_cure(invalid: Invalid) -> None:
    with pytest.raises(RefusedError) as refusal:
        StoreSpec.parse(invalid.value)
    assert "spec.directory" in str(refusal.value)
    assert invalid.cure in str(refusal.value)


@pytest.mark.parametrize("changes", VALID_BACKUPS, ids=lambda changes: ",".join(changes) or "as is")
def test_a_valid_backup_is_taken(changes: dict[str, Any]) -> None:
    assert BackupSpec.parse(backup_spec(**changes)).node_name


@pytest.mark.parametrize("path", VALID_PATHS)
def test_a_valid_store_is_taken(path: str) -> None:
    assert StoreSpec.parse({"directory": {"path": path}}).directory.path == path


def test_what_is_left_out_has_the_defaults_of_the_api() -> None:
    parsed = BackupSpec.parse(backup_spec())
    assert parsed == BackupSpec(
        node_name="node-a",
        domain="web-01",
        store="local",
        disks=(),
        snapshot=SnapshotSpec(Quiesce.TRY, freeze_timeout_seconds=10),
        copy=CopySpec(bandwidth=None, deadline_seconds=14400),
        commit=CommitSpec(None, 3600, backoff_limit=6, stall_policy=StallPolicy.HOLD, offline=False),
        switch_policy=SwitchPolicy.GUARDED,
        deletion_policy=DeletionPolicy.RETAIN,
        ttl_seconds_after_finished=None,
    )


def test_a_guest_that_is_never_suspended_is_not_paused_for_a_commit_either() -> None:
    cure = "must be Hold or Throttle, because switchPolicy Live never suspends the guest"
    with pytest.raises(RefusedError, match=f"spec.commit.stallPolicy is 'Pause': {cure}"):
        BackupSpec.parse(backup_spec(**LIVE_PAUSE))


def test_every_field_is_read() -> None:
    parsed = BackupSpec.parse(
        backup_spec(
            disks=["vda", "vdb"],
            snapshot={"quiesce": "Skip", "freezeTimeoutSeconds": 3},
            copy={"bandwidth": "200Mi", "deadlineSeconds": 5},
            commit={
                "bandwidth": 100 << 20,
                "deadlineSeconds": 7,
                "backoffLimit": 2,
                "stallPolicy": "Throttle",
                "stallPauseSeconds": 20,
                "offline": True,
            },
            switchPolicy="Live",
            deletionPolicy="Delete",
            ttlSecondsAfterFinished=9,
        )
    )
    assert parsed == BackupSpec(
        node_name="node-a",
        domain="web-01",
        store="local",
        disks=("vda", "vdb"),
        snapshot=SnapshotSpec(Quiesce.SKIP, 3),
        copy=CopySpec(200 << 20, 5),
        commit=CommitSpec(100 << 20, 7, 2, StallPolicy.THROTTLE, 20, offline=True),
        switch_policy=SwitchPolicy.LIVE,
        deletion_policy=DeletionPolicy.DELETE,
        ttl_seconds_after_finished=9,
    )
