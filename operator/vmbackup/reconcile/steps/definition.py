"""REDEFINE, SYNC_CONFIG: settling P (PROTOCOL R2). Redefine the persistent XML, and verify the file."""

from __future__ import annotations

from vmbackup.errors import Cause, PermanentError, TransientError
from vmbackup.hypervisor import chain
from vmbackup.protocol.record import Copy, Image, Snapshot
from vmbackup.protocol.terms import Action, Do, Observation
from vmbackup.protocol.transition import answered, failed
from vmbackup.reconcile.state.clock import boottime
from vmbackup.reconcile.steps.step import AT_ONCE, CallStep, Failure, Next, Run, Step, Task

_ATTEMPTS = 5  # failures in a row after which the guest does not wait for it any longer
_PAUSE = 20.0  # seconds for which the guest then goes on without
_AGAIN = 0.2  # seconds before the next attempt, while the guest waits for it
_LATER = 5.0  # seconds between attempts of what cannot be done without


def _redefine(run: Run, task: Task) -> None:
    """Let P name the images of the action, as far as libvirt says. Everything but our disks stays unchanged."""
    xml = run.guest.persistent_xml()
    if xml is None:  # undefined meanwhile: there is nothing to settle any more
        return
    wanted: dict[str, str] = {}
    for target, image in task.action.images:
        disk = run.disk(target)
        on_base = disk.persistent_disk_xml  # empty: it was transient when the backup was planned
        on_base = on_base or chain.without_overlay(run.guest.live_xml() or xml, target, disk.overlay)
        wanted[target] = on_base if image is Image.BASE else chain.on_overlay(on_base, disk.overlay)
    run.guest.define(chain.with_images(xml, wanted))


def _redefine_failed(run: Run, _task: Task, failure: Failure) -> Next:
    return config_failed(run, failure.why)


def _sync_config(run: Run, task: Task) -> Next:
    why = _sync(run, task.action)
    return AT_ONCE if why is None else config_failed(run, why)


def _sync(run: Run, action: Action) -> str | None:
    """Make the file durable that names these images. None on success, else the problem."""
    paths = {target: _path(run, target, image) for target, image in action.images}
    try:
        durable = run.guest.sync_config(paths)
    except PermanentError as error:
        if error.reason != Cause.CONFIG_DIRECTORY_MISSING:
            raise
        run.announcer.config_unproven(str(error))
        durable = True
    except TransientError as error:
        if error.reason != Cause.CONFIG_NOT_DURABLE:
            raise
        return str(error)
    if not durable:
        run.write(failed(run.record, action, "", retry_at=0.0), durable=False)
        return f"libvirt's configuration on disk does not name {', '.join(paths.values())}"
    run.failures.pop(Do.SYNC_CONFIG, None)
    run.observer.config_failing_until = 0.0
    # A power cut must not take it away in the middle of a pivot: it tells P=B by the pivot from P=B by a user.
    pivoting = any(disk.pivot_intended for disk in run.record.disks)
    run.write(answered(run.record, action), durable=pivoting)
    return None


def no_longer_on_base(run: Run, target: str, seen: Observation) -> str | None:
    """None if P still names the base, durably: it was settled, but somebody may have redefined the domain since."""
    if any(disk.target == target and disk.persistent is None for disk in seen.disks):
        return None
    return _sync(run, Action(Do.SYNC_CONFIG, images=((target, Image.BASE),)))


def config_failed(run: Run, why: str) -> Next:
    """P cannot be settled. Before the snapshot that ends the backup; later the guest does not wait for ever."""
    run.failures[Do.SYNC_CONFIG] += 1  # of both halves, which succeed together
    if run.failures[Do.SYNC_CONFIG] < _ATTEMPTS:
        return Next.wait(_AGAIN)
    record = run.record
    if record.snapshot in (Snapshot.NONE, Snapshot.INTENDED) and record.copy is Copy.OPEN:
        return run.fail_backup(f"the domain's configuration cannot be saved: {why}", Cause.CONFIG_NOT_DURABLE)
    run.observer.config_failing_until = boottime() + _PAUSE
    if run.failures[Do.SYNC_CONFIG] > _ATTEMPTS:
        return Next.wait(_LATER)
    run.announcer.event(Cause.CONFIG_NOT_DURABLE, f"{why}: do not power-cycle the guest", warning=True)
    return AT_ONCE


def _path(run: Run, target: str, image: Image) -> str:
    disk = run.disk(target)
    return disk.base if image is Image.BASE else disk.overlay


# They may be tried again every few seconds for hours, while libvirt's configuration cannot be saved: a copy goes on.
REDEFINE = Step(CallStep(_redefine, _redefine_failed).perform, beside_copy=True, keeps_merged=True)
SYNC_CONFIG = Step(_sync_config, beside_copy=True, keeps_merged=True)
