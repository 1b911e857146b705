"""FREEZE, THAW, SUSPEND, RESUME: suspending and freezing a guest, and the mark on its domain that says so.

Decided by take_snapshot, resume_guest, thaw and escalate (protocol/guest_on.py). The mark is written before the guest
is frozen or suspended, and removed when it runs again.
"""

from __future__ import annotations

import logging

from vmbackup.api.backup import Quiesce
from vmbackup.api.status import RetryReason
from vmbackup.errors import Cause, PermanentError, UnknownOutcomeError, VMBackupError
from vmbackup.hypervisor.mark import Mark, MarkedDisk
from vmbackup.protocol.record import Freeze, Guard
from vmbackup.protocol.terms import Action, Do
from vmbackup.protocol.transition import (
    answered,
    freeze_refused,
    pause_failed,
    suspending,
    thaw_given_up,
    with_call,
)
from vmbackup.protocol.transition import failed as call_failed
from vmbackup.reconcile.state.clock import boottime
from vmbackup.reconcile.steps.step import AT_ONCE, CallStep, Failure, Next, Run, Step, Task, try_again

_log = logging.getLogger(__name__)

_NO_AGENT = (Cause.AGENT_NOT_CONFIGURED, Cause.UNSUPPORTED)  # reasons for which nothing can ever be frozen
_SUSPEND_ATTEMPTS = 3
_THAW_ATTEMPTS = 20
_THAW_PAUSE = 3.0  # seconds
_LOST_ANSWER = "the guest agent's answer was lost"


def mark_held(run: Run, *, frozen: bool) -> None:
    """Write on the domain that this backup holds its guest, and which pivots are intended."""
    record = run.record
    disks = tuple(MarkedDisk(disk.target, disk.overlay, disk.pivot_intended) for disk in record.disks)
    mark = Mark(record.uid, frozen, disks)
    if mark != run.mark:
        _set_mark(run, mark)


def _unmark(run: Run) -> None:
    """Not frozen. A guest that is suspended by us keeps its mark."""
    if run.record.guard is not Guard.OURS:
        _set_mark(run, None)


def _set_mark(run: Run, mark: Mark | None) -> None:
    """The mark is a second copy of what the journal says: a failure to write it stops nothing."""
    try:
        run.guest.mark(mark)
        run.mark = mark
    except UnknownOutcomeError:
        raise
    except VMBackupError as error:
        _log.warning("%s", error)


# -- FREEZE


def _freeze(run: Run, task: Task) -> None:
    run.announcer.freezing()
    mark_held(run, frozen=True)
    try:
        run.guest.freeze(task.request.spec.snapshot.freeze_timeout_seconds)
    except PermanentError:  # there is no guest agent: nothing is frozen
        _unmark(run)
        raise


def _freeze_failed(run: Run, task: Task, failure: Failure) -> Next:
    """As far as is known nothing is frozen. But a guest agent that has not answered may still freeze: thaw."""
    required = task.request.spec.snapshot.quiesce is Quiesce.REQUIRE
    no_agent = failure.reason in _NO_AGENT
    record = call_failed(with_call(run.record, None), Action(Do.FREEZE), failure.why, retry_at=0.0)
    run.write(freeze_refused(record) if no_agent else record)
    if required:
        return run.fail_backup(f"spec.snapshot.quiesce is Require, but {failure.why}", "QuiesceFailed")
    run.announcer.event("NotQuiesced", f"the snapshot will be crash-consistent: {failure.why}", warning=not no_agent)
    return AT_ONCE


# -- THAW


def _thaw(run: Run, task: Task) -> None:
    try:
        run.guest.thaw(task.request.spec.snapshot.freeze_timeout_seconds)
    except PermanentError:
        _unmark(run)
        raise
    _unmark(run)


def _thaw_failed(run: Run, _task: Task, failure: Failure) -> Next:
    """Thawing is tried again, up to a limit; not if there is no guest agent."""
    record = with_call(run.record, None)
    if failure.reason in _NO_AGENT:  # nothing is frozen: a run that was killed while freezing could not know that
        run.write(answered(record, Action(Do.THAW)))
        return AT_ONCE
    run.observer.thaw_after = boottime() + _THAW_PAUSE
    if failure.count >= _THAW_ATTEMPTS:
        run.write(thaw_given_up(record))
        cure = "gave up thawing, thaw the guest by hand (virsh domfsthaw)"
        run.announcer.event("ThawFailed", f"{cure}: {failure.why}", warning=True)
    return AT_ONCE


# -- SUSPEND


def _suspend(run: Run, _task: Task) -> None:
    """For a snapshot, for the pivots that are intended, or until a commit converges."""
    mark_held(run, frozen=run.record.freeze is Freeze.FROZEN)
    run.announcer.suspending(run.record)
    run.guest.suspend()


def _suspend_failed(run: Run, task: Task, failure: Failure) -> Next:
    """After some attempts, what it was for has failed: the pivots, the pause for a commit, or the snapshot."""
    if failure.count < _SUSPEND_ATTEMPTS:
        return try_again(run, task, failure)
    run.failures.pop(Do.SUSPEND)
    why = f"the guest could not be suspended: {failure.why}"
    pivoting = [disk.target for disk in run.record.disks if disk.pivot_intended]
    for target in pivoting:
        run.commit_failed(Action(Do.PIVOT, target), why, RetryReason.PIVOT_FAILED)
    if run.record.pause_until:  # it was for a commit to converge
        run.write(pause_failed(run.record), durable=False)
    elif not pivoting:
        run.fail_backup(why, "SuspendFailed")
    return AT_ONCE


# -- RESUME


def _resume(run: Run, _task: Task) -> None:
    record = run.record
    run.guest.resume()
    run.announcer.resumed(record)
    if record.guard is Guard.OURS and not record.frozen:
        _set_mark(run, None)


FREEZE = Step(CallStep(_freeze, _freeze_failed, lost_answer=_LOST_ANSWER).perform)
THAW = Step(
    CallStep(_thaw, _thaw_failed, answered=lambda run, _task: run.announcer.thawed(), lost_answer=_LOST_ANSWER).perform,
    beside_copy=True,  # tried again every few seconds while the guest agent does not answer
)
SUSPEND = Step(
    CallStep(
        _suspend,
        _suspend_failed,
        noted=lambda run, _task: suspending(run.record, boottime()),
        answered=lambda run, _task: run.announcer.suspended(run.record),
    ).perform
)
RESUME = Step(
    CallStep(_resume, answered=lambda run, _task: run.announcer.pause_over()).perform,
    beside_copy=True,
)
