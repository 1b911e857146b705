"""What an agent must do about a VMBackup: every rule of duty(), and when the agent looks again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vmbackup.agent.duty import Local, NodeState, Task, duty, next_look
from vmbackup.api.names import FINALIZER
from vmbackup.api.resource import BackupResource
from vmbackup.protocol.record import Record

ENDED = "2026-01-01T00:00:00Z"
AT = 1767225600.0  # the same
RETRY = {"annotations": {"vmbackup.dev/retry": "2"}}
DELETED = {"deletionTimestamp": ENDED}
OTHERS = {"finalizers": [FINALIZER, "argocd.argoproj.io/hook-finalizer"]}
JOURNAL = Record("u", "default", "web", "web", "uuid")


def seen(*, over: bool = False, generation: int = 2, ttl: int | None = None, **metadata: Any) -> BackupResource:
    ready = {"type": "Ready", "status": "True" if over else "Unknown", "reason": "Succeeded" if over else "Copying"}
    status = {"observedGeneration": 2, "conditions": [ready]} | ({"completionTime": ENDED} if over else {})
    known = {"namespace": "default", "name": "web", "uid": "u", "generation": generation, "finalizers": [FINALIZER]}
    spec = {} if ttl is None else {"ttlSecondsAfterFinished": ttl}
    return BackupResource({"metadata": known | metadata, "spec": spec, "status": status})


NEW, OVER = Local(), Local(handled="")
GOING = Local(deleting=False)


def on_node(local: Local, record: Record | None, **more: Any) -> Local:
    return replace(local, node=NodeState(record, **more))


@pytest.mark.parametrize(
    ("found", "local", "task"),
    [
        pytest.param(seen(), replace(NEW, stopped=True), Task.NOTHING, id="the process ends"),
        pytest.param(seen(**DELETED), replace(GOING, stopped=True), Task.NOTHING, id="the process ends, deleted"),
        pytest.param(seen(finalizers=[]), NEW, Task.NOTHING, id="the finalizer is not stored yet"),
        pytest.param(seen(**DELETED), NEW, Task.NOTHING, id="deleted, and what becomes of its data is not known"),
        pytest.param(seen(), replace(NEW, gone=True), Task.NOTHING, id="gone, and the same"),
        pytest.param(seen(), NEW, Task.READ, id="to run: read the journal"),
        pytest.param(seen(), on_node(NEW, None), Task.RUN, id="new"),
        pytest.param(seen(), on_node(NEW, JOURNAL), Task.RUN, id="begun"),
        pytest.param(seen(over=True), on_node(NEW, JOURNAL), Task.RUN, id="the journal knows better than the status"),
        pytest.param(seen(), on_node(NEW, None, has_spec=False), Task.REFUSE, id="its spec cannot be parsed"),
        pytest.param(seen(over=True), on_node(NEW, None), Task.ACCEPT, id="another process has run it"),
        pytest.param(seen(over=True, **RETRY), OVER, Task.READ, id="a retry: read the journal"),
        pytest.param(seen(over=True, **RETRY), on_node(OVER, JOURNAL), Task.RUN, id="a retry"),
        pytest.param(seen(over=True, **RETRY), on_node(OVER, None), Task.ACKNOWLEDGE, id="a retry without a journal"),
        pytest.param(seen(over=True, generation=3), OVER, Task.ACKNOWLEDGE, id="edited after its end"),
        pytest.param(seen(over=True, ttl=60), OVER, Task.NOTHING, id="not expired yet"),
        pytest.param(seen(over=True, ttl=10), OVER, Task.EXPIRE, id="expired"),
        pytest.param(seen(over=True), OVER, Task.NOTHING, id="over"),
        pytest.param(seen(**DELETED), GOING, Task.READ, id="deleted: read the journal"),
        pytest.param(seen(finalizers=[]), GOING, Task.READ, id="deleted, whatever is held"),
        pytest.param(seen(**DELETED), on_node(GOING, None, locked=True), Task.NOTHING, id="another process runs it"),
        pytest.param(seen(**DELETED), on_node(GOING, None), Task.DELETE_DATA, id="deleted, no journal"),
        pytest.param(
            seen(**DELETED), on_node(GOING, JOURNAL, has_spec=False), Task.DELETE_DATA, id="deleted, done, no spec"
        ),
        pytest.param(
            seen(**DELETED, **OTHERS), on_node(GOING, replace(JOURNAL, orphan=True)), Task.RELEASE, id="an orphan"
        ),
        pytest.param(
            seen(**DELETED), on_node(GOING, replace(JOURNAL, orphan=True)), Task.RUN, id="an orphan that only we hold"
        ),
        pytest.param(seen(**DELETED), on_node(GOING, JOURNAL), Task.RUN, id="deleted while it runs"),
    ],
)
def test_the_duty_of_an_agent(found: BackupResource, local: Local, task: Task) -> None:
    assert duty(found, local, AT + 20).task is task


@pytest.mark.parametrize(
    ("found", "local", "seconds"),
    [
        (seen(), NEW, None),
        (seen(), replace(NEW, failures=1), 1.0),
        (seen(), replace(GOING, failures=9), 60.0),
        (seen(**DELETED), GOING, 1.0),
        (seen(over=True, ttl=60), OVER, 40.0),
        (seen(over=True, ttl=10), OVER, 1.0),
    ],
    ids=["never", "a failure", "many failures", "deleted", "it expires later", "it has expired"],
)
def test_when_an_agent_looks_again(found: BackupResource, local: Local, seconds: float | None) -> None:
    assert next_look(found, local, AT + 20) == seconds
