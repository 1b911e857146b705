"""COPY, SHIP, FAIL_BACKUP: from the frozen base into the store, or giving that up."""

from __future__ import annotations

from vmbackup.api.status import Reason
from vmbackup.errors import TransientError, VMBackupError
from vmbackup.protocol.terms import Do
from vmbackup.reconcile.admission.overlay_space import patience
from vmbackup.reconcile.state.clock import boottime
from vmbackup.reconcile.steps.step import AT_ONCE, Next, Run, Step, Task

_SHIP_ATTEMPTS = 10
_SHIP_PAUSE = 5.0  # seconds
_POLL = 1.0  # seconds


def _copy(run: Run, task: Task) -> Next:
    """Start the copy, or see how far it is."""
    now = boottime()
    deadline = task.request.spec.copy.deadline_seconds
    left = deadline - (now - (run.record.snapshot_at or now))
    if left <= 0:
        run.copying.cancel()
        return run.fail_backup(
            f"the copy was not complete {deadline} s after the snapshot (spec.copy.deadlineSeconds): "
            "raise it, or the bandwidth",
            "CopyDeadlineExceeded",
        )
    try:
        record = run.copying.copy(run.record, run.open_store)
    except VMBackupError as error:
        return run.fail_backup(f"the copy failed: {error}", Reason.COPY_FAILED)
    if record is None:
        return Next.wait(min(patience(run.record), left))
    run.write(record)
    return AT_ONCE


def _ship(run: Run, _task: Task) -> Next:
    """Start completing the backup in the store, or see how far that is."""
    try:
        record = run.copying.ship(run.record, run.open_store)
    except VMBackupError as error:
        run.failures[Do.SHIP] += 1
        if isinstance(error, TransientError) and run.failures[Do.SHIP] < _SHIP_ATTEMPTS:  # no guest waits for it
            return Next.wait(_SHIP_PAUSE)
        return run.fail_backup(f"the copy could not be completed in the store: {error}", Reason.SHIPPING_FAILED)
    if record is None:
        return Next.wait(_POLL)
    run.write(record)
    return AT_ONCE


def _fail_backup(run: Run, task: Task) -> Next:
    """The way home continues. If the VMBackup was deleted, that is the reason that is reported."""
    reason = Reason.DELETED if task.request.deleted else task.action.cause
    if reason is None and task.view.seen.migrated:
        reason = Reason.DOMAIN_MIGRATED
    return run.fail_backup(task.action.reason, reason or "")


COPY = Step(_copy, beside_copy=True)
SHIP = Step(_ship)
FAIL_BACKUP = Step(_fail_backup)
