"""THROTTLE, UNTHROTTLE: slowing down a guest's writes so that a commit converges, and undoing it.

Decided by escalate (protocol/guest_on.py) and unthrottle (protocol/situation.py); the limits are computed in
protocol/convergence.py. Only the live <iotune> of the disks is changed, never the persistent XML.
"""

from __future__ import annotations

from dataclasses import replace

from vmbackup.errors import Cause, PermanentError, UnknownOutcomeError, VMBackupError
from vmbackup.hypervisor.guest import BlockJob
from vmbackup.protocol import convergence
from vmbackup.protocol.record import Throttle
from vmbackup.protocol.terms import Action, Do
from vmbackup.protocol.transition import answered, throttled
from vmbackup.reconcile.state.clock import boottime
from vmbackup.reconcile.steps.step import AT_ONCE, Next, Run, Step, Task, send

_ATTEMPTS = 5  # to undo it, after which the way home goes on without
_AGAIN = 1.0  # seconds between them


def _throttle(run: Run, task: Task) -> Next:
    job = task.view.jobs.get(task.target)
    if job is not None:  # else it has just ended
        _lower(run, task.action, job, task.request.spec.commit.deadline_seconds)
    return AT_ONCE


def _lower(run: Run, action: Action, job: BlockJob, deadline: float) -> None:
    """Lower the limit, if the present one does not let the commit converge."""
    disk = run.disk(action.target)
    now = boottime()
    known = disk.throttle or Throttle(())
    known = replace(known, next_at=now + convergence.step_seconds(deadline))
    try:
        present = run.guest.byte_limits(action.target)
    except VMBackupError as error:
        _not_lowered(run, action, known, error)
        return
    if not known.limits:
        known = replace(known, original=tuple(sorted(present.items())))
    elif not convergence.is_ours(known, present):
        run.write(throttled(run.record, action.target, replace(known, yielded=True)))
        run.announcer.limits_yielded(action.target)
        return
    remaining = job.end - job.current
    limit = convergence.next_limit(known, job.current, remaining, now - (disk.commit_started or now))
    looked = replace(known, merged=job.current, remaining=remaining)
    if limit is None:
        run.write(throttled(run.record, action.target, looked), durable=False)
        return
    run.write(throttled(run.record, action.target, replace(looked, limits=(*known.limits, limit), pending=True)))
    tune = convergence.lowered(dict(known.original), limit)
    try:
        send(run.journal, action, lambda: run.guest.limit_bytes(action.target, tune))
    except UnknownOutcomeError:
        raise
    except VMBackupError as error:
        _not_lowered(run, action, looked, error)
        return
    run.announcer.throttled(action.target, limit)


def _not_lowered(run: Run, action: Action, known: Throttle, error: VMBackupError) -> None:
    _raise_if_journal(error)
    yielded = isinstance(error, PermanentError)
    run.write(throttled(run.record, action.target, replace(known, yielded=yielded)))
    run.announcer.not_throttled(action.target, str(error))


def _unthrottle(run: Run, task: Task) -> Next:
    action = task.action
    throttle = run.disk(action.target).throttle
    try:
        if throttle and not throttle.yielded and _set_back(run, action, throttle):
            return AT_ONCE
    except UnknownOutcomeError:
        raise
    except VMBackupError as error:
        _raise_if_journal(error)
        run.failures[Do.UNTHROTTLE] += 1
        if run.failures[Do.UNTHROTTLE] < _ATTEMPTS:
            return Next.wait(_AGAIN)
        run.announcer.not_unthrottled(action.target, dict(throttle.original) if throttle else {}, str(error))
    run.failures.pop(Do.UNTHROTTLE, None)
    run.write(answered(run.record, action))
    return AT_ONCE


def _set_back(run: Run, action: Action, throttle: Throttle) -> bool:
    """Set what it was before, unless somebody else has changed it since. Whether there was something to set."""
    original, present = dict(throttle.original), run.guest.byte_limits(action.target)
    if convergence.same(present, original):
        return False
    if not convergence.is_ours(throttle, present):
        run.announcer.limits_yielded(action.target)
        return False
    send(run.journal, action, lambda: run.guest.limit_bytes(action.target, original))
    run.failures.pop(Do.UNTHROTTLE, None)
    run.announcer.unthrottled(action.target)
    return True


def _raise_if_journal(error: VMBackupError) -> None:
    if error.reason == Cause.JOURNAL_UNWRITABLE:
        raise error


THROTTLE = Step(_throttle)
UNTHROTTLE = Step(_unthrottle, beside_copy=True)  # tried again while it fails: a copy goes on
