"""All VMBackups of this node, each with its Lifecycle."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from vmbackup.agent.context import Context
from vmbackup.agent.lifecycle import Lifecycle, Stopped
from vmbackup.api.names import BACKUPS
from vmbackup.api.resource import BackupResource, Body
from vmbackup.cluster.reporter import ClusterReporter
from vmbackup.cluster.status_writer import StatusWriter
from vmbackup.protocol.record import Record
from vmbackup.reconcile.telling.listener import Reporter

_log = logging.getLogger(__name__)

_AGAIN = 5.0  # seconds after an unexpected error


class Registry:
    """Belongs to the event loop, except where a method says otherwise."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._lifecycles: dict[str, Lifecycle] = {}
        self._stopping = False

    def see(self, body: Body, *, gone: bool = False) -> None:
        """Take note of the newest state of a VMBackup; `gone`: it does not exist any more."""
        seen = BackupResource(body)
        if lifecycle := self._lifecycles.get(seen.uid):
            lifecycle.see(seen, gone=gone)

    def wants(self, body: Body) -> bool:
        """Whether something is left to do for this VMBackup, so that it needs its finalizer."""
        seen = BackupResource(body)
        lifecycle = self._lifecycles.get(seen.uid)
        known = lifecycle.wanted if lifecycle else self._context.queue.reserved(seen.uid)
        return seen.wanted or known

    async def keep(self, body: Body, stopped: Stopped) -> None:
        """Look after this VMBackup until `stopped`, or until it was deleted and released."""
        lifecycle = self._lifecycle(body)
        try:
            await lifecycle.keep(stopped)
        finally:
            self._dismiss(lifecycle, body)

    async def release(self, body: Body) -> None:
        """Return once this deleted VMBackup may be removed. Never raises: kopf would then remove the finalizer."""
        lifecycle = self._lifecycle(body)
        while not lifecycle.released:
            try:
                await lifecycle.release()
            except Exception:
                _log.exception("%s: cannot be released yet, will try again", lifecycle.name)
                await asyncio.sleep(_AGAIN)
        self._dismiss(lifecycle, body)

    def unattended(self, bodies: Iterable[Body]) -> set[str]:
        """The uids of those that are not over and that no task looks after."""
        found = [BackupResource(body) for body in bodies]
        return {seen.uid for seen in found if not seen.over and not self.attends(seen.uid)}

    def attends(self, uid: str) -> bool:
        """Whether a task looks after this one."""
        lifecycle = self._lifecycles.get(uid)
        return lifecycle is not None and lifecycle.attended

    @property
    def uids(self) -> set[str]:
        """The known ones."""
        return set(self._lifecycles)

    def vanished(self, uids: Iterable[str]) -> None:
        """Take note that these do not exist any more, though no event said so."""
        for uid in uids:
            if lifecycle := self._lifecycles.get(uid):
                lifecycle.vanish()

    def stop(self) -> None:
        """Stop every running backup at a safe point, because this process ends."""
        self._stopping = True
        for lifecycle in self._lifecycles.values():
            lifecycle.stop()

    def flush(self, seconds: float) -> None:
        """Wait until all reports have been sent, at most this long each. Blocks."""
        for lifecycle in list(self._lifecycles.values()):
            lifecycle.flush(seconds)

    def reporter_of(self, record: Record) -> Reporter | None:
        """The reporter of this backup; None if its VMBackup is gone. Called by the threads of other backups."""
        lifecycle = self._lifecycles.get(record.uid)
        if lifecycle is not None:
            return lifecycle.reporter
        context = self._context
        body = context.cluster.get(BACKUPS, record.namespace, record.name)
        if body is None or body["metadata"]["uid"] != record.uid:
            return None
        seen = BackupResource(body)
        writer = StatusWriter(context.cluster, seen.identity, generation=seen.generation, previous=seen.status or None)
        return ClusterReporter(seen.identity, writer, context.events, generation=lambda: seen.generation)

    def _lifecycle(self, body: Body) -> Lifecycle:
        seen = BackupResource(body)
        lifecycle = self._lifecycles.get(seen.uid)
        if lifecycle is None:
            lifecycle = self._lifecycles[seen.uid] = Lifecycle(self._context, seen)
            if self._stopping:
                lifecycle.stop()
        return lifecycle

    def _dismiss(self, lifecycle: Lifecycle, body: Body) -> None:
        if not lifecycle.attended and not self._stopping:
            self._lifecycles.pop(BackupResource(body).uid, None)
