"""All VMBackups of this node: who keeps which, what the list of them says, and the way to an end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from vmbackup.agent.context import Context
from vmbackup.agent.duty import Body, Seen
from vmbackup.agent.lifecycle import Keeper, Stopped
from vmbackup.api.identity import BackupId
from vmbackup.cluster.reporter import ClusterReporter
from vmbackup.cluster.status_writer import StatusWriter
from vmbackup.protocol.record import Record
from vmbackup.reconcile.telling.listener import Reporter

_log = logging.getLogger(__name__)

_AGAIN = 5.0  # seconds after something unexpected


class Fleet:
    """Belongs to the event loop, except where a method says otherwise."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._keepers: dict[str, Keeper] = {}
        self._stopping = False

    def see(self, body: Body, *, gone: bool = False) -> None:
        """A VMBackup was seen like this; `gone`: it does not exist any more."""
        seen = Seen(body)
        if keeper := self._keepers.get(seen.uid):
            keeper.see(seen, gone=gone)

    def wants(self, body: Body) -> bool:
        """Whether this VMBackup needs its keeper, and its finalizer."""
        seen = Seen(body)
        keeper = self._keepers.get(seen.uid)
        known = keeper.wanted if keeper else self._context.queue.reserved(seen.uid)
        return seen.wanted or known

    async def keep(self, body: Body, stopped: Stopped) -> None:
        """Keep this VMBackup until `stopped`, or until it was deleted and let go."""
        keeper = self._keeper(body)
        try:
            await keeper.keep(stopped)
        finally:
            self._dismiss(keeper, body)

    async def let_go(self, body: Body) -> None:
        """Return once this deleted VMBackup may vanish. Raises nothing: whoever calls takes that for a yes."""
        keeper = self._keeper(body)
        while not keeper.released:
            try:
                await keeper.let_go()
            except Exception:
                _log.exception("%s cannot be let go yet, will try again", keeper.name)
                await asyncio.sleep(_AGAIN)
        self._dismiss(keeper, body)

    def unattended(self, bodies: Iterable[Body]) -> set[str]:
        """The uids of those that are not over and that nobody keeps."""
        found = [Seen(body) for body in bodies]
        return {seen.uid for seen in found if not seen.over and not self.attends(seen.uid)}

    def attends(self, uid: str) -> bool:
        """Whether somebody keeps this one."""
        keeper = self._keepers.get(uid)
        return keeper is not None and keeper.attended

    @property
    def uids(self) -> set[str]:
        """Those that are kept."""
        return set(self._keepers)

    def vanished(self, uids: Iterable[str]) -> None:
        """These were deleted without a word."""
        for uid in uids:
            if keeper := self._keepers.get(uid):
                keeper.vanish()

    def stop(self) -> None:
        """This process is to end: every running backup comes to a safe point."""
        self._stopping = True
        for keeper in self._keepers.values():
            keeper.stop()

    def flush(self, seconds: float) -> None:
        """Wait until what was reported has arrived, for at most so long. Blocks."""
        for keeper in list(self._keepers.values()):
            keeper.flush(seconds)

    def reporter_of(self, record: Record) -> Reporter | None:
        """Who is told of this backup; None if its VMBackup is gone. Called by the threads of other backups."""
        keeper = self._keepers.get(record.uid)
        if keeper is not None:
            return keeper.reporter
        context = self._context
        body = context.cluster.backup(record.namespace, record.name)
        if body is None or body["metadata"]["uid"] != record.uid:
            return None
        seen = Seen(body)
        ref = BackupId.of(body)
        writer = StatusWriter(context.cluster, ref, generation=seen.generation, previous=seen.status or None)
        return ClusterReporter(ref, writer, context.events, generation=lambda: seen.generation)

    def _keeper(self, body: Body) -> Keeper:
        seen = Seen(body)
        keeper = self._keepers.get(seen.uid)
        if keeper is None:
            keeper = self._keepers[seen.uid] = Keeper(self._context, seen)
            if self._stopping:
                keeper.stop()
        return keeper

    def _dismiss(self, keeper: Keeper, body: Body) -> None:
        if not keeper.attended and not self._stopping:
            self._keepers.pop(Seen(body).uid, None)
