"""The one way to take leftovers over: a record that merges the overlays and lets the guest run again."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from vmbackup.errors import TransientError
from vmbackup.hypervisor import chain
from vmbackup.hypervisor.guest import Guest
from vmbackup.hypervisor.mark import Mark, MarkedDisk
from vmbackup.protocol.record import Copy, DiskRecord, Freeze, Guard, Record, Snapshot
from vmbackup.protocol.terms import Power
from vmbackup.reconcile.leftovers.reader import Leftovers, MarkState, mark_state, read_leftovers, with_identity
from vmbackup.reconcile.node import Node
from vmbackup.reconcile.state.clock import boot_id
from vmbackup.reconcile.state.domain_lock import domain_lock
from vmbackup.reconcile.state.journal import Journal

_UID = "orphan-"


def take_over(
    record: Record, leftovers: Leftovers, disks: Iterable[DiskRecord], lost_mark: Mark | None
) -> Record | None:
    """The record with these disks, which are merged but not copied (PROTOCOL R7); None if nothing is left.

    With a `lost_mark` it also takes over the guest that the lost backup suspended or froze: it settles P on the images
    that QEMU writes, resumes and thaws. Raises TransientError while a call to libvirt is under way there: no journal
    tells of the calls of a lost backup.
    """
    record = replace(record, disks=tuple(disks), snapshot=Snapshot.ADOPTED)
    if lost_mark is not None:
        return _with_held_guest(record, leftovers, lost_mark)
    return record if record.disks else None


def _with_held_guest(record: Record, leftovers: Leftovers, mark: Mark) -> Record:
    """The record, which also has the disks named by the mark, with the overlays that they had or were to have."""
    guest, live = leftovers.guest, leftovers.live or "<domain/>"
    if not guest.control_idle():
        raise TransientError(
            f"{guest.name} is suspended or frozen by a lost backup, and a libvirt call is still running on it",
            reason="StateChanged",
        )
    known = {disk.target for disk in record.disks}
    found = {disk.target: disk for disk in chain.disks(live)}
    lost = [
        disk
        for disk in mark.disks
        if disk.target in found and disk.target not in known and found[disk.target].source != disk.overlay
    ]
    return replace(
        record,
        disks=(*record.disks, *(_on_base(disk, found[disk.target], mark, live, leftovers.persistent) for disk in lost)),
        guard=Guard.OURS if guest.state()[0] is Power.PAUSED else Guard.NONE,  # asked again: no call is running now
        freeze=Freeze.THAW_DUE if mark.frozen else Freeze.NONE,
    )


def _on_base(lost: MarkedDisk, disk: chain.Disk, mark: Mark, live: str, persistent: str | None) -> DiskRecord:
    """A marked disk that is on its base. Those on their overlay are found by the overlay's name."""
    defined = {each.target: each.source for each in chain.disks(persistent)} if persistent else {}
    same = persistent is not None and defined.get(disk.target) == disk.source
    taken_over = DiskRecord(
        disk.target,
        base=disk.source or "",
        overlay=lost.overlay,
        owner=f"a backup with the uid {mark.uid[:8]}…",
        format=disk.format,
        backing=tuple((image.path, image.format) for image in disk.chain),
        persistent_disk_xml=chain.disk_xml(persistent if same and persistent else live, disk.target),
        pivot_intended=lost.pivoting,
    )
    return with_identity(taken_over, disk.source)


def replaces_lost_journal(record: Record) -> bool:
    """Whether `take_over_lost` made this record: its own journal is lost, and it belongs to no VMBackup."""
    return record.uid.startswith(_UID)


def take_over_lost(node: Node, guest: Guest, overlays: Iterable[str], spec: dict[str, Any]) -> Record | None:
    """Start a journal for those of these overlays that the guest is on, so that they can be merged.

    Also takes over a guest that a lost backup left suspended or frozen. None: neither is there (any more), or another
    process works on the domain. `spec`: of a VMBackup. Raises VMBackupError.
    """
    uid = f"{_UID}{guest.uuid}"
    with _try_lock(node, uid) as mine, _try_lock(node, guest.uuid) as held:
        if not (mine and held):
            return None
        records = node.records()
        earlier = [record for record in records if record.uid == uid]
        begun = [record for record in records if record.uid != uid and record.snapshot is not Snapshot.NONE]
        others = {disk.overlay for record in begun for disk in record.disks}
        wanted = set(overlays) | {disk.overlay for record in earlier for disk in record.disks}
        leftovers = read_leftovers(guest)
        mark = leftovers.lost_mark(records)
        if mark is not None:
            wanted |= {disk.overlay for disk in mark.disks}
        disks = [disk for disk in leftovers.disks(earlier) if disk.overlay in wanted - others]
        record = take_over(_new_record(uid, guest, spec), leftovers, disks, mark)
        if record is None:
            _clear_stale_mark(leftovers, records)
            return None
        Journal.start(node.state_dir, record).close()
        return record


def _new_record(uid: str, guest: Guest, spec: dict[str, Any]) -> Record:
    """A record that copies nothing and is done once its disks are merged."""
    return Record(
        uid,
        namespace="",
        name=f"orphan-of-{guest.name}",
        domain=guest.name,
        domain_uuid=guest.uuid,
        spec=spec,
        copy=Copy.FAILED,
        copy_error="the journal of its backup is lost",
        finished=True,
        boot_id=boot_id(),
        orphan=True,
    )


def _clear_stale_mark(leftovers: Leftovers, records: Iterable[Record]) -> None:
    """Remove a stale mark, so that a guest that somebody suspends later is not mistaken for ours.

    Not journalled: at worst it removes the mark of a backup that has started meanwhile.
    """
    guest, mark = leftovers.guest, leftovers.mark
    if mark is not None and mark_state(mark, records) is not MarkState.KNOWN and guest.control_idle():
        guest.mark(None)


def no_process_works_on(node: Node, domain_uuid: str) -> bool:
    """Whether no process, this one or another, works on this domain."""
    with _try_lock(node, domain_uuid) as held:
        return held


def _try_lock(node: Node, name: str) -> AbstractContextManager[bool]:
    return domain_lock(name, lambda: False, node.lock_dir)
