"""A guest that a backup holds still, and whose journal is lost: the live metadata of its domain says so."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from enum import Enum, auto

from vmbackup.errors import TransientError
from vmbackup.hypervisor import chain
from vmbackup.hypervisor.guest import Guest
from vmbackup.hypervisor.mark import Mark, MarkedDisk
from vmbackup.protocol.record import DiskRecord, Freeze, Guard, Record, Snapshot
from vmbackup.protocol.terms import Power


class Standing(Enum):
    """What a mark means, while nobody works on the domain."""

    KNOWN = auto()  # its backup has a journal, and lets go of the guest itself
    LOST = auto()  # it has none: whoever finds it lets go of the guest
    STALE = auto()  # its backup has a journal, and does not hold the guest: the mark was only left


def standing(mark: Mark, records: Iterable[Record]) -> Standing:
    """What it means beside these journals.

    One that has not begun its snapshot tells nothing: it was started after the one that did was lost.
    """
    mine = [record for record in records if record.uid == mark.uid]
    if any(holds(record) for record in mine):
        return Standing.KNOWN
    return Standing.STALE if any(record.snapshot is not Snapshot.NONE for record in mine) else Standing.LOST


def holds(record: Record) -> bool:
    """Whether the guest is, or may be, suspended or frozen by this backup."""
    return record.holds_guest or record.call is not None


def lost_hold(guest: Guest, live: str | None, records: Iterable[Record]) -> Mark | None:
    """The mark of a guest that stands still, and whose backup is lost. `records`: of this domain."""
    mark = Mark.of(live) if live else None
    if mark is None or standing(mark, records) is not Standing.LOST:
        return None
    return mark if mark.frozen or guest.state()[0] is Power.PAUSED else None


def taken_back(record: Record, mark: Mark, guest: Guest, live: str, persistent: str | None) -> Record:
    """The record, which takes over what the lost one held: to settle P on what QEMU writes, to resume, and to thaw.

    Its disks are also those of the lost one, with the overlays that they had, or were to have. Nothing is known of a
    call in flight, so none may be under way. Raises TransientError.
    """
    if not guest.control_idle():
        raise TransientError(f"{guest.name} is held by a lost backup, and a call is under way", reason="StateChanged")
    known = {disk.target for disk in record.disks}
    found = {disk.target: disk for disk in chain.disks(live)}
    lost = [
        disk
        for disk in mark.disks
        if disk.target in found and disk.target not in known and found[disk.target].source != disk.overlay
    ]
    return replace(
        record,
        disks=(*record.disks, *(_on_base(disk, found[disk.target], mark, live, persistent) for disk in lost)),
        snapshot=Snapshot.ADOPTED,
        guard=Guard.OURS if guest.state()[0] is Power.PAUSED else Guard.NONE,
        freeze=Freeze.THAW_DUE if mark.frozen else Freeze.NONE,
    )


def _on_base(lost: MarkedDisk, disk: chain.Disk, mark: Mark, live: str, persistent: str | None) -> DiskRecord:
    """A disk that is on its base: an overlay of ours that it is on is found by its name."""
    defined = {each.target: each.source for each in chain.disks(persistent)} if persistent else {}
    same = persistent is not None and defined.get(disk.target) == disk.source
    return DiskRecord(
        disk.target,
        base=disk.source or "",
        overlay=lost.overlay,
        owner=f"a backup with the uid {mark.uid[:8]}…",
        format=disk.format,
        backing=tuple((image.path, image.format) for image in disk.chain),
        persistent_disk_xml=chain.disk_xml(persistent if same and persistent else live, disk.target),
        pivot_intended=lost.pivoting,
    )
