"""Every action and its step: `STEPS[action.do]`. Steps defined here change only the record, wait, or end the run."""

from __future__ import annotations

import time
from functools import partial

from vmbackup.errors import VMBackupError
from vmbackup.protocol.record import Copy, Snapshot
from vmbackup.protocol.terms import Action, Do, Observation
from vmbackup.protocol.transition import finished, recorded
from vmbackup.reconcile.background.copying import delete_stored
from vmbackup.reconcile.steps import (
    commit,
    copying,
    definition,
    guest_hold,
    offline_merge,
    snapshot,
    throttling,
)
from vmbackup.reconcile.steps.step import AT_ONCE, Ending, Next, Run, Step, Task, send

_POLL = 1.0  # seconds; events wake it earlier
_POLL_PARKED = 5.0
_SHORTEST = 0.05


def perform(run: Run, task: Task) -> Next:
    """Carry out one action, after ending the background work that is in its way."""
    step = STEPS[task.action.do]
    make_way(run, step, task.view.seen)
    return step.perform(run, task)


def make_way(run: Run, step: Step, seen: Observation) -> None:
    """End background work that must not continue during this step."""
    if not step.beside_copy:
        run.copying.make_way()
    if not seen.call_in_flight:
        run.merging.make_way(keep_merged=step.keeps_merged, keep_comparison=step.keeps_comparison)


def _wait(run: Run, task: Task) -> Next:
    action, seen = task.action, task.view.seen
    if not task.request.stop and not seen.call_in_flight:  # R4: nothing is sent, nor answered, meanwhile
        _follow_jobs(run, task)
    longest = _POLL_PARKED if action.parked else _POLL
    if action.until is None:
        return Next.wait(longest)
    return Next.wait(min(longest, max(_SHORTEST, action.until - seen.now)))


def _follow_jobs(run: Run, task: Task) -> None:
    """Let a changed bandwidth take effect on our commits, and tell how far they are."""
    ours = {disk.target: task.view.jobs[disk.target] for disk in task.view.seen.disks if disk.job}
    wanted = task.request.spec.commit.bandwidth or 0
    for target, job in ours.items():
        if job.bandwidth != wanted:
            limit = partial(run.guest.set_job_bandwidth, target, wanted or None)
            send(run.journal, Action(Do.WAIT, target), limit)
    run.announcer.commit_progress(ours)


def _record(run: Run, task: Task) -> Next:
    """Change only the record."""
    run.write(recorded(run.record, task.action))
    run.announcer.recorded(run.record, task.action)
    return AT_ONCE


def _finish(run: Run, _task: Task) -> Next:
    if run.record.copy is Copy.FAILED and run.record.snapshot is Snapshot.DONE:
        run.copying.cancel()  # a shipment must not publish files that are being discarded
        try:
            run.open_store().discard(run.record.identity)
        except VMBackupError as error:
            run.announcer.event("DiscardFailed", str(error), warning=True)
    run.write(finished(run.record, time.time()))
    return AT_ONCE


def _release(run: Run, task: Task) -> Next:
    """Release the VMBackup; delete the stored data if asked for, and the journal if nothing is left to do."""
    if task.request.delete_data:
        delete_stored(run.record, run.open_store)
    run.announcer.forget(run.record)
    if not run.record.orphan:
        run.journal.remove()
    return Next.done(Ending.RELEASED)


def _done(_run: Run, _task: Task) -> Next:
    return Next.done(Ending.FINISHED)


STEPS: dict[Do, Step] = {
    Do.WAIT: Step(_wait, beside_copy=True),
    Do.PLAN: snapshot.PLAN,
    Do.REFUSE: snapshot.REFUSE,
    Do.ADOPT: Step(_record),
    Do.INTEND_SNAPSHOT: Step(_record),
    Do.RECORD_SNAPSHOT: Step(_record),
    Do.FREEZE: guest_hold.FREEZE,
    Do.THAW: guest_hold.THAW,
    Do.SUSPEND: guest_hold.SUSPEND,
    Do.RESUME: guest_hold.RESUME,
    Do.FORGET_GUEST: Step(_record),
    Do.RECORD_IO_ERROR: Step(_record),
    Do.CLEAR_GUARD: Step(_record, beside_copy=True),
    Do.SNAPSHOT: snapshot.SNAPSHOT,
    Do.REDEFINE: definition.REDEFINE,
    Do.SYNC_CONFIG: definition.SYNC_CONFIG,
    Do.COPY: copying.COPY,
    Do.FAIL_BACKUP: copying.FAIL_BACKUP,
    Do.BEGIN_COMMIT: Step(_record),
    Do.COMMIT: commit.COMMIT,
    Do.MERGE_OFFLINE: offline_merge.MERGE_OFFLINE,
    Do.THROTTLE: throttling.THROTTLE,
    Do.UNTHROTTLE: throttling.UNTHROTTLE,
    Do.INTEND_PAUSE: Step(_record),
    Do.RECORD_FAILURE: commit.RECORD_FAILURE,
    Do.INTEND_PIVOT: Step(_record),
    Do.CLEAR_PIVOT: Step(_record),
    Do.COMPARE: offline_merge.COMPARE,
    Do.PIVOT: commit.PIVOT,
    Do.REMOVE_OVERLAY: commit.REMOVE_OVERLAY,
    Do.QUARANTINE: Step(_record),
    Do.LIFT_QUARANTINE: Step(_record),
    Do.GIVE_UP: Step(_record),
    Do.SHIP: copying.SHIP,
    Do.RECORD_ORPHAN: Step(_record),
    Do.CLEAR_ORPHAN: Step(_record),
    Do.FINISH: Step(_finish),
    Do.RELEASE: Step(_release),
    Do.DONE: Step(_done),
}
