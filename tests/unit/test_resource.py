"""A VMBackup as the API server shows it."""

from __future__ import annotations

from typing import Any

import pytest

from vmbackup.api.resource import BackupResource

ENDED = "2026-01-01T00:00:00Z"
NEW = {"observedGeneration": -1, "conditions": [{"type": "Ready", "status": "Unknown", "reason": "Pending"}]}


def seen(status: dict[str, Any], *, annotations: dict[str, str] | None = None, **spec: Any) -> BackupResource:
    metadata = {"namespace": "default", "name": "web", "uid": "u", "generation": 2, "annotations": annotations or {}}
    return BackupResource({"metadata": metadata, "spec": spec, "status": status})


def over(ready: str = "True", reason: str = "Succeeded", chain: str = "True", **fields: Any) -> dict[str, Any]:
    """The status of a backup that has ended."""
    conditions = [
        {"type": "Ready", "status": ready, "reason": reason},
        {"type": "ChainClean", "status": chain, "reason": "ChainHome"},
    ]
    return {"observedGeneration": 2, "completionTime": ENDED, "conditions": conditions, **fields}


RETRY = {"vmbackup.dev/retry": "2"}


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        pytest.param(seen({}), True, id="without any status"),
        pytest.param(seen(NEW), True, id="as the CRD makes it"),
        pytest.param(seen(over("Unknown", "Copying", "False")), True, id="running"),
        pytest.param(seen(over()), False, id="succeeded"),
        pytest.param(seen(over("False", "StoreNotFound")), False, id="refused"),
        pytest.param(seen(over("False", "CopyFailed")), False, id="failed, and home"),
        pytest.param(seen(over("False", "CommitLimitReached", "False")), True, id="on its overlay"),
        pytest.param(seen(over("False", "Quarantined", "False")), True, id="quarantined"),
        pytest.param(seen(over(), annotations=RETRY), True, id="asked to try again"),
        pytest.param(seen(over(lastHandledRetry="2"), annotations=RETRY), False, id="that was acted on"),
        pytest.param(seen(over(lastHandledRetry="2")), False, id="the annotation was taken away"),
        pytest.param(seen(over(observedGeneration=1)), True, id="edited after its end"),
        pytest.param(seen(over(), ttlSecondsAfterFinished=60), True, id="to be deleted later"),
        pytest.param(seen(over(location="/s"), deletionPolicy="Delete"), True, id="its data goes with it"),
        pytest.param(seen(over(), deletionPolicy="Delete"), False, id="it has no data"),
        pytest.param(seen(over(location="/s"), deletionPolicy="Retain"), False, id="its data stays"),
    ],
)
def test_a_backup_is_wanted_as_long_as_there_is_something_left_to_do(found: BackupResource, wanted: bool) -> None:
    assert found.wanted is wanted


@pytest.mark.parametrize(
    ("status", "expires"),
    [
        (over(), 1767225660.0),
        (over("Unknown", "Shipping"), None),
        (over("False", "CommitLimitReached", "False"), None),
    ],
    ids=["succeeded", "running", "on its overlay"],
)
def test_it_expires_after_its_end_but_never_while_its_guest_is_on_an_overlay(
    status: dict[str, Any], expires: float | None
) -> None:
    assert seen(status, ttlSecondsAfterFinished=60).expires == expires
    assert seen(status).expires is None
