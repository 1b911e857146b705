"""Periodic relist: compares VMBackups, journals and domains, in case a watch event was missed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

from vmbackup.agent.context import Context
from vmbackup.agent.leftovers import Orphans
from vmbackup.agent.offline import OfflineRuns
from vmbackup.agent.registry import Registry
from vmbackup.agent.runtime import memory
from vmbackup.agent.runtime.existing_files import ExistingFiles
from vmbackup.api.names import BACKUPS
from vmbackup.api.resource import BackupResource, Body, condition
from vmbackup.api.status import Reason
from vmbackup.errors import VMBackupError
from vmbackup.protocol.record import Record, Snapshot
from vmbackup.reconcile.state import journal as journals

_log = logging.getLogger(__name__)

_LIST_AGAIN = 2.0  # seconds


class Sweep:
    """Compares the VMBackups of this node with its journals and its domains.

    A journal whose VMBackup is gone is removed if its chain is home. Otherwise the chain is brought home now, or stays
    recorded as an orphan and is retried at the next sweep. Journals of `vmbackup run` are not touched.
    """

    def __init__(self, context: Context, registry: Registry, orphans: Orphans, node_name: str, interval: float) -> None:
        self._context = context
        self._backups = registry
        self._orphans = orphans
        self._node_name = node_name
        self._interval = interval
        self._files = ExistingFiles(context.threads)
        self._unattended: set[str] = set()
        self._neglected: set[str] = set()

    async def begin(self) -> None:
        """Before any backup runs: reserve the domains of those that had begun, and restore metrics.

        Waits for the API server; backups that had begun continue meanwhile.
        """
        records = await self._records()
        for record in records:
            if not record.spec:  # of `vmbackup run`
                continue
            if record.begun and not record.finished:
                self._context.queue.reserve(record.domain_uuid, record.uid)
        await self._orphans.begin()  # guests first
        await self._tell_overlays([record for record in records if record.spec])
        bodies = await self._list()
        if bodies is None:
            bodies = await self._list_at_last(records)
        self._tell_ends(bodies, records)

    async def watch(self) -> None:
        """Look at each interval. Runs until it is cancelled."""
        while True:
            try:
                await self.look()
            except Exception:
                _log.exception("comparing VMBackups with journals failed, will try again")
            await self._context.threads.call(memory.give_back)
            await asyncio.sleep(self._interval)

    async def look(self) -> None:
        """Look once."""
        await self._context.threads.call(self._context.policies.look)
        kept = self._backups.uids
        await self._orphans.see()
        records = (
            await self._records()
        )  # before the list, so that a record without a listed VMBackup means that it is gone
        bodies = await self._list()
        if bodies is None:
            return
        unattended = self._backups.unattended(bodies)
        self._neglected = unattended & self._unattended
        self._unattended = unattended
        uids = {BackupResource(body).uid for body in bodies}
        self._backups.vanished(kept - uids)
        gone = [each for each in records if each.spec and each.uid not in uids and not self._backups.attends(each.uid)]
        for record in gone:
            if record.done:
                await self._context.threads.call(journals.forget, self._context.node.state_dir, record.uid)
        await self._orphans.look(records, [each for each in gone if not each.done], map(BackupResource, bodies))

    def neglected(self) -> str:
        """The problem of the watch: VMBackups unnoticed at the last two looks; '' if none. From any thread."""
        count = len(self._neglected)
        return f"the watch has stopped: {count} unfinished VMBackups were not noticed" if count else ""

    async def forget(self, uid: str) -> None:
        """Remove the journal of a VMBackup that is gone, if nothing is left to do for its chain."""
        record = await self._context.threads.call(journals.record_of, self._context.node.state_dir, uid)
        if record is not None and record.done:
            await self._context.threads.call(journals.forget, self._context.node.state_dir, uid)

    def stop(self) -> None:
        """Stop, because this process ends."""
        self._orphans.stop()

    async def _records(self) -> list[Record]:
        return await self._context.threads.call(self._context.node.records)

    async def _list(self) -> list[Body] | None:
        try:
            cluster = self._context.cluster
            bodies: Sequence[Body] = await self._context.threads.call(cluster.of_node, BACKUPS, self._node_name)
        except VMBackupError as error:
            _log.warning("the VMBackups of node %s cannot be listed: %s", self._node_name, error)
            return None
        return [body for body in bodies if not BackupResource(body).released_by_us]

    async def _list_at_last(self, records: Iterable[Record]) -> list[Body]:
        offline = OfflineRuns(self._context)
        offline.carry_on(record for record in records if record.begun and record.store and not record.finished)
        try:
            while (bodies := await self._list()) is None:
                await asyncio.sleep(_LIST_AGAIN)
        finally:
            offline.stop()
        await offline.ended()
        return bodies

    # -- metrics that alerts depend on

    async def _tell_overlays(self, records: Iterable[Record]) -> None:
        taken = [(record, disk) for record in records if record.snapshot is not Snapshot.NONE for disk in record.disks]
        there = await self._files.of(disk.overlay for _, disk in taken)
        for record, disk in taken:
            if disk.overlay in there:
                since = record.snapshot_time or record.started or time.time()
                self._context.node.metrics.overlay(record.domain, disk.target, Path(disk.overlay), since)

    def _tell_ends(self, bodies: Iterable[Body], records: Iterable[Record]) -> None:
        domains = {record.uid: record.domain for record in records}
        for body in bodies:
            seen, metrics = BackupResource(body), self._context.node.metrics
            taken, ended = seen.status.get("snapshotTime"), seen.status.get("completionTime")
            ready, reason = (condition(seen.status, "Ready").get(field) for field in ("status", "reason"))
            domain = domains.get(seen.uid) or str(body["spec"]["domain"])
            if ready == "True" and taken and ended:
                metrics.succeeded(domain, _seconds(str(taken)), _seconds(str(ended)))
            elif reason in (Reason.CANCELLED, Reason.DELETED):
                continue  # on request, so no failure
            elif ready == "False" and ended and seen.over and seen.status.get("domainUUID"):
                metrics.failed(domain, _seconds(str(ended)))


def _seconds(timestamp: str) -> float:
    return datetime.fromisoformat(timestamp).timestamp()
