"""PLAN, SNAPSHOT, REFUSE: how a backup begins.

Decided by take_snapshot (protocol/guest_on.py) and refuse_off (protocol/guest_off.py); PLAN also by the driver, while
nothing is known of the disks.
"""

from __future__ import annotations

import time

from vmbackup.errors import TransientError
from vmbackup.hypervisor import chain
from vmbackup.protocol.record import Record, Snapshot
from vmbackup.protocol.terms import Action, Do, Power
from vmbackup.protocol.transition import snapshotting
from vmbackup.reconcile.request import Request
from vmbackup.reconcile.state.clock import boottime
from vmbackup.reconcile.steps.step import AT_ONCE, CallStep, Failure, Next, Run, Step, Task


def plan(run: Run, request: Request) -> Next:
    """Choose the disks, or those that an earlier backup left on their overlay. Raises RefusedError."""
    if run.record.snapshot is Snapshot.ADOPTED:
        run.adopted_home()
        run.announcer.adopted_home(run.record)
    run.write(run.planner.plan(run.record, request.spec, run.guest, run.open_store, run.earlier()))
    if run.record.snapshot is Snapshot.ADOPTED:
        run.announcer.recorded(run.record, Action(Do.ADOPT))
        run.doubt = True  # the state in which the earlier backup left it is unknown
    return AT_ONCE


def _noted(run: Run, _task: Task) -> Record:
    nvram = run.journal.keep_nvram()
    return snapshotting(run.record, at=time.time(), now=boottime(), nvram=nvram)


def _snapshot(run: Run, _task: Task) -> None:
    overlays = {disk.target: disk.overlay for disk in run.record.disks}
    live = run.guest.live_xml()
    if live is None:  # libvirt would do it all the same, and on every disk that is not named as another
        raise TransientError(f"{run.guest.name} has stopped: start it, and make a new backup")
    others = [disk.target for disk in chain.disks(live) if disk.target not in overlays]
    run.guest.snapshot(overlays, others)


def _snapshot_failed(run: Run, _task: Task, failure: Failure) -> Next:
    return run.fail_backup(f"the snapshot failed: {failure.why}", "SnapshotFailed")


def _refuse(run: Run, task: Task) -> Next:
    off = task.view.seen.power is Power.OFF
    return run.fail_backup(task.action.reason, "DomainNotRunning" if off else "GuestNotReady")


PLAN = Step(lambda run, task: plan(run, task.request))
SNAPSHOT = Step(CallStep(_snapshot, _snapshot_failed, noted=_noted).perform)
REFUSE = Step(_refuse)
