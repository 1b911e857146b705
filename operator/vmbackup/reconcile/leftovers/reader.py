"""The one reader of leftovers: what earlier or lost backups left on a domain. Changes nothing."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum, auto
from pathlib import Path

from vmbackup.errors import Cause, RefusedError, VMBackupError
from vmbackup.hypervisor import chain
from vmbackup.hypervisor.guest import Guest
from vmbackup.hypervisor.mark import Mark
from vmbackup.imaging import image
from vmbackup.imaging.locks import has_writer, is_locked
from vmbackup.protocol.record import DiskRecord, Record, Snapshot
from vmbackup.protocol.terms import Power

_log = logging.getLogger(__name__)

_NO_DOMAIN = "<domain/>"


@dataclass(frozen=True)
class OurOverlay:
    """An overlay with a name of ours. `uid8`: the start of its backup's uid. `buried`: another overlay is above it."""

    path: str
    uid8: str
    buried: bool


class MarkState(Enum):
    """What a mark on a domain means while no process works on that domain."""

    KNOWN = auto()  # its backup has a journal and still holds the guest: that backup resumes it
    LOST = auto()  # its backup has no journal: another one must resume and thaw the guest
    STALE = auto()  # its backup has a journal and does not hold the guest: only the mark was left


@dataclass(frozen=True)
class Leftovers:
    """What backups may have left on one domain, as libvirt showed it at one moment.

    `live`: None when off. `persistent`: None for a transient domain. `paused` is known only for a domain with a mark.
    Only `disks` looks at files, so the rest cannot block on a dead mount.
    """

    guest: Guest
    live: str | None
    persistent: str | None
    paused: bool = False

    @property
    def mark(self) -> Mark | None:
        """The mark of a backup that holds the guest, or that left only the mark."""
        return Mark.of(self.live) if self.live else None

    @property
    def overlays(self) -> list[OurOverlay]:
        """Our overlays in the disk chains of this domain, now or at its next start."""
        found: dict[str, OurOverlay] = {}
        for xml in filter(None, (self.persistent, self.live)):
            for disk in chain.disks(xml):
                for path in (disk.source or "", *(below.path for below in disk.chain)):
                    if named := chain.parse_overlay(path):
                        found[path] = OurOverlay(path, named[0], buried=path != disk.source)
        return list(found.values())

    @property
    def foreign_overlays(self) -> dict[str, str]:
        """Overlays of other tools that a disk leaves when its guest stops: path to target.

        They are recognized by a definition that names an image below the one that the guest writes. An overlay that the
        definition names too may be intended, for example over a template.
        """
        if not self.live or not self.persistent:
            return {}
        defined = {disk.target: disk.source for disk in chain.disks(self.persistent)}
        return {
            disk.source: disk.target
            for disk in chain.disks(self.live)
            if disk.source
            and not chain.parse_overlay(disk.source)
            and defined.get(disk.target) in [below.path for below in disk.chain]
        }

    def lost_mark(self, records: Iterable[Record]) -> Mark | None:
        """The mark of a lost backup that left the guest suspended or frozen. `records`: of this domain at least."""
        mark = self.mark
        if mark is None or mark_state(mark, records) is not MarkState.LOST:
            return None
        return mark if mark.frozen or self.paused else None

    def disks(self, earlier: Iterable[Record]) -> tuple[DiskRecord, ...]:
        """The disks that are on an overlay of ours, or whose overlay is still there. `earlier`: of this domain.

        Raises RefusedError for an overlay without a base, and as `imaging.errors` says.
        """
        known = {
            disk.overlay: replace(disk, owner=disk.owner or record.full_name)
            for record in earlier
            for disk in record.disks
            if record.snapshot is not Snapshot.NONE
        }
        left = {disk.target: disk for overlay, disk in known.items() if os.path.lexists(overlay)}
        defined = {disk.target: disk.source or "" for disk in chain.disks(self.persistent or _NO_DOMAIN)}
        for disk in chain.disks(self.live or self.persistent or _NO_DOMAIN):
            next_start = defined.get(disk.target, "")
            if disk.source and disk.source in known:
                left[disk.target] = known[disk.source]
            elif self.live and disk.source and chain.parse_overlay(disk.source):
                left[disk.target] = _on_unknown_overlay(disk, self.live, self.persistent)
            elif self.live and disk.source and disk.target not in left and _is_on_base_of(next_start, disk):
                left[disk.target] = DiskRecord(
                    disk.target,
                    base=disk.source,
                    overlay=next_start,
                    owner=_owner(next_start),
                    format=disk.format,
                    backing=tuple((below.path, below.format) for below in disk.chain),
                    persistent_disk_xml=chain.disk_xml(self.live, disk.target),
                )
        live = {disk.target: disk.source for disk in chain.disks(self.live or _NO_DOMAIN)}
        return tuple(
            with_identity(replace(disk, failures=0, retry_at=0.0, commit_running=False), live.get(disk.target))
            for disk in left.values()
        )


def with_identity(disk: DiskRecord, written: str | None) -> DiskRecord:
    """The disk, with which file its base is, where that is not known and QEMU's locks show that it uses that very file.

    `written`: the image that the guest writes now, by its live XML; None if it is off.
    """
    if disk.base_inode or written not in (disk.base, disk.overlay):
        return disk
    base = Path(disk.base)
    try:
        if not (has_writer if written == disk.base else is_locked)(base):
            return disk
        status = base.stat()
    except (VMBackupError, OSError):  # it cannot be inspected now: nothing is known of it, as before
        return disk
    if not stat.S_ISREG(status.st_mode):
        return disk
    return replace(disk, base_inode=status.st_ino, base_bytes=status.st_size, base_locked=True)


def read_leftovers(guest: Guest) -> Leftovers:
    """Look at one domain. Raises VMBackupError."""
    live, persistent = guest.live_xml(), guest.persistent_xml()
    marked = live is not None and Mark.of(live) is not None
    return Leftovers(guest, live, persistent, paused=marked and guest.state()[0] is Power.PAUSED)


def read_all(guests: Iterable[Guest]) -> Iterator[Leftovers]:
    """Look at these domains; leave out those that no longer exist. Raises TransientError while libvirtd is away.

    A domain that cannot be inspected is logged and yielded without XML: nothing is found on it, so nothing is touched.
    """
    for guest in guests:
        try:
            leftovers = read_leftovers(guest)
        except VMBackupError as error:
            if error.reason == Cause.HYPERVISOR_AWAY:
                raise
            if error.reason == Cause.DOMAIN_NOT_FOUND:
                continue
            _log.warning("skipping a domain that could not be inspected: %s", error)
            leftovers = Leftovers(guest, None, None)
        yield leftovers


def mark_state(mark: Mark, records: Iterable[Record]) -> MarkState:
    """What the mark means, given these journals.

    A record that has not begun its snapshot says nothing: it was started after the journal with that uid was lost.
    """
    same_backup = [record for record in records if record.uid == mark.uid]
    if any(may_hold_guest(record) for record in same_backup):
        return MarkState.KNOWN
    began = any(record.snapshot is not Snapshot.NONE for record in same_backup)
    return MarkState.STALE if began else MarkState.LOST


def may_hold_guest(record: Record) -> bool:
    """Whether the guest is, or may be, suspended or frozen by this backup."""
    return record.holds_guest or record.call is not None


def _is_on_base_of(overlay: str, disk: chain.Disk) -> bool:
    """Whether the disk is on the base of this overlay, which is ours and which the next start would use."""
    if not chain.parse_overlay(overlay) or not os.path.lexists(overlay):
        return False
    below = image.images_below(Path(overlay))
    return bool(below) and os.path.realpath(below[0]) == os.path.realpath(disk.source or "")


def _owner(overlay: str) -> str:
    """The backup that made the overlay, as far as its name says."""
    named = chain.parse_overlay(overlay)
    return f"a backup with the uid {named[0]}…" if named else ""


def _on_unknown_overlay(disk: chain.Disk, live: str, persistent: str | None) -> DiskRecord:
    """A disk on an overlay with a name of ours that no journal knows. Its base is the next image in the chain."""
    if not disk.source or not disk.chain:
        raise RefusedError(
            f"disk {disk.target}: {disk.source} is named like one of vmbackup's overlays, but has no base below it",
            reason="BaseMissing",
        )
    below = disk.chain[0]
    on_base = ""
    if persistent is not None:
        named = {each.target: each.source for each in chain.disks(persistent)}.get(disk.target)
        stays = named == below.path
        on_base = chain.disk_xml(persistent, disk.target) if stays else chain.on_base(chain.disk_xml(live, disk.target))
    return DiskRecord(
        disk.target,
        base=below.path,
        overlay=disk.source,
        owner=_owner(disk.source),
        format=below.format,
        backing=tuple((deeper.path, deeper.format) for deeper in disk.chain[1:]),
        persistent_disk_xml=on_base,
    )
