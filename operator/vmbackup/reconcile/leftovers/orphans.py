"""Overlays of our own making that no backup knows: found on the domains of a hypervisor, and given a record again."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from vmbackup.errors import Cause, VMBackupError
from vmbackup.hypervisor import chain
from vmbackup.hypervisor.guest import Guest
from vmbackup.hypervisor.mark import Mark
from vmbackup.protocol.record import Copy, Record, Snapshot
from vmbackup.reconcile.leftovers.held_guests import Standing, lost_hold, standing, taken_back
from vmbackup.reconcile.leftovers.overlays import left_on_overlay
from vmbackup.reconcile.node import Node
from vmbackup.reconcile.state.clock import boot_id
from vmbackup.reconcile.state.domain_lock import domain_lock
from vmbackup.reconcile.state.journal import Journal

_log = logging.getLogger(__name__)

_UID = "orphan-"


@dataclass(frozen=True)
class Look:
    """A domain as it was seen: its live XML (None when off) and its persistent XML (None if it is transient)."""

    guest: Guest
    live: str | None
    persistent: str | None


def look_at(guests: Iterable[Guest]) -> Iterator[Look]:
    """Look at these domains, leaving out what went away meanwhile. Raises TransientError while libvirtd is away.

    Of one that cannot be looked at nothing is known, which is told and is safe: what nobody has seen is left alone.
    """
    for guest in guests:
        try:
            look = Look(guest, guest.live_xml(), guest.persistent_xml())
        except VMBackupError as error:
            if error.reason == Cause.HYPERVISOR_AWAY:
                raise
            if error.reason == Cause.DOMAIN_NOT_FOUND:
                continue
            _log.warning("what a backup may have left on a domain is not seen this time: %s", error)
            look = Look(guest, None, None)
        yield look


def is_marked(look: Look) -> bool:
    """Whether a backup holds its guest still, or has left its mark."""
    return look.live is not None and Mark.of(look.live) is not None


@dataclass(frozen=True)
class OurOverlay:
    """An overlay that is named as ours are, with the start of the uid of its backup. `buried`: another is above it."""

    path: str
    uid8: str
    buried: bool


def our_overlays(look: Look) -> list[OurOverlay]:
    """Those that a disk of this domain is on, now or at its next start, or that are below that."""
    found: dict[str, OurOverlay] = {}
    for xml in filter(None, (look.persistent, look.live)):
        for disk in chain.disks(xml):
            for path in (disk.source or "", *(image.path for image in disk.chain)):
                if named := chain.parse_overlay(path):
                    found[path] = OurOverlay(path, named[0], buried=path != disk.source)
    return list(found.values())


def foreign_overlays(look: Look) -> dict[str, str]:
    """Somebody else's overlays that a disk is on until its guest stops, and no longer: path to target.

    That is what can be told: its definition names an image below the one that it writes. An overlay that the definition
    names too may be meant to stay, as over a template.
    """
    if not look.live or not look.persistent:
        return {}
    defined = {disk.target: disk.source for disk in chain.disks(look.persistent)}
    return {
        disk.source: disk.target
        for disk in chain.disks(look.live)
        if disk.source
        and not chain.parse_overlay(disk.source)
        and defined.get(disk.target) in [image.path for image in disk.chain]
    }


def is_orphan_record(record: Record) -> bool:
    """Whether this is the record of overlays whose own is lost: it regards no VMBackup."""
    return record.uid.startswith(_UID)


def take_in(node: Node, guest: Guest, overlays: Iterable[str], spec: dict[str, Any]) -> Record | None:
    """Start a journal for those of these overlays that the guest is on: its VMBackup is gone, its end is to come home.

    So too for a guest that stands still since a lost backup, whose mark it bears. None: there is neither (any more), or
    another process is at work on its domain. `spec`: of a VMBackup. Raises VMBackupError.
    """
    uid = f"{_UID}{guest.uuid}"
    with _at_once(node, uid) as mine, _at_once(node, guest.uuid) as held:
        if not (mine and held):
            return None
        records = node.records()
        earlier = [record for record in records if record.uid == uid]
        begun = [record for record in records if record.uid != uid and record.snapshot is not Snapshot.NONE]
        others = {disk.overlay for record in begun for disk in record.disks}
        wanted = set(overlays) | {disk.overlay for record in earlier for disk in record.disks}
        live, persistent = guest.live_xml(), guest.persistent_xml()
        if mark := lost_hold(guest, live, records):
            wanted |= {disk.overlay for disk in mark.disks}
        left = [disk for disk in left_on_overlay(live, persistent, earlier) if disk.overlay in wanted - others]
        record = Record(
            uid,
            namespace="",
            name=f"orphan-of-{guest.name}",
            domain=guest.name,
            domain_uuid=guest.uuid,
            spec=spec,
            disks=tuple(left),
            snapshot=Snapshot.ADOPTED,  # PROTOCOL R7: never copied
            copy=Copy.FAILED,
            copy_error="the journal of its backup is lost",
            finished=True,
            boot_id=boot_id(),
            orphan=True,
        )
        if mark and live:
            record = taken_back(record, mark, guest, live, persistent)
        elif not left:
            _clear_mark(guest, live, records)
            return None
        Journal.start(node.state_dir, record).close()
        return record


def _clear_mark(guest: Guest, live: str | None, records: Iterable[Record]) -> None:
    """Take away a mark that was only left: a guest that somebody suspends later is not to be taken for held by us.

    It is no call of a backup, so in no journal: at its worst it takes away the second copy of one that has begun since.
    """
    mark = Mark.of(live) if live else None
    if mark is not None and standing(mark, records) is not Standing.KNOWN and guest.control_idle():
        guest.mark(None)


def nobody_works_on(node: Node, domain_uuid: str) -> bool:
    """Whether no process, of ours or another, has this domain."""
    with _at_once(node, domain_uuid) as held:
        return held


def _at_once(node: Node, name: str) -> AbstractContextManager[bool]:
    return domain_lock(name, lambda: False, node.lock_dir)
