"""Runs of one VMBackup: its place in the queue, its store and its thread."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress

import msgspec

from vmbackup.agent.context import Context
from vmbackup.agent.runtime.queue import Ticket
from vmbackup.api.policy import unknown_domain
from vmbackup.api.resource import BackupResource
from vmbackup.api.status import Phase, Reason, Report
from vmbackup.api.store import StoreSpec
from vmbackup.errors import RefusedError, TransientError, VMBackupError
from vmbackup.hypervisor.guest import Guest
from vmbackup.protocol.record import Record
from vmbackup.reconcile.backup import Backup
from vmbackup.reconcile.request import Request
from vmbackup.reconcile.steps.step import Ending
from vmbackup.reconcile.telling.listener import Reporter
from vmbackup.stores.base import Store
from vmbackup.stores.registry import open_store

_log = logging.getLogger(__name__)


class BackupRun:
    """Runs a VMBackup, once or more often. Belongs to the event loop, except where a method says otherwise.

    `seen` and `request` return the newest state; `request` is also called by the threads of the backup.
    """

    def __init__(
        self, context: Context, seen: Callable[[], BackupResource], request: Callable[[], Request], reporter: Reporter
    ) -> None:
        self._context = context
        self._seen = seen
        self._request = request
        self._reporter = reporter
        self._backup: Backup | None = None
        self._ticket: Ticket | None = None
        self._store: StoreSpec | None = None
        self._forbidden: RefusedError | None = None

    async def run(self, record: Record | None) -> Ending:
        """Wait until it may run, then run it from the state of its record. Raises VMBackupError if it cannot begin."""
        context, seen = self._context, self._seen()
        try:
            if not await self._admitted(seen, record):
                return Ending.INTERRUPTED
            await self._find_store(record)
            self._backup = Backup(
                context.node,
                seen.identity,
                request=self._request,
                open_store=self.open_store,
                reporter=self._reporter,
                spec=seen.spec,
                store=None if self._store is None else msgspec.to_builtins(self._store),
                admit=self._admit,
            )
            return await context.threads.run(self._backup.run, f"backup-{seen.full_name}")
        finally:
            self._backup = self._forbidden = None
            if self._ticket is not None:
                context.queue.leave(self._ticket)
                self._ticket = None
            context.queue.unreserve(seen.uid)

    def wake(self) -> None:
        """Take note of a new request: wakes a running backup, and leaves the queue if it no longer needs to run."""
        if self._backup is not None:
            self._backup.wake()
        ticket = self._ticket
        if ticket is not None and (self._request().stop or (self._dropped and not ticket.begun)):
            self._context.queue.abandon(ticket)

    def park(self) -> None:
        """Free its slot while it waits for its guest or a person."""
        if self._ticket is not None:
            self._context.queue.park(self._ticket)

    def open_store(self) -> Store:
        """Its store. Blocks; called by the threads of the backup."""
        if self._store is None:
            self._store = self._context.cluster.store(self._request().spec.store)
        return open_store(self._store)

    async def _admitted(self, seen: BackupResource, record: Record | None) -> bool:
        """Wait in the queue if necessary. False: it does not need to run any more."""
        if record is not None and record.done:
            return True
        has_begun = record is not None and record.begun
        if self._dropped and not has_begun:
            return True  # it ends at once and does not touch its domain
        domain = record.domain_uuid if record is not None else ""
        if not has_begun:
            try:
                domain = await self._context.threads.call(self._looked_up)
            except RefusedError as error:  # reported by the backup; the queue would reveal other domains
                self._forbidden = error
                return True
            except TransientError as error:
                self._show_pending(error.reason, str(error))
                raise
        since = str(seen.metadata.get("creationTimestamp"))
        self._ticket = Ticket(seen.uid, seen.full_name, domain, has_begun, since)
        self.wake()
        tell = self._log_waiting if has_begun else self._show_queued
        return await self._context.queue.enter(self._ticket, tell) or self._request().cancelled

    @property
    def _dropped(self) -> bool:
        """If it has not begun, it never will."""
        return self._request().deleted or self._request().cancelled

    def _show_queued(self, why: str) -> None:
        self._show_pending(Reason.QUEUED, f"queued: {why}")

    def _show_pending(self, reason: str, message: str) -> None:
        handled = self._seen().handled_retry
        self._reporter.report(Report(Phase.PENDING, reason, message, chain_clean=True, last_handled_retry=handled))

    def _log_waiting(self, why: str) -> None:
        """Log only: the status of a backup that has begun shows more than the queue."""
        _log.info("%s waits: %s", self._seen().full_name, why)

    def _looked_up(self) -> str:
        """The UUID of its domain; '' if it is unknown, which the backup will report. Raises as `_admit`."""
        guest = None
        try:
            guest = self._context.node.hypervisor.guest(self._request().spec.domain)
        except RefusedError:
            self._admit(None)
        except VMBackupError:
            return ""
        else:
            self._admit(guest)
        return "" if guest is None else guest.uuid

    def _admit(self, guest: Guest | None) -> None:
        """Raise RefusedError if no policy allows a backup of this domain (None: it does not exist). Blocks."""
        if self._forbidden is not None:
            raise self._forbidden
        spec = self._request().spec
        domain, uuid = unknown_domain(spec.domain) if guest is None else (guest.name, guest.uuid)
        namespace = self._seen().metadata["namespace"]
        self._context.policies.check(namespace, spec.domain, spec.store, domain=domain, domain_uuid=uuid)

    async def _find_store(self, record: Record | None) -> None:
        """Look up the store first: a backup that has begun must not fail because the API server is away."""
        try:
            await self._context.threads.call(self.open_store)
        except TransientError:
            if record is not None and record.store:
                with suppress(RefusedError):  # written by a later version: the backup looks it up again
                    self._store = StoreSpec.parse(record.store)
            elif not self._request().deleted:
                raise
        except VMBackupError:
            return  # reported by the backup
