"""The life of one VMBackup, from its first sight until nothing is left to do: carries out the decisions of duty()."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

from vmbackup.agent.backup_run import BackupRun
from vmbackup.agent.context import Context
from vmbackup.agent.duty import PAUSES, Local, NodeState, Task, duty, next_look
from vmbackup.api.backup import BackupSpec, DeletionPolicy
from vmbackup.api.names import BACKUPS
from vmbackup.api.resource import BackupResource, condition, is_finished, with_generation
from vmbackup.api.status import GUEST_AWAY, Outcome, Phase, Reason, Report
from vmbackup.cluster.reporter import ClusterReporter
from vmbackup.cluster.status_writer import StatusWriter
from vmbackup.errors import RefusedError, TransientError, VMBackupError
from vmbackup.reconcile.request import Request, spec_of
from vmbackup.reconcile.state import journal as journals
from vmbackup.reconcile.state.domain_lock import is_locked
from vmbackup.reconcile.steps.step import Ending

Result = TypeVar("Result")

_log = logging.getLogger(__name__)

_PARKED = (*GUEST_AWAY, Reason.QUARANTINED)
_FLUSH = 5.0  # seconds to send the last status of an object with finalizers of others
_LOOK = (
    3.0  # seconds between reads of an object that is being deleted: kopf delivers no events of it until it is released
)


class Stopped(Protocol):
    """Tells when to stop: an asyncio.Event, or what kopf gives a daemon."""

    def wait(self) -> Awaitable[object]:
        """Return once it is time to stop."""
        ...


async def _wait(stopped: Stopped) -> None:
    await stopped.wait()


class Lifecycle:
    """Looks after one VMBackup. Belongs to the event loop; backups run in threads of their own.

    `keep` carries out tasks until it is stopped; `release` returns once a deleted VMBackup may be removed.
    """

    def __init__(self, context: Context, seen: BackupResource) -> None:
        self._context = context
        self._seen = seen
        self._loop = asyncio.get_running_loop()
        self._identity = seen.identity
        self._writer = StatusWriter(
            context.cluster,
            self._identity,
            generation=seen.generation,
            previous=seen.status or None,
            late=partial(context.node.metrics.unreported, seen.uid),
        )
        self.reporter = ClusterReporter(
            self._identity, self._writer, context.events, generation=lambda: self._seen.generation, heard=self._heard
        )
        # A reserved domain: the node knows better than the status that the backup has not ended.
        ended = seen.over and not context.queue.reserved(seen.uid)
        self._local = Local(handled=seen.handled_retry if ended else None)
        self._spec: BackupSpec | None = None
        self._unfinished = False  # set by the threads of the backup, so it is no part of _local
        self._deletion_task: asyncio.Task[None] | None = None
        self._request: Request | None = None
        self._backup_run = BackupRun(context, lambda: self._seen, self._current_request, self.reporter)
        self._released = asyncio.Event()
        self._changed = asyncio.Event()
        self._at_work = asyncio.Lock()
        self._loops = 0
        self.see(seen)

    @property
    def wanted(self) -> bool:
        """Something is left to do, by the API server or by a report that may not have arrived there yet."""
        return self._seen.wanted or self._unfinished

    @property
    def attended(self) -> bool:
        """Whether `keep` is running."""
        return self._loops > 0

    @property
    def released(self) -> bool:
        """It was deleted, and may be removed."""
        return self._released.is_set()

    @property
    def name(self) -> str:
        """Namespace and name."""
        return self._seen.full_name

    def see(self, seen: BackupResource, *, gone: bool = False) -> None:
        """Take note of its newest state; `gone`: it does not exist any more."""
        self._seen = seen
        if gone:
            self._local = replace(self._local, gone=True)
        with suppress(RefusedError):  # reported by REFUSE; an update cannot make a valid spec invalid
            self._spec = BackupSpec.parse(seen.spec)
        if (seen.terminating or self._local.gone) and self._deletion_task is None:
            self._deletion_task = self._loop.create_task(self._resolve_deletion())
        self._wake()

    def vanish(self) -> None:
        """Take note that it does not exist any more."""
        if not self._local.gone:
            self.see(self._seen, gone=True)

    def stop(self) -> None:
        """Stop at a safe point, because this process ends."""
        self._local = replace(self._local, stopped=True)
        self._wake()

    async def keep(self, stopped: Stopped) -> None:
        """Carry out tasks until `stopped`, or until the VMBackup was deleted and released."""
        stopping = asyncio.ensure_future(_wait(stopped))
        self._loops += 1
        try:
            while not stopping.done() and not self._released.is_set():
                work = asyncio.create_task(self._work())
                await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
                if stopping.done():
                    self.stop()
                await work
                await self._change(self._next_look(), stopping)
        finally:
            stopping.cancel()
            self._loops -= 1

    async def release(self) -> None:
        """Return once it may be removed: its chain is home, or its orphan is recorded. Nothing else ends it."""
        self._loops += 1
        work: asyncio.Task[None] | None = None
        looked = time.monotonic()
        try:
            while not self._released.is_set():
                if not self._at_work.locked():
                    work = asyncio.create_task(self._work())
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._released.wait(), self._next_look() or PAUSES.first)
                if work is not None and work.done():
                    work.result()
                if time.monotonic() - looked > _LOOK:
                    looked = time.monotonic()
                    await self._look()
        finally:
            if work is not None:
                work.cancel()
            self._loops -= 1

    async def _work(self) -> None:
        async with self._at_work:
            await self._do_what_is_due()

    def flush(self, seconds: float) -> None:
        """Wait at most this long until its status has been sent. Blocks."""
        self._writer.flush(seconds)

    # -- the request

    def _wake(self) -> None:
        """Build the current request. A running or queued backup looks at it at once."""
        if self._spec is not None:
            policy = self._spec.deletion_policy
            self._request = Request(
                self._spec,
                deleted=self._local.deleting is not None,
                cancelled=self._seen.cancelled,
                delete_data=bool(self._local.deleting) and policy is DeletionPolicy.DELETE,
                retry=self._seen.retry,
                stop=self._local.stopped,
            )
            self._backup_run.wake()
        self._changed.set()

    def _current_request(self) -> Request:
        """Called by the threads of the backup."""
        if self._request is None:
            raise AssertionError("a backup without a spec never runs")
        return self._request

    async def _resolve_deletion(self) -> None:
        """Decide whether the stored data is deleted too. It is kept if the whole namespace is being deleted."""
        data = self._spec is not None and self._spec.deletion_policy is DeletionPolicy.DELETE
        failures = 0
        while data:
            try:
                data = not await self._context.threads.call(
                    self._context.cluster.namespace_terminating, self._identity.namespace
                )
                if not data:
                    self.reporter.event("DataRetained", "the whole namespace is being deleted; keeping the stored data")
                break
            except TransientError as error:
                _log.warning("%s: %s", self.name, error)
                failures += 1
                await asyncio.sleep(PAUSES.after(failures))
            except VMBackupError as error:
                data = False
                self.reporter.event("DataRetained", f"keeping the stored data: {error}", warning=True)
        self._local = replace(self._local, deleting=data)
        self._wake()

    async def _look(self) -> None:
        """Read it from the API server, because kopf delivers no events of an object that is being deleted."""
        try:
            found = await self._call(self._context.cluster.get, BACKUPS, self._identity.namespace, self._identity.name)
        except VMBackupError:
            return
        if found is not None and found["metadata"]["uid"] == self._identity.uid:
            self.see(BackupResource(found))

    # -- the duty

    def _next_look(self) -> float | None:
        """Seconds until something may be due without any change; None: never."""
        return next_look(self._seen, self._local, time.time())

    async def _change(self, seconds: float | None, *others: asyncio.Future[None]) -> None:
        """Wait at most this long until something has changed, or one of the others is done."""
        changed = asyncio.ensure_future(self._changed.wait())
        try:
            await asyncio.wait({changed, *others}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()

    async def _do_what_is_due(self) -> None:
        self._changed.clear()
        if self._released.is_set():
            return
        try:
            await self._carry_out()
            self._local = replace(self._local, failures=0)
        except VMBackupError as error:
            failures = self._local.failures + 1
            self._local = replace(self._local, failures=failures)
            _log.log(logging.WARNING if failures == 1 else logging.INFO, "%s: %s", self.name, error)
            if failures == 1:
                self.reporter.event(error.reason, str(error), warning=True)

    async def _carry_out(self) -> None:
        local = self._local
        due = duty(self._seen, local, time.time())
        if due.task is Task.READ:
            local = replace(local, node=await self._node_state(deleted=local.deleting is not None))
            due = duty(self._seen, local, time.time())
        _log.debug("%s: %s: %s", self.name, due.task, due.why)
        match due.task:
            case Task.RUN:
                await self._run(local)
            case Task.REFUSE:
                self._refuse()
            case Task.ACCEPT:
                self._local = replace(self._local, handled=self._seen.handled_retry)
            case Task.ACKNOWLEDGE:
                await self._acknowledge()
            case Task.EXPIRE:
                _log.info("%s: ttlSecondsAfterFinished has passed: deleting it", self.name)
                await self._call(self._context.cluster.delete, self._identity)
            case Task.DELETE_DATA:
                await self._delete_data()
                await self._finish_release()
            case Task.RELEASE:
                await self._finish_release()
            case Task.READ | Task.NOTHING:
                pass

    async def _node_state(self, *, deleted: bool) -> NodeState:
        """The journal, and whether another process runs it. A backup that has begun runs with the journal's spec."""
        record = await self._call(journals.record_of, self._context.node.state_dir, self._identity.uid)
        if self._spec is None and record is not None and not record.done:
            self._spec = spec_of(record)
            self._wake()
        locked = (
            deleted and record is None and await self._call(is_locked, self._identity.uid, self._context.node.lock_dir)
        )
        return NodeState(record, locked=locked, has_spec=self._spec is not None)

    async def _run(self, local: Local) -> None:
        """Run it from its present state."""
        ending = await self._backup_run.run(None if local.node is None else local.node.record)
        if ending is Ending.RELEASED:
            await self._finish_release()
            return
        if local.deleting is not None:  # an orphan, or interrupted: retried after a pause
            return
        if ending is Ending.FINISHED:
            handled = str(self._writer.latest.get("lastHandledRetry") or "")
            self._local = replace(self._local, handled=handled)
        elif not self._local.stopped and self._local.deleting is None:
            raise TransientError("another process has run it; its VMBackup will show the result", reason="RunElsewhere")
        self._changed.set()

    async def _finish_release(self) -> None:
        """Allow its removal. Another controller that holds it, such as Argo CD for a hook, gets a final status."""
        if self._seen.awaits_its_end and not is_finished(self._writer.latest):
            clean = condition(self._writer.latest, "ChainClean").get("status")
            report = Report(Phase.FAILED, Reason.DELETED, "the VMBackup was deleted", Outcome.DELETED)
            chain = {"True": True, "False": False}.get(str(clean))
            self.reporter.report(replace(report, backup_complete=False, chain_clean=chain, completion_time=time.time()))
            await self._call(self._writer.flush, _FLUSH)
        self._released.set()
        self._changed.set()

    async def _delete_data(self) -> None:
        location = str(self._seen.status.get("location") or "")
        if self._request is not None and self._request.delete_data and location:
            store = await self._call(self._backup_run.open_store)
            await self._call(store.delete, location, self._identity.uid)

    async def _acknowledge(self) -> None:
        """Acknowledge a change of a backup that is over in its status."""
        seen = self._seen
        status = with_generation(seen.status, seen.generation)
        if seen.retry:
            status["lastHandledRetry"] = seen.retry
        answer = await self._call(self._context.cluster.put_status, self._identity, status)
        self._local = replace(self._local, handled=seen.retry)
        if answer is not None:
            self.see(BackupResource(answer))

    def _refuse(self) -> None:
        """Report a spec that cannot be parsed. The validation of the API server normally prevents that."""
        try:
            BackupSpec.parse(self._seen.spec)
        except RefusedError as error:
            self.reporter.event(error.reason, str(error), warning=True)
            self._context.node.metrics.finished(Outcome.REFUSED)
            self._local = replace(self._local, handled=self._seen.retry)
            self.reporter.report(
                Report(
                    Phase.FAILED,
                    error.reason,
                    str(error),
                    Outcome.REFUSED,
                    backup_complete=False,
                    chain_clean=True,
                    completion_time=time.time(),
                    last_handled_retry=self._seen.retry,
                )
            )

    def _heard(self, report: Report) -> None:
        """Take note of a report of the backup. Called by any thread."""
        self._unfinished = report.outcome is None or report.reason == Reason.QUARANTINED
        with suppress(RuntimeError):  # the loop is closed: this process ends
            if self._writer.gone:
                self._loop.call_soon_threadsafe(self.vanish)
            if report.reason in _PARKED and report.phase is not Phase.COPYING:
                self._loop.call_soon_threadsafe(self._backup_run.park)

    async def _call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        return await self._context.threads.call(function, *arguments)
