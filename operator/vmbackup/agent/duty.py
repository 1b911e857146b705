"""Decides what an agent must do about a VMBackup. Pure: no I/O, no clock.

The first rule that applies decides. Lifecycle carries the answer out, and asks again after every change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from vmbackup.api.resource import BackupResource
from vmbackup.backoff import Backoff
from vmbackup.protocol.record import Record

PAUSES = Backoff(first=1.0, longest=60.0)  # seconds between attempts after failures of the node itself


@dataclass(frozen=True)
class NodeState:
    """The state of the backup on this node, read just now. `locked`: another process is running it."""

    record: Record | None
    locked: bool = False
    has_spec: bool = True  # the spec can be parsed, or its backup has begun and the journal has a copy


@dataclass(frozen=True)
class Local:
    """What the agent knows of a VMBackup that the API server does not show.

    `handled` is the retry that the backup ended with; None: it has not ended, as far as this agent knows.
    `deleting` is None until it is deleted and the agent knows whether its stored data is deleted too.
    `node` is None until it is read, which takes I/O: the task READ asks for it.
    """

    handled: str | None = None
    deleting: bool | None = None
    gone: bool = False
    stopped: bool = False
    failures: int = 0
    node: NodeState | None = None


class Task(StrEnum):
    """What to do next."""

    NOTHING = "nothing"
    READ = "read"  # the state on the node, then decide again
    RUN = "run"
    REFUSE = "refuse"
    ACCEPT = "accept"  # the end that its status shows
    ACKNOWLEDGE = "acknowledge"  # a change of a backup that is over, in its status
    EXPIRE = "expire"
    DELETE_DATA = "delete data"  # if that is asked for; then release
    RELEASE = "release"


@dataclass(frozen=True)
class Duty:
    """The next task and the reason for it."""

    task: Task
    why: str


@dataclass(frozen=True)
class _Case:
    seen: BackupResource
    local: Local
    now: float

    @property
    def deleting(self) -> bool:
        return self.local.deleting is not None

    @property
    def must_run(self) -> bool:
        return self.local.handled is None or self.seen.retry != self.local.handled

    @property
    def node(self) -> NodeState:
        if self.local.node is None:
            raise AssertionError("a rule below READ was asked before the state on the node was read")
        return self.local.node

    @property
    def record(self) -> Record | None:
        return self.node.record


_Rule = tuple[Callable[[_Case], bool], Task, str]

_BEFORE_READING: tuple[_Rule, ...] = (
    (lambda it: it.local.stopped, Task.NOTHING, "this process is about to end"),
    (lambda it: it.deleting and it.local.node is None, Task.READ, "it was deleted; the journal says what is left"),
)

_DELETED: tuple[_Rule, ...] = (
    (lambda it: it.record is None and it.node.locked, Task.NOTHING, "another process runs it and merges its overlays"),
    (lambda it: it.record is None or not it.node.has_spec, Task.DELETE_DATA, "nothing is left to do for its chain"),
    (
        lambda it: it.record is not None and it.record.orphan and it.seen.held_by_others,
        Task.RELEASE,
        "its orphan is recorded; another run would start a loop: run, status write, watch event, run",
    ),
    (lambda _: True, Task.RUN, "merge its overlays, or record the orphan, before it is released"),
)

_WAITING: tuple[_Rule, ...] = (
    (lambda it: not it.seen.held, Task.NOTHING, "no snapshot before the finalizer is stored"),
    (lambda it: it.seen.terminating or it.local.gone, Task.NOTHING, "it was deleted; what becomes of its data follows"),
)

_TO_RUN: tuple[_Rule, ...] = (
    (lambda it: it.local.node is None, Task.READ, "a run is due; the journal says from where"),
    (lambda it: not it.node.has_spec, Task.REFUSE, "its spec cannot be parsed, and it has not begun"),
    (
        lambda it: it.record is None and it.local.handled is None and it.seen.over,
        Task.ACCEPT,
        "another process has run it",
    ),
    (
        lambda it: it.record is None and it.local.handled is not None,
        Task.ACKNOWLEDGE,
        "it is over, and this node has no journal to retry from",
    ),
    (lambda _: True, Task.RUN, "it has not ended, or a retry was requested"),
)

_OVER: tuple[_Rule, ...] = (
    (lambda it: it.seen.stale, Task.ACKNOWLEDGE, "it was changed after its end"),
    (
        lambda it: it.seen.expires is not None and it.seen.expires <= it.now,
        Task.EXPIRE,
        "ttlSecondsAfterFinished has passed",
    ),
    (lambda _: True, Task.NOTHING, "it is over"),
)


def duty(seen: BackupResource, local: Local, now: float) -> Duty:
    """The next task for this VMBackup. `now` is seconds since the epoch."""
    case = _Case(seen, local, now)
    following = _DELETED if case.deleting else (*_WAITING, *(_TO_RUN if case.must_run else _OVER))
    return next(Duty(task, why) for applies, task, why in (*_BEFORE_READING, *following) if applies(case))


def next_look(seen: BackupResource, local: Local, now: float) -> float | None:
    """Seconds until something may be due without any change; None: never."""
    if local.failures:
        return PAUSES.after(local.failures)
    if local.deleting is not None:
        return PAUSES.first
    return None if seen.expires is None else max(PAUSES.first, seen.expires - now)
