"""COMMIT, PIVOT, RECORD_FAILURE, REMOVE_OVERLAY: the way home of a disk, from its overlay to its base.

Decided by commit_and_pivot and remove_overlay (protocol/guest_on.py) and off_with_overlay_left (protocol/guest_off.py).
"""

from __future__ import annotations

from pathlib import Path

from vmbackup.api.status import RetryReason
from vmbackup.errors import Cause
from vmbackup.imaging.errors import errors_of
from vmbackup.protocol.record import Guard, Record
from vmbackup.protocol.transition import attempted, overlay_removed
from vmbackup.reconcile.state.clock import boottime
from vmbackup.reconcile.state.journal import sync_directory
from vmbackup.reconcile.steps.definition import config_failed, no_longer_on_base
from vmbackup.reconcile.steps.guest_hold import mark_held
from vmbackup.reconcile.steps.step import AT_ONCE, CallStep, Failure, Next, Run, Step, Task


def _attempt(run: Run, task: Task) -> Record:
    return attempted(run.record, task.target, boottime())


def _commit(run: Run, task: Task) -> None:
    run.guest.commit(task.target, run.disk(task.target).base, bandwidth=task.request.spec.commit.bandwidth)


def _commit_refused(run: Run, task: Task, failure: Failure) -> Next:
    busy = failure.reason in (Cause.BUSY, Cause.BLOCK_JOB_ACTIVE)
    return run.commit_failed(task.action, failure.why, RetryReason.BUSY if busy else RetryReason.JOB_FAILED)


def _pivot(run: Run, task: Task) -> None:
    """Switch a disk back. A guest that was suspended before this pivot was intended is marked with it now."""
    if run.record.guard is Guard.OURS:
        mark_held(run, frozen=False)
    run.guest.pivot(task.target)


def _pivot_failed(run: Run, task: Task, failure: Failure) -> Next:
    return run.commit_failed(task.action, failure.why, RetryReason.PIVOT_FAILED)


def _outcome_unknown(run: Run, _task: Task) -> None:
    run.announcer.retried(RetryReason.UNKNOWN)


def _record_failure(run: Run, task: Task) -> Next:
    return run.commit_failed(task.action, task.action.reason, RetryReason.JOB_FAILED)


def _remove_overlay(run: Run, task: Task) -> Next:
    if (why := no_longer_on_base(run, task.target, task.view.seen)) is not None:
        return config_failed(run, why)
    disk = run.disk(task.target)
    overlay = Path(disk.overlay)
    merged = run.announcer.merged(task.target, overlay)
    with errors_of(overlay):
        overlay.unlink(missing_ok=True)
        sync_directory(overlay.parent)  # otherwise it could reappear after a power cut and look like a leftover
    seconds = None if disk.commit_started is None else boottime() - disk.commit_started
    run.write(overlay_removed(run.record, task.target, seconds=seconds, merged_bytes=merged))
    run.announcer.disk_home(run.record, task.target)
    return AT_ONCE


COMMIT = Step(CallStep(_commit, _commit_refused, noted=_attempt, unknown=_outcome_unknown).perform)
PIVOT = Step(CallStep(_pivot, _pivot_failed, unknown=_outcome_unknown).perform)
RECORD_FAILURE = Step(_record_failure)
REMOVE_OVERLAY = Step(_remove_overlay, keeps_merged=True)
