"""What each action of the decision table does, one method each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from vmbackup.api.spec import BackupSpec, Quiesce
from vmbackup.api.status import Reason, RetryReason
from vmbackup.backoff import Backoff
from vmbackup.errors import Cause, TransientError, UnknownOutcomeError, VMBackupError
from vmbackup.hypervisor import chain
from vmbackup.hypervisor.guest import Guest
from vmbackup.imaging.errors import errors_of
from vmbackup.protocol import advice
from vmbackup.protocol.record import Copy, Record, Snapshot
from vmbackup.protocol.terms import CANCELLED, Action, Do, Observation, Power
from vmbackup.protocol.transition import compared, failed, merged_offline, recorded, without_switches
from vmbackup.reconcile.admission.overlay_space import patience
from vmbackup.reconcile.admission.plan import Planner, key_of
from vmbackup.reconcile.observe import Observer, View
from vmbackup.reconcile.request import Request
from vmbackup.reconcile.state.clock import boottime
from vmbackup.reconcile.state.journal import Journal, sync_directory
from vmbackup.reconcile.steps.calls import send
from vmbackup.reconcile.steps.copying import Copying, delete_stored
from vmbackup.reconcile.steps.definition import Settling
from vmbackup.reconcile.steps.guest_hold import Holding
from vmbackup.reconcile.steps.offline_merge import Merging
from vmbackup.reconcile.steps.quiescing import Quiescing
from vmbackup.reconcile.steps.throttling import Throttling
from vmbackup.reconcile.telling.announcer import Announcer
from vmbackup.stores.base import Store

_SWITCH_ATTEMPTS = 3  # failures to suspend after which the attempt is over
_SHIP_ATTEMPTS = 10
_SHIP_PAUSE = 5.0  # seconds
_AGAIN = 0.2  # seconds before a step inside a switch of images is tried again


class Acts:
    """Carries out actions for one backup, and keeps its record."""

    def __init__(
        self,
        *,
        journal: Journal,
        guest: Guest,
        observer: Observer,
        planner: Planner,
        open_store: Callable[[], Store],
        earlier: Callable[[], Iterable[Record]],
        adopted_home: Callable[[], None],
        copying: Copying,
        merging: Merging,
        announcer: Announcer,
        backoff: Backoff,
    ) -> None:
        self._journal = journal
        self._guest = guest
        self._observer = observer
        self._planner = planner
        self._open_store = open_store
        self._earlier = earlier
        self._adopted_home = adopted_home
        self._copying = copying
        self._merging = merging
        self._announcer = announcer
        self._backoff = backoff
        self._failed: dict[Do, int] = {}
        self._holding = Holding(journal, guest, announcer)
        self._settling = Settling(journal, guest, observer, announcer)
        self._throttling = Throttling(journal, guest, announcer)
        self._quiescing = Quiescing(journal, observer, announcer)

    @property
    def record(self) -> Record:
        """The record as it is in the journal."""
        return self._journal.record

    def write(self, record: Record, *, durable: bool = True) -> None:
        """Put the record into the journal."""
        self._journal.write(record, durable=durable)

    # -- begin and end

    def plan(self, request: Request) -> float:
        """Choose the disks, or those that an earlier backup left on their overlay. Raises RefusedError."""
        if self.record.snapshot is Snapshot.ADOPTED:
            self._adopted_home()
            self._announcer.adopted_home(self.record)
        self.write(self._planner.plan(self.record, request.spec, self._guest, self._open_store, self._earlier()))
        if self.record.snapshot is Snapshot.ADOPTED:
            self._announcer.recorded(self.record, Action(Do.ADOPT))
        return 0.0

    def refuse(self, error: VMBackupError) -> None:
        """Nothing was begun, and nothing will be."""
        self._fail_backup(str(error), error.reason)

    def release(self, request: Request) -> None:
        """The VMBackup may go: so do the stored data if asked for, and the journal if nothing is left to do."""
        if request.delete_data:
            delete_stored(self.record, self._open_store)
        self._announcer.forget(self.record)
        if not self.record.orphan:
            self._journal.remove()

    def release_guest(self) -> None:
        """The journal cannot be written: no switch of images any more, only the way to a guest that runs."""
        self._journal.give_up(without_switches(self.record))

    def let_go(self) -> None:
        """This run is over: nothing of it goes on."""
        self._copying.cancel()
        self._merging.let_go()
        self._announcer.let_go(self.record)

    def make_way(self, action: Action, seen: Observation) -> None:
        """End what goes on in the background and is in the way of this: a copy, or what keeps a guest from starting."""
        self._copying.make_way(action)
        if not seen.call_in_flight:
            self._merging.make_way(action)

    def tend(self, view: View, request: Request) -> None:
        """While waiting: let a changed bandwidth take effect."""
        ours = {disk.target: view.jobs[disk.target] for disk in view.seen.disks if disk.job}
        for target, job in ours.items():
            wanted = request.spec.commit.bandwidth or 0
            if job.bandwidth != wanted:
                limit = partial(self._guest.set_job_bandwidth, target, wanted or None)
                send(self._journal, Action(Do.WAIT, target), limit)
        self._announcer.commit_progress(ours)

    # -- every other action

    def perform(self, action: Action, view: View, request: Request) -> float:  # noqa: C901 — a table, one row an action
        """Carry out one action; returns the seconds to wait before the next look."""
        spec, target = request.spec, action.target
        match action.do:
            case Do.COPY:
                return self._copy(request)
            case Do.SHIP:
                return self._ship(request)
            case Do.COMPARE:
                return self._compare(action)
            case Do.MERGE_OFFLINE:
                return self._merge_offline(action, request)
            case Do.SYNC_CONFIG:
                return self._sync_config(action)
            case Do.REMOVE_OVERLAY:
                return self._remove_overlay(action, view)
            case Do.FINISH:
                return self._finish(action)
            case Do.RECORD_FAILURE:
                return self._commit_failed(action, action.reason, RetryReason.JOB_FAILED)
            case Do.FAIL_BACKUP:
                return self._fail_backup(action.reason, _reason_of(action, view, request))
            case Do.REFUSE:
                off = view.seen.power is Power.OFF
                return self._fail_backup(action.reason, "DomainNotRunning" if off else "GuestNotReady")
            case Do.THROTTLE | Do.UNTHROTTLE:
                return self._throttling.perform(action, view.jobs.get(target), spec.commit.deadline_seconds)
            case Do.FREEZE:
                return self._call(action, request, lambda: self._holding.freeze(spec.snapshot.freeze_timeout_seconds))
            case Do.THAW:
                return self._call(action, request, lambda: self._holding.thaw(spec.snapshot.freeze_timeout_seconds))
            case Do.SUSPEND:
                return self._call(action, request, self._holding.suspend)
            case Do.RESUME:
                return self._call(action, request, self._holding.resume)
            case Do.SNAPSHOT:
                return self._call(action, request, self._snapshot)
            case Do.REDEFINE:
                return self._call(action, request, lambda: self._settling.redefine(action))
            case Do.COMMIT:
                return self._call(action, request, lambda: self._commit(target, spec))
            case Do.PIVOT:
                return self._call(action, request, lambda: self._holding.pivot(target))
            case _:
                self.write(recorded(self.record, action))
                self._announcer.recorded(self.record, action)
                return 0.0

    def _compare(self, action: Action) -> float:
        if (stamp := self._merging.compare(self.record.disk(action.target), action)) is None:
            return 1.0
        self.write(compared(self.record, action, stamp))
        return 0.0

    def _fail_backup(self, why: str, reason: str = "") -> float:
        failed = recorded(self.record, Action(Do.FAIL_BACKUP, reason=why))
        self.write(replace(failed, copy_reason=reason))
        self._announcer.backup_failed(self.record)
        return 0.0

    def _finish(self, action: Action) -> float:
        if self.record.copy is Copy.FAILED and self.record.snapshot is Snapshot.DONE:
            self._copying.cancel()  # a shipment of what is discarded must not publish the rest of it
            self._discard()
        self.write(replace(recorded(self.record, action), completed=time.time()))
        return 0.0

    def _discard(self) -> None:
        try:
            self._open_store().discard(key_of(self.record))
        except VMBackupError as error:
            self._announcer.event("DiscardFailed", str(error), warning=True)

    # -- copying

    def _copy(self, request: Request) -> float:
        now = boottime()
        left = request.spec.copy.deadline_seconds - (now - (self.record.snapshot_at or now))
        if left <= 0:
            self._copying.cancel()
            return self._fail_backup(
                f"the copy was not complete {request.spec.copy.deadline_seconds} s after the snapshot "
                "(spec.copy.deadlineSeconds): raise it, or the bandwidth",
                "CopyDeadlineExceeded",
            )
        try:
            record = self._copying.copy(self.record, self._open_store)
        except VMBackupError as error:
            return self._fail_backup(f"the copy failed: {error}", Reason.COPY_FAILED)
        if record is None:
            return min(patience(self.record), left)
        self.write(record)
        return 0.0

    def _ship(self, request: Request) -> float:
        try:
            record = self._copying.ship(self.record, self._open_store)
        except VMBackupError as error:
            count = self._failed[Do.SHIP] = self._failed.get(Do.SHIP, 0) + 1
            if isinstance(error, TransientError) and count < _SHIP_ATTEMPTS:  # no guest is kept waiting for it
                return _SHIP_PAUSE
            return self._fail_backup(f"the copy could not be completed in the store: {error}", Reason.SHIPPING_FAILED)
        if record is None:
            return 1.0
        self.write(record)
        return 0.0

    # -- the way home

    def _merge_offline(self, action: Action, request: Request) -> float:
        if not self._merging.target:
            attempts = self.record.disk(action.target).attempts + 1
            self.write(self.record.with_disk(action.target, commit_started=boottime(), attempts=attempts))
        target = self._merging.target or action.target
        try:
            stamp = self._merging.merge(self.record.disk(target), request.spec.commit.bandwidth)
        except VMBackupError as error:
            reason = RetryReason.BUSY if isinstance(error, TransientError) else RetryReason.JOB_FAILED
            return self._commit_failed(Action(action.do, target), str(error), reason)
        if stamp is None:
            return 1.0
        self.write(merged_offline(self.record, target, stamp))
        return 0.0

    def _remove_overlay(self, action: Action, view: View) -> float:
        if (why := self._settling.no_longer_on_base(action.target, view.seen)) is not None:
            return self._config_failed(why)
        disk = self.record.disk(action.target)
        overlay = Path(disk.overlay)
        merged = self._announcer.merged(action.target, overlay)
        with errors_of(overlay):
            overlay.unlink(missing_ok=True)
            sync_directory(overlay.parent)  # else a power cut could bring it back, to be taken for one that was left
        seconds = None if disk.commit_started is None else boottime() - disk.commit_started
        self.write(
            self.record.with_disk(
                action.target,
                commit_running=False,
                commit_started=None,
                commit_seconds=seconds,
                merged="",
                merged_bytes=merged,
            )
        )
        self._announcer.disk_home(self.record, action.target)
        return 0.0

    def _commit_failed(self, action: Action, why: str, reason: RetryReason) -> float:
        why = advice.commit_failed(self.record.disk(action.target), why)
        pause = self._backoff.after(self.record.disk(action.target).failures + 1)
        self.write(failed(self.record, action, why, retry_at=boottime() + pause))
        self._announcer.commit_failed(action.target, why, reason, pause)
        return 0.0

    # -- libvirt calls

    def _call(self, action: Action, request: Request, call: Callable[[], object]) -> float:
        try:
            if (noted := self._noted(action)) is not self.record:
                self.write(noted, durable=False)
        except OSError as error:
            why = f"the UEFI variables {self.record.nvram} cannot be kept ({error.strerror})"
            return self._failed_call(action, request, why)
        self._announcer.calling(self.record, action)
        try:
            send(self._journal, action, call)
        except UnknownOutcomeError:
            if action.do in (Do.COMMIT, Do.PIVOT):
                self._announcer.retried(RetryReason.UNKNOWN)
            if action.do in (Do.FREEZE, Do.THAW):
                return self._failed_call(action, request, "the guest agent's answer was lost")
            raise
        except VMBackupError as error:
            return self._failed_call(action, request, str(error), error.reason)
        self._failed.pop(action.do, None)
        self._announcer.answered(self.record, action)
        return 0.0

    def _noted(self, action: Action) -> Record:
        """The record with what is to be known of this moment afterwards. Raises OSError."""
        if action.do is Do.SUSPEND:
            return replace(self.record, suspended_at=boottime())
        if action.do is Do.SNAPSHOT:
            nvram = self._journal.keep_nvram()
            return replace(self.record, snapshot_time=time.time(), snapshot_at=boottime(), nvram=nvram)
        if action.do is Do.COMMIT:
            attempts = self.record.disk(action.target).attempts + 1
            return self.record.with_disk(action.target, commit_started=boottime(), attempts=attempts)
        return self.record

    def _snapshot(self) -> None:
        overlays = {disk.target: disk.overlay for disk in self.record.disks}
        live = self._guest.live_xml()
        if live is None:  # libvirt would do it all the same, and on every disk that is not named as another
            raise TransientError(f"{self._guest.name} has stopped: start it, and make a new backup")
        others = [disk.target for disk in chain.disks(live) if disk.target not in overlays]
        self._guest.snapshot(overlays, others)

    def _commit(self, target: str, spec: BackupSpec) -> None:
        self._guest.commit(target, self.record.disk(target).base, bandwidth=spec.commit.bandwidth)

    # -- calls that failed

    def _failed_call(self, action: Action, request: Request, why: str, reason: str = "") -> float:
        count = self._failed[action.do] = self._failed.get(action.do, 0) + 1
        match action.do:
            case Do.FREEZE:
                required = request.spec.snapshot.quiesce is Quiesce.REQUIRE
                self._quiescing.freeze_failed(why, reason, required=required)
                if required:
                    return self._fail_backup(f"spec.snapshot.quiesce is Require, but {why}", "QuiesceFailed")
                return 0.0
            case Do.THAW:
                self._quiescing.thaw_failed(count, why, reason)
                return 0.0
            case Do.SNAPSHOT:
                return self._fail_backup(f"the snapshot failed: {why}", "SnapshotFailed")
            case Do.COMMIT:
                busy = reason in (Cause.BUSY, Cause.BLOCK_JOB_ACTIVE)
                return self._commit_failed(action, why, RetryReason.BUSY if busy else RetryReason.JOB_FAILED)
            case Do.PIVOT:
                return self._commit_failed(action, why, RetryReason.PIVOT_FAILED)
            case Do.REDEFINE:
                return self._config_failed(why)
            case Do.SUSPEND if count >= _SWITCH_ATTEMPTS:
                self._failed.pop(Do.SUSPEND)
                return self._suspend_failed(why)
            case _:
                return _AGAIN if count < 10 else 5.0

    def _suspend_failed(self, why: str) -> float:
        pivoting = [disk.target for disk in self.record.disks if disk.pivot_intended]
        for target in pivoting:
            pivot = Action(Do.PIVOT, target)
            self._commit_failed(pivot, f"the guest could not be suspended: {why}", RetryReason.PIVOT_FAILED)
        if self.record.pause_until:  # it was for a commit to converge
            self.write(replace(self.record, pause_until=0.0), durable=False)
        elif not pivoting:
            self._fail_backup(f"the guest could not be suspended: {why}", "SuspendFailed")
        return 0.0

    def _sync_config(self, action: Action) -> float:
        why = self._settling.sync(action)
        return 0.0 if why is None else self._config_failed(why)

    def _config_failed(self, why: str) -> float:
        """P cannot be settled. Before the snapshot that ends the backup; later the guest does not wait for ever."""
        if self._settling.may_try_again():
            return _AGAIN
        if self.record.snapshot in (Snapshot.NONE, Snapshot.INTENDED) and self.record.copy is Copy.OPEN:
            return self._fail_backup(f"the domain's configuration cannot be saved: {why}", Cause.CONFIG_NOT_DURABLE)
        return self._settling.go_on_without(why)


def _reason_of(failure: Action, view: View, request: Request) -> str:
    """Why there will be no good copy, in a word; '' where the message alone says it."""
    if request.deleted:
        return Reason.DELETED
    if failure.reason == CANCELLED:
        return Reason.CANCELLED
    if failure.reason == view.seen.room_low:
        return Reason.OVERLAY_SPACE_LOW
    return Reason.DOMAIN_MIGRATED if view.seen.migrated else ""
