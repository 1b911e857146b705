"""Orphaned overlays of a node: reported, counted, and merged if the policy is Commit."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from vmbackup.agent.context import Context
from vmbackup.agent.runtime.existing_files import ExistingFiles
from vmbackup.agent.runtime.queue import Ticket
from vmbackup.api.backup import BackupSpec
from vmbackup.api.resource import BackupResource
from vmbackup.cluster.events import NodeRef, Subject
from vmbackup.cluster.reporter import OrphanReporter
from vmbackup.errors import VMBackupError
from vmbackup.hypervisor.guest import Guest
from vmbackup.protocol.record import Record
from vmbackup.reconcile.backup import Backup
from vmbackup.reconcile.leftovers.reader import Leftovers, OurOverlay, may_hold_guest, read_all
from vmbackup.reconcile.leftovers.takeover import no_process_works_on, replaces_lost_journal, take_over_lost
from vmbackup.reconcile.request import Request, spec_of
from vmbackup.reconcile.state import journal as journals
from vmbackup.stores.base import Store
from vmbackup.stores.registry import open_store

_log = logging.getLogger(__name__)


class OrphanPolicy(StrEnum):
    """What to do with an orphaned overlay. That of a VMBackup being deleted is no orphan yet."""

    COMMIT = "Commit"
    REPORT = "Report"


@dataclass(frozen=True)
class _Orphan:
    """An orphaned overlay. `guest` runs on it; set only if no journal knows the overlay."""

    path: str
    subject: Subject
    story: str
    guest: Guest | None = None


class Orphans:
    """The orphaned overlays of one node. Belongs to the event loop.

    An overlay of ours is orphaned if its VMBackup is gone but its journal is here, if its journal is lost and no
    VMBackup is about to adopt it, or if an interrupted `vmbackup run` left it, which only its user continues. While
    another process works on the domain, its overlays are left to that process.
    """

    def __init__(self, context: Context, node_name: str, policy: OrphanPolicy) -> None:
        self._context = context
        self._node = NodeRef(node_name)
        self._policy = policy
        self._files = ExistingFiles(context.threads)
        self._merging: dict[str, asyncio.Task[None]] = {}
        self._overlays: set[str] = set()
        self._told: set[str] = set()
        self._seen: list[Leftovers] = []
        self._stopped = False

    def stop(self) -> None:
        """Stop, because this process ends."""
        self._stopped = True

    async def begin(self) -> None:
        """Before the API server has answered: resume and thaw guests held by a lost backup."""
        await self.see()
        await self._resume_held()

    async def see(self) -> None:
        """Look at all domains. Call it before reading journals: an overlay without a journal then never gets one."""
        try:
            self._seen = await self._context.threads.call(self._read)
        except VMBackupError as error:  # keep the last view
            _log.warning("the domains cannot be listed: %s", error)
            return
        self._context.node.metrics.domains(
            name for domain in self._seen for name in (domain.guest.name, domain.guest.uuid)
        )

    async def look(self, records: Sequence[Record], gone: Sequence[Record], backups: Iterable[BackupResource]) -> None:
        """Report, count and merge orphaned overlays.

        `gone`: the records whose VMBackup is gone, with something left to do; `backups`: all VMBackups of this node.
        """
        left = [record for record in records if _is_left(record, gone)]
        there = await self._files.of(disk.overlay for record in left for disk in record.disks)
        found = [*_forgotten(records, gone, self._node, there)]
        found += await self._interrupted(records, there)
        found += await self._unknown(records, {seen.uid[:8]: seen for seen in backups})
        self._overlays = {orphan.path for orphan in found}
        await self._count()
        self._tell(found)
        for record in gone:
            self.bring_home(record)
        await self._resume_held()
        if self._policy is OrphanPolicy.COMMIT:
            guests = {orphan.guest.uuid: orphan.guest for orphan in found if orphan.guest is not None}
            for guest in guests.values():
                await self._take_over(guest, [orphan.path for orphan in found if orphan.guest is guest])

    def bring_home(self, record: Record) -> None:
        """Merge the overlays of this record, whose VMBackup is gone. Policy Report: only resume and thaw the guest."""
        if record.uid in self._merging or self._stopped:
            return
        if self._policy is OrphanPolicy.REPORT and not may_hold_guest(record):
            self._context.queue.unreserve(record.uid)  # the next backup of its domain adopts its overlays
        else:
            self._merging[record.uid] = asyncio.create_task(self._bring_home(record))

    # -- find

    def _read(self) -> list[Leftovers]:
        return list(read_all(self._context.node.hypervisor.guests()))

    async def _interrupted(self, records: Iterable[Record], there: Collection[str]) -> list[_Orphan]:
        """The overlays of interrupted runs of `vmbackup run` that were not continued yet."""
        found: list[_Orphan] = []
        for record in records:
            left = _left(record, there) if _is_interrupted(record) else []
            if left and await self._is_free(record.domain_uuid):
                run = f"`vmbackup run` of {record.full_name}"
                story = f"left on the domain {record.domain} by an interrupted {run}; run it again to continue"
                found += [_Orphan(path, self._node, story) for path in left]
        return found

    async def _unknown(self, records: Iterable[Record], listed: Mapping[str, BackupResource]) -> list[_Orphan]:
        """Overlays without a journal and without an unfinished VMBackup, which would adopt them."""
        known = {disk.overlay for record in records if not record.done for disk in record.disks}
        found: list[_Orphan] = []
        for domain in self._seen:
            mine: list[_Orphan] = []
            for overlay in domain.overlays:
                seen = listed.get(overlay.uid8)
                if overlay.path in known or (seen is not None and not seen.over):
                    continue
                subject = self._node if seen is None else seen.identity
                whose = f"a backup with the uid {overlay.uid8}…, whose journal is lost"
                story = f"left on the domain {domain.guest.name} by {whose}: {self._fate(domain, overlay)}"
                mine.append(_Orphan(overlay.path, subject, story, domain.guest if domain.live else None))
            if mine and await self._is_free(domain.guest.uuid):
                found += mine
        return found

    def _fate(self, domain: Leftovers, overlay: OurOverlay) -> str:
        if overlay.buried:
            return "commit the overlay above it first, which is not ours"
        if self._policy is OrphanPolicy.REPORT:
            return "the next backup of the domain will commit it (--orphan-policy Report)"
        return "committing it now" if domain.live else "start the guest, then it will be committed"

    async def _is_free(self, domain_uuid: str) -> bool:
        """Whether no process works on this domain. If one does, its overlays are not orphans."""
        return await self._context.threads.call(no_process_works_on, self._context.node, domain_uuid)

    async def _resume_held(self) -> None:
        """Resume and thaw guests held by a lost backup, whatever the policy."""
        for domain in self._seen:
            if domain.mark is not None:
                await self._take_over(domain.guest, [])

    async def _take_over(self, guest: Guest, overlays: Sequence[str]) -> None:
        """Create a record for overlays without a journal, and merge them."""
        spec = {"nodeName": self._node.name, "domain": guest.uuid, "storeRef": {"name": "none"}}
        try:
            record = await self._context.threads.call(take_over_lost, self._context.node, guest, overlays, spec)
        except VMBackupError as error:
            _log.warning("domain %s: the overlays of a lost backup cannot be merged: %s", guest.name, error)
            return
        if record is not None:
            self.bring_home(record)

    # -- merge

    async def _bring_home(self, record: Record) -> None:
        context = self._context
        name = record.name if replaces_lost_journal(record) else record.full_name
        reporter = OrphanReporter(name, context.events, _subject(record, self._node))
        ticket = Ticket(record.uid, name, record.domain_uuid, begun=True, since="")
        spec, retry = spec_of(record), f"sweep-{time.time():.0f}"
        halfway = self._policy is OrphanPolicy.REPORT
        backup = Backup(
            context.node,
            record.identity,
            request=lambda: Request(
                spec, deleted=True, retry=retry, stop=self._stopped or (halfway and self._guest_runs(record))
            ),
            open_store=lambda: self._store(spec),
            reporter=reporter,
        )
        try:
            await context.queue.enter(
                ticket, lambda why: _log.info("%s is gone; merging its overlays waits: %s", name, why)
            )
            context.queue.park(ticket)
            _log.info("%s is gone; %s", name, "resuming its guest" if halfway else "merging its overlays")
            await context.threads.run(backup.run, f"merge-{record.name}")
            if halfway and replaces_lost_journal(record):
                await context.threads.call(journals.forget, context.node.state_dir, record.uid)
            else:
                await self._tell_home(record, reporter)
        except Exception:
            _log.exception("%s is gone, and its overlays could not be merged: the next sweep tries again", name)
        finally:
            context.queue.leave(ticket)
            context.queue.unreserve(record.uid)
            self._merging.pop(record.uid, None)
            await self._count()

    def _guest_runs(self, record: Record) -> bool:
        """Whether the guest is no longer held by this backup. Called by its thread."""
        now = journals.record_of(self._context.node.state_dir, record.uid)
        return now is None or not may_hold_guest(now)

    async def _tell_home(self, record: Record, reporter: OrphanReporter) -> None:
        """Report overlays that are merged. A recorded orphan does that itself."""
        left = await self._context.threads.call(journals.record_of, self._context.node.state_dir, record.uid)
        if left is None and record.disks and not record.orphan:
            overlays = ", ".join(disk.overlay for disk in record.disks)
            reporter.event("OrphanHome", f"the orphaned overlay is merged: {overlays}")

    def _store(self, spec: BackupSpec) -> Store:
        return open_store(self._context.cluster.store(spec.store))

    # -- report

    def _tell(self, found: Iterable[_Orphan]) -> None:
        """Create one event for each new orphan and each new foreign overlay."""
        told: set[str] = set()
        for orphan in found:
            self._tell_once(told, orphan.path, orphan.subject, "OrphanOverlay", orphan.story)
        for domain in self._seen:
            for path, target in domain.foreign_overlays.items():
                story = (
                    f"disk {target} of the domain {domain.guest.name} writes it, and would boot an older image at the "
                    "next start; it is not ours: commit it (virsh blockcommit --shallow --active --pivot)"
                )
                self._tell_once(told, path, self._node, "ForeignOverlay", story)
        self._told = told

    def _tell_once(self, told: set[str], path: str, subject: Subject, reason: str, story: str) -> None:
        told.add(path)
        if path not in self._told:
            _log.warning("%s: %s: %s", reason, path, story)
            self._context.events.warning(subject, reason, f"{path}: {story}")

    async def _count(self) -> None:
        self._context.node.metrics.orphans(len(await self._files.of(self._overlays)))


def _forgotten(
    records: Iterable[Record], gone: Sequence[Record], node: NodeRef, there: Collection[str]
) -> Iterator[_Orphan]:
    """The overlays with a journal whose VMBackup is gone, or is about to be removed."""
    for record in records:
        if record.orphan or record in gone:
            story = f"left on the domain {record.domain} by {record.full_name}, which is gone"
            yield from (_Orphan(path, _subject(record, node), story) for path in _left(record, there))


def _is_interrupted(record: Record) -> bool:
    """A record of `vmbackup run`, which only its user continues."""
    return not record.spec and record.begun


def _is_left(record: Record, gone: Sequence[Record]) -> bool:
    """Its overlays, if any are left, are orphans."""
    return record.orphan or record in gone or _is_interrupted(record)


def _left(record: Record, there: Collection[str]) -> list[str]:
    return [disk.overlay for disk in record.disks if disk.overlay in there]


def _subject(record: Record, node: NodeRef) -> Subject:
    return node if replaces_lost_journal(record) else record.identity
