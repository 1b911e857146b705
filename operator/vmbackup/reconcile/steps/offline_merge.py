"""MERGE_OFFLINE, COMPARE: the overlay of a guest that is off, merged into its base or compared with it.

Decided by merge_offline, off_on_overlay and off_with_overlay_left (protocol/guest_off.py).
"""

from __future__ import annotations

from vmbackup.api.status import RetryReason
from vmbackup.errors import TransientError, VMBackupError
from vmbackup.protocol.terms import Action
from vmbackup.protocol.transition import attempted, compared, merged_offline
from vmbackup.reconcile.state.clock import boottime
from vmbackup.reconcile.steps.step import AT_ONCE, Next, Run, Step, Task

_POLL = 1.0  # seconds


def _merge_offline(run: Run, task: Task) -> Next:
    """Start merging, or see how far it is."""
    if not run.merging.target:
        run.write(attempted(run.record, task.target, boottime()))
    target = run.merging.target or task.target
    try:
        stamp = run.merging.merge(run.disk(target), task.request.spec.commit.bandwidth)
    except VMBackupError as error:
        reason = RetryReason.BUSY if isinstance(error, TransientError) else RetryReason.JOB_FAILED
        return run.commit_failed(Action(task.action.do, target), str(error), reason)
    if stamp is None:
        return Next.wait(_POLL)
    run.write(merged_offline(run.record, target, stamp))
    return AT_ONCE


def _compare(run: Run, task: Task) -> Next:
    """Start comparing, or see how far it is."""
    stamp = run.merging.compare(run.disk(task.target), task.action)
    if stamp is None:
        return Next.wait(_POLL)
    run.write(compared(run.record, task.action, stamp))
    return AT_ONCE


MERGE_OFFLINE = Step(_merge_offline, keeps_merged=True)
COMPARE = Step(_compare, keeps_comparison=True)
