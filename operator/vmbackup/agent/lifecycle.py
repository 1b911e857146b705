"""One VMBackup, from the moment that it is seen until nothing is left to do for it."""

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
from vmbackup.api.backup import BackupSpec, DeletionPolicy
from vmbackup.api.identity import BackupId
from vmbackup.api.resource import BackupResource, condition, is_finished, with_generation
from vmbackup.api.status import GUEST_AWAY, Outcome, Phase, Reason, Report
from vmbackup.backoff import Backoff
from vmbackup.cluster.reporter import ClusterReporter
from vmbackup.cluster.status_writer import StatusWriter
from vmbackup.errors import RefusedError, TransientError, VMBackupError
from vmbackup.protocol.record import Record
from vmbackup.reconcile.request import Request, spec_of
from vmbackup.reconcile.state import journal as journals
from vmbackup.reconcile.state.domain_lock import is_locked
from vmbackup.reconcile.steps.step import Ending

Result = TypeVar("Result")

_log = logging.getLogger(__name__)

_PARKED = (*GUEST_AWAY, Reason.QUARANTINED)
_PAUSES = Backoff(first=1.0, longest=60.0)  # after failures of the node itself
_FLUSH = 5.0  # seconds for the last status of an object that others hold
_LOOK = 3.0  # seconds between looks at an object that is being deleted: its events wait until it is let go


class Stopped(Protocol):
    """Tells when to stop: an asyncio.Event, or what kopf gives a daemon."""

    def wait(self) -> Awaitable[object]:
        """Return once it is time to stop."""
        ...


async def _wait(stopped: Stopped) -> None:
    await stopped.wait()


class Lifecycle:
    """Keeps one VMBackup. Belongs to the event loop; backups run in threads of their own.

    `keep` does what is due as long as it is let; `let_go` returns once a deleted VMBackup may vanish.
    """

    def __init__(self, context: Context, seen: BackupResource) -> None:
        self._context = context
        self._seen = seen
        self._loop = asyncio.get_running_loop()
        self._ref = BackupId.of(seen.body)
        self._writer = StatusWriter(
            context.cluster,
            self._ref,
            generation=seen.generation,
            previous=seen.status or None,
            late=partial(context.node.metrics.unreported, seen.uid),
        )
        self.reporter = ClusterReporter(
            self._ref, self._writer, context.events, generation=lambda: self._seen.generation, heard=self._heard
        )
        # The retry with which it ended; None: it has not, or the node knows better than its status.
        ended = seen.over and not context.queue.reserved(seen.uid)
        self._handled = seen.handled_retry if ended else None
        self._spec: BackupSpec | None = None
        self._gone = self._stopped = self._unfinished = False
        self._deleting: bool | None = None  # deleted; and then, whether its stored data goes too
        self._deletion_task: asyncio.Task[None] | None = None
        self._request: Request | None = None
        self._backup_run = BackupRun(context, lambda: self._seen, self._current_request, self.reporter)
        self._released = asyncio.Event()
        self._changed = asyncio.Event()
        self._at_work = asyncio.Lock()
        self._loops = 0
        self._failures = 0
        self.see(seen)

    @property
    def wanted(self) -> bool:
        """There is something left to do: by what is seen, or by what is known and may not be seen yet."""
        return self._seen.wanted or self._unfinished

    @property
    def attended(self) -> bool:
        """Somebody does what is due."""
        return self._loops > 0

    @property
    def released(self) -> bool:
        """It was deleted, and may vanish."""
        return self._released.is_set()

    @property
    def name(self) -> str:
        """Namespace and name."""
        return self._seen.full_name

    def see(self, seen: BackupResource, *, gone: bool = False) -> None:
        """It was seen like this; `gone`: for the last time."""
        self._seen = seen
        self._gone = self._gone or gone
        with suppress(RefusedError):  # of a first one, _run says so; the API server lets nobody make a good one bad
            self._spec = BackupSpec.parse(seen.spec)
        if (seen.terminating or self._gone) and self._deletion_task is None:
            self._deletion_task = self._loop.create_task(self._resolve_deletion())
        self._wake()

    def vanish(self) -> None:
        """It does not exist any more."""
        if not self._gone:
            self.see(self._seen, gone=True)

    def stop(self) -> None:
        """This process is to end: let a running backup come to a safe point."""
        self._stopped = True
        self._wake()

    async def keep(self, stopped: Stopped) -> None:
        """Do what is due until `stopped`, or until it was deleted and let go."""
        stopping = asyncio.ensure_future(_wait(stopped))
        self._loops += 1
        try:
            while not stopping.done() and not self._released.is_set():
                work = asyncio.create_task(self._work())
                await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
                if stopping.done():
                    self.stop()
                await work
                await self._change(self._pause(), stopping)
        finally:
            stopping.cancel()
            self._loops -= 1

    async def let_go(self) -> None:
        """Return once it may vanish: its chain is home, or its orphan is recorded. Nothing ends it earlier."""
        self._loops += 1
        work: asyncio.Task[None] | None = None
        looked = time.monotonic()
        try:
            while not self._released.is_set():
                if not self._at_work.locked():
                    work = asyncio.create_task(self._work())
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._released.wait(), self._pause() or _PAUSES.first)
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
        """Wait, for at most so long, until its status has arrived. Blocks."""
        self._writer.flush(seconds)

    # -- what is asked for

    def _wake(self) -> None:
        """The request as it is now; whoever waits or runs looks at once."""
        if self._spec is not None:
            policy = self._spec.deletion_policy
            self._request = Request(
                self._spec,
                deleted=self._deleting is not None,
                cancelled=self._seen.cancelled,
                delete_data=bool(self._deleting) and policy is DeletionPolicy.DELETE,
                retry=self._seen.retry,
                stop=self._stopped,
            )
            self._backup_run.wake()
        self._changed.set()

    def _current_request(self) -> Request:
        """Asked by the threads of the backup."""
        if self._request is None:
            raise AssertionError("a backup without a spec is never run")
        return self._request

    async def _resolve_deletion(self) -> None:
        """It is deleted. Where its data is to go too, the namespace decides: it keeps the data if it goes itself."""
        data = self._spec is not None and self._spec.deletion_policy is DeletionPolicy.DELETE
        failures = 0
        while data:
            try:
                data = not await self._context.threads.call(
                    self._context.cluster.namespace_terminating, self._ref.namespace
                )
                if not data:
                    self.reporter.event("DataRetained", "the whole namespace is being deleted: the stored data stays")
                break
            except TransientError as error:
                _log.warning("%s: %s", self.name, error)
                failures += 1
                await asyncio.sleep(_PAUSES.after(failures))
            except VMBackupError as error:
                data = False
                self.reporter.event("DataRetained", f"the stored data stays: {error}", warning=True)
        self._deleting = data
        self._wake()

    async def _look(self) -> None:
        """While it is being deleted, its events wait: see for ourselves what is asked for, and whether it is there."""
        try:
            found = await self._context.threads.call(self._context.cluster.backup, self._ref.namespace, self._ref.name)
        except VMBackupError:
            return
        if found is not None and found["metadata"]["uid"] == self._ref.uid:
            self.see(BackupResource(found))

    # -- what is due

    def _pause(self) -> float | None:
        """Seconds until something is due without any change; None: never."""
        if self._failures:
            return _PAUSES.after(self._failures)
        if self._deleting is not None:
            return _PAUSES.first
        expires = self._seen.expires
        return None if expires is None else max(_PAUSES.first, expires - time.time())

    async def _change(self, seconds: float | None, *others: asyncio.Future[None]) -> None:
        """Wait until something has changed, or one of the others is done, for at most so long."""
        changed = asyncio.ensure_future(self._changed.wait())
        try:
            await asyncio.wait({changed, *others}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()

    async def _do_what_is_due(self) -> None:
        self._changed.clear()
        if self._stopped or self._released.is_set():
            return
        try:
            await self._act()
            self._failures = 0
        except VMBackupError as error:
            self._failures += 1
            _log.log(logging.WARNING if self._failures == 1 else logging.INFO, "%s: %s", self.name, error)
            if self._failures == 1:
                self.reporter.event(error.reason, str(error), warning=True)

    async def _act(self) -> None:
        seen = self._seen
        if self._deleting is not None:
            await self._release()
        elif not seen.held or seen.terminating or self._gone:
            return  # no snapshot before the finalizer is stored; and how it is deleted is about to be known
        elif self._handled is None or seen.retry != self._handled:
            await self._run()
        elif seen.stale:
            await self._note()
        elif seen.expires is not None and seen.expires <= time.time():
            _log.info("%s: ttlSecondsAfterFinished has passed: deleting it", self.name)
            ref = self._ref
            await self._call(self._context.cluster.delete_backup, ref.namespace, ref.name, ref.uid)

    async def _run(self) -> None:
        """Run it from wherever it stands."""
        record = await self._record()
        if self._spec is None:
            self._refuse()
            return
        if record is None and self._handled is None and self._seen.over:  # another process has run it
            self._handled = self._seen.handled_retry
            return
        if record is None and self._handled is not None:
            await self._note()  # it is over, and what could be taken up again is not known here any more
            return
        ending = await self._backup_run.run(record)
        if ending is Ending.RELEASED:
            await self._part()
        elif ending is Ending.FINISHED:
            self._handled = str(self._writer.latest.get("lastHandledRetry") or "")
        elif not self._stopped and self._deleting is None:
            raise TransientError(
                "another process has run it: its VMBackup will say how that ended", reason="RunElsewhere"
            )
        self._changed.set()

    async def _release(self) -> None:
        """It was deleted: bring the chain home, or record the orphan, and delete the data if that is asked for."""
        record = await self._record()
        if record is None and await self._call(is_locked, self._ref.uid, self._context.node.lock_dir):
            return  # another process runs it: the chain is that one's to bring home
        if record is None or self._spec is None:
            await self._delete_data()
            ending = Ending.RELEASED
        elif record.orphan and self._seen.held_by_others:
            ending = Ending.RELEASED  # each run would report anew, each report be seen, and each look run it again
        else:
            ending = await self._backup_run.run(record)
        if ending is Ending.RELEASED:
            await self._part()
            self._changed.set()

    async def _part(self) -> None:
        """Let it vanish. Who else holds it, as Argo CD does a hook, waits for a status that says that it is over."""
        if self._seen.awaits_its_end and not is_finished(self._writer.latest):
            clean = condition(self._writer.latest, "ChainClean").get("status")
            report = Report(Phase.FAILED, Reason.DELETED, "the VMBackup was deleted", Outcome.DELETED)
            chain = {"True": True, "False": False}.get(str(clean))
            self.reporter.report(replace(report, backup_complete=False, chain_clean=chain, completion_time=time.time()))
            await self._call(self._writer.flush, _FLUSH)
        self._released.set()

    async def _delete_data(self) -> None:
        location = str(self._seen.status.get("location") or "")
        if self._request is not None and self._request.delete_data and location:
            store = await self._call(self._backup_run.open_store)
            await self._call(store.delete, location, self._ref.uid)

    async def _note(self) -> None:
        """Note that a change of a backup that is over was seen."""
        seen, ref = self._seen, self._ref
        status = with_generation(seen.status, seen.generation)
        if seen.retry:
            status["lastHandledRetry"] = seen.retry
        answer = await self._call(self._context.cluster.put_status, ref.namespace, ref.name, ref.uid, status)
        self._handled = seen.retry
        if answer is not None:
            self.see(BackupResource(answer))

    def _refuse(self) -> None:
        """The spec makes no sense. The API server's validation lets nobody come so far."""
        try:
            BackupSpec.parse(self._seen.spec)
        except RefusedError as error:
            self.reporter.event(error.reason, str(error), warning=True)
            self._context.node.metrics.finished(Outcome.REFUSED)
            self._handled = self._seen.retry
            self.reporter.report(
                Report(
                    Phase.FAILED,
                    error.reason,
                    str(error),
                    Outcome.REFUSED,
                    backup_complete=False,
                    chain_clean=True,
                    completion_time=time.time(),
                    last_handled_retry=self._handled,
                )
            )

    def _heard(self, report: Report) -> None:
        """What the backup reports, in any thread."""
        self._unfinished = report.outcome is None or report.reason == Reason.QUARANTINED
        with suppress(RuntimeError):  # the loop is closed: this process ends, and its backups come to a safe point
            if self._writer.gone:
                self._loop.call_soon_threadsafe(self.vanish)
            if report.reason in _PARKED and report.phase is not Phase.COPYING:
                self._loop.call_soon_threadsafe(self._backup_run.park)

    async def _record(self) -> Record | None:
        """What its journal says. Where the spec cannot be read and it has begun, it is carried on by that."""
        record = await self._call(journals.record_of, self._context.node.state_dir, self._ref.uid)
        if self._spec is None and record is not None and not record.done:
            self._spec = spec_of(record)
            self._wake()
        return record

    async def _call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        return await self._context.threads.call(function, *arguments)
