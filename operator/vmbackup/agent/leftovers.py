"""Overlays that nobody waits for: told, counted, and brought home where that is the policy."""

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
from vmbackup.reconcile.leftovers.held_guests import holds
from vmbackup.reconcile.leftovers.orphans import (
    Look,
    OurOverlay,
    foreign_overlays,
    is_marked,
    is_orphan_record,
    look_at,
    nobody_works_on,
    our_overlays,
    take_in,
)
from vmbackup.reconcile.request import Request, spec_of
from vmbackup.reconcile.state import journal as journals
from vmbackup.stores.base import Store
from vmbackup.stores.registry import open_store

_log = logging.getLogger(__name__)


class OrphanPolicy(StrEnum):
    """What becomes of an overlay that nobody waits for. A VMBackup that is being deleted waits for its own."""

    COMMIT = "Commit"
    REPORT = "Report"


@dataclass(frozen=True)
class _Orphan:
    """One that was found. `guest`: the one that runs on it, where no journal knows it."""

    path: str
    subject: Subject
    story: str
    guest: Guest | None = None


class Orphans:
    """Those of one node. Belongs to the event loop.

    An orphan is an overlay of ours whose VMBackup is gone (with its journal here), whose journal is lost (with no
    VMBackup here that is about to adopt it), or of a `vmbackup run` that was interrupted, which only its user carries
    on. Where another process works on the domain, it is left to that.
    """

    def __init__(self, context: Context, node_name: str, policy: OrphanPolicy) -> None:
        self._context = context
        self._node = NodeRef(node_name)
        self._policy = policy
        self._files = ExistingFiles(context.threads)
        self._merging: dict[str, asyncio.Task[None]] = {}
        self._overlays: set[str] = set()
        self._told: set[str] = set()
        self._seen: list[Look] = []
        self._stopped = False

    def stop(self) -> None:
        """This process is to end."""
        self._stopped = True

    async def begin(self) -> None:
        """Before the API server has answered: no guest stands still for it, whose backup is lost."""
        await self.see()
        await self._let_go()

    async def see(self) -> None:
        """See all domains. Before journals are read: whatever has no journal then, never will have one."""
        try:
            self._seen = await self._context.threads.call(self._look)
        except VMBackupError as error:  # what was seen last counts on
            _log.warning("the domains cannot be looked at: %s", error)
            return
        self._context.node.metrics.domains(name for look in self._seen for name in (look.guest.name, look.guest.uuid))

    async def look(self, records: Sequence[Record], gone: Sequence[Record], backups: Iterable[BackupResource]) -> None:
        """Tell, count and bring home what is left over.

        `gone`: those of the records whose VMBackup is gone with something left to do; `backups`: all of this node.
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
        await self._let_go()
        if self._policy is OrphanPolicy.COMMIT:
            guests = {orphan.guest.uuid: orphan.guest for orphan in found if orphan.guest is not None}
            for guest in guests.values():
                await self._take_in(guest, [orphan.path for orphan in found if orphan.guest is guest])

    def bring_home(self, record: Record) -> None:
        """Bring the chain of this record home, whose VMBackup is gone; or only to a safe point, as the policy says."""
        if record.uid in self._merging or self._stopped:
            return
        if self._policy is OrphanPolicy.REPORT and not holds(record):
            self._context.queue.unreserve(record.uid)  # the next backup of its domain adopts what it left
        else:
            self._merging[record.uid] = asyncio.create_task(self._bring_home(record))

    # -- what is found

    def _look(self) -> list[Look]:
        return list(look_at(self._context.node.hypervisor.guests()))

    async def _interrupted(self, records: Iterable[Record], there: Collection[str]) -> list[_Orphan]:
        """The overlays of runs of `vmbackup run` that were interrupted, and that nobody has carried on yet."""
        found: list[_Orphan] = []
        for record in records:
            left = _left(record, there) if _is_interrupted(record) else []
            if left and await self._is_free(record.domain_uuid):
                run = f"`vmbackup run` of {record.full_name}"
                story = f"left on the domain {record.domain} by an interrupted {run}: run it again, and it carries on"
                found += [_Orphan(path, self._node, story) for path in left]
        return found

    async def _unknown(self, records: Iterable[Record], listed: Mapping[str, BackupResource]) -> list[_Orphan]:
        """Overlays that no journal knows, nor a VMBackup that is not over: that one adopts its own."""
        known = {disk.overlay for record in records if not record.done for disk in record.disks}
        found: list[_Orphan] = []
        for look in self._seen:
            mine: list[_Orphan] = []
            for overlay in our_overlays(look):
                seen = listed.get(overlay.uid8)
                if overlay.path in known or (seen is not None and not seen.over):
                    continue
                subject = self._node if seen is None else seen.identity
                whose = f"a backup with the uid {overlay.uid8}…, of which no journal is here"
                story = f"left on the domain {look.guest.name} by {whose}: {self._fate(look, overlay)}"
                mine.append(_Orphan(overlay.path, subject, story, look.guest if look.live else None))
            if mine and await self._is_free(look.guest.uuid):
                found += mine
        return found

    def _fate(self, look: Look, overlay: OurOverlay) -> str:
        if overlay.buried:
            return "another overlay, which is not ours, is above it: commit that one first"
        if self._policy is OrphanPolicy.REPORT:
            return "it stays (--orphan-policy Report), the next backup of the domain commits it"
        return "it is committed now" if look.live else "start the guest, and it is committed"

    async def _is_free(self, domain_uuid: str) -> bool:
        """Whether nobody works on this domain: what somebody works on is no orphan."""
        return await self._context.threads.call(nobody_works_on, self._context.node, domain_uuid)

    async def _let_go(self) -> None:
        """Let go of guests that stand still since a backup was lost, whatever the policy."""
        for look in self._seen:
            if is_marked(look):
                await self._take_in(look.guest, [])

    async def _take_in(self, guest: Guest, overlays: Sequence[str]) -> None:
        """Give what no journal knows a record again, and bring it home."""
        spec = {"nodeName": self._node.name, "domain": guest.uuid, "storeRef": {"name": "none"}}
        try:
            record = await self._context.threads.call(take_in, self._context.node, guest, overlays, spec)
        except VMBackupError as error:
            _log.warning("domain %s: what a lost backup left cannot be taken care of: %s", guest.name, error)
            return
        if record is not None:
            self.bring_home(record)

    # -- the way home

    async def _bring_home(self, record: Record) -> None:
        context = self._context
        name = record.name if is_orphan_record(record) else record.full_name
        reporter = OrphanReporter(name, context.events, _subject(record, self._node))
        ticket = Ticket(record.uid, name, record.domain_uuid, begun=True, since="")
        spec, retry = spec_of(record), f"sweep-{time.time():.0f}"
        halfway = self._policy is OrphanPolicy.REPORT
        backup = Backup(
            context.node,
            record.identity,
            request=lambda: Request(
                spec, deleted=True, retry=retry, stop=self._stopped or (halfway and self._rests(record))
            ),
            open_store=lambda: self._store(spec),
            reporter=reporter,
        )
        try:
            await context.queue.enter(ticket, lambda why: _log.info("%s, which is gone, waits: %s", name, why))
            context.queue.park(ticket)
            _log.info("%s is gone, its journal is not: bringing the chain %s", name, "to rest" if halfway else "home")
            await context.threads.run(backup.run, f"merge-{record.name}")
            if halfway and is_orphan_record(record):
                await context.threads.call(journals.forget, context.node.state_dir, record.uid)
            else:
                await self._tell_home(record, reporter)
        except Exception:
            _log.exception("%s is gone, and its chain could not be brought home: the next sweep tries again", name)
        finally:
            context.queue.leave(ticket)
            context.queue.unreserve(record.uid)
            self._merging.pop(record.uid, None)
            await self._count()

    def _rests(self, record: Record) -> bool:
        """Whether the guest does not stand still for this one any more. Called by its thread."""
        now = journals.record_of(self._context.node.state_dir, record.uid)
        return now is None or not holds(now)

    async def _tell_home(self, record: Record, reporter: OrphanReporter) -> None:
        """An orphan that was recorded tells itself that it is home."""
        left = await self._context.threads.call(journals.record_of, self._context.node.state_dir, record.uid)
        if left is None and record.disks and not record.orphan:
            overlays = ", ".join(disk.overlay for disk in record.disks)
            reporter.event("OrphanHome", f"the overlay that was left is home: {overlays}")

    def _store(self, spec: BackupSpec) -> Store:
        return open_store(self._context.cluster.store(spec.store))

    # -- telling

    def _tell(self, found: Iterable[_Orphan]) -> None:
        """One event for each, and for each foreign overlay, when it is seen first."""
        told: set[str] = set()
        for orphan in found:
            self._tell_once(told, orphan.path, orphan.subject, "OrphanOverlay", orphan.story)
        for look in self._seen:
            for path, target in foreign_overlays(look).items():
                story = (
                    f"disk {target} of the domain {look.guest.name} writes it, and goes back to an older image at the "
                    "next start; it is not ours and stays: commit it (virsh blockcommit --shallow --active --pivot)"
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
    """The overlays of those whose VMBackup is gone, or is about to be, and whose journal is here."""
    for record in records:
        if record.orphan or record in gone:
            story = f"left on the domain {record.domain} by {record.full_name}, which is gone"
            yield from (_Orphan(path, _subject(record, node), story) for path in _left(record, there))


def _is_interrupted(record: Record) -> bool:
    """One of `vmbackup run`, which only its user carries on."""
    return not record.spec and record.begun


def _is_left(record: Record, gone: Sequence[Record]) -> bool:
    """Nobody waits for what it may have left."""
    return record.orphan or record in gone or _is_interrupted(record)


def _left(record: Record, there: Collection[str]) -> list[str]:
    return [disk.overlay for disk in record.disks if disk.overlay in there]


def _subject(record: Record, node: NodeRef) -> Subject:
    return node if is_orphan_record(record) else record.identity
