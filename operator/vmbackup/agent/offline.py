"""Continues backups while the API server is away, so that no guest stays on its overlay until it is back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from vmbackup.agent.context import Context
from vmbackup.api.store import StoreSpec
from vmbackup.protocol.record import Record
from vmbackup.reconcile.backup import Backup
from vmbackup.reconcile.request import Request, spec_of
from vmbackup.reconcile.telling.log import LogReporter
from vmbackup.stores.registry import open_store

_log = logging.getLogger(__name__)


class OfflineRuns:
    """Runs backups with the specs in their journals. Belongs to the event loop.

    Once the API server answers, the Lifecycle of each takes over and reports the result to its VMBackup.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._backups: list[Backup] = []
        self._runs: list[asyncio.Task[None]] = []
        self._stopped = False

    def carry_on(self, records: Iterable[Record]) -> None:
        """Start them."""
        for record in records:
            backup = self._backup(record)
            self._backups.append(backup)
            self._runs.append(asyncio.create_task(self._run(record, backup)))

    def stop(self) -> None:
        """Stop each at a safe point."""
        self._stopped = True
        for backup in self._backups:
            backup.wake()

    async def ended(self) -> None:
        """Return once all have ended."""
        await asyncio.gather(*self._runs)

    def _backup(self, record: Record) -> Backup:
        spec = spec_of(record)
        return Backup(
            self._context.node,
            record.identity,
            request=lambda: Request(spec, retry=record.handled_retry, stop=self._stopped),
            open_store=lambda: open_store(StoreSpec.parse(record.store)),
            reporter=LogReporter(record.full_name),
        )

    async def _run(self, record: Record, backup: Backup) -> None:
        _log.warning("%s had begun; continuing it without the API server", record.full_name)
        try:
            await self._context.threads.run(backup.run, f"offline-{record.name}")
        except Exception:
            _log.exception("%s cannot be continued without the API server", record.full_name)
