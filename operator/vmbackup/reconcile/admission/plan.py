"""Admission: which disks of a domain are backed up, and why a backup is refused before anything is touched."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vmbackup.api.backup import BackupSpec
from vmbackup.errors import Cause, PermanentError, RefusedError
from vmbackup.hypervisor import chain
from vmbackup.hypervisor.guest import Guest
from vmbackup.hypervisor.hypervisor import Hypervisor
from vmbackup.imaging import image
from vmbackup.imaging.errors import errors_of
from vmbackup.imaging.locks import has_writer
from vmbackup.protocol import advice
from vmbackup.protocol.record import DiskRecord, Freeze, Record
from vmbackup.protocol.transition import planned_again
from vmbackup.reconcile.admission.overlay_space import with_room
from vmbackup.reconcile.leftovers.reader import read_leftovers
from vmbackup.reconcile.leftovers.takeover import take_over
from vmbackup.stores.base import DiskSource, SourceImage, Store


@dataclass(frozen=True)
class Planner:
    """Plans backups on one hypervisor.

    `overlay_dir`: where overlays go instead of beside their base. `image_roots`: where images may be, () for anywhere.
    """

    hypervisor: Hypervisor
    overlay_dir: Path | None = None
    image_roots: tuple[Path, ...] = ()

    def plan(
        self,
        record: Record,
        spec: BackupSpec,
        guest: Guest,
        open_store: Callable[[], Store],
        earlier: Iterable[Record],
    ) -> Record:
        """The record with its disks chosen, or with those that an earlier backup left on their overlay (PROTOCOL R7).

        The same holds for a guest that a lost backup left suspended or frozen. `earlier`: the records of the other
        backups of this domain.
        Raises RefusedError naming the field and the cure.
        """
        leftovers, earlier = read_leftovers(guest), list(earlier)
        live, persistent = leftovers.live, leftovers.persistent
        lost_mark = leftovers.lost_mark([*earlier, record])
        if lost_mark and lost_mark.frozen and record.freeze is Freeze.TRIED:  # a thaw was tried and failed
            raise RefusedError(advice.stays_frozen(guest.name), reason="GuestFrozen")
        record = replace(planned_again(record), disks=(), skipped=(), domain=guest.name, domain_uuid=guest.uuid)
        adopted = take_over(record, leftovers, leftovers.disks(earlier), lost_mark)
        if adopted is not None:
            return adopted
        if live is None:
            raise not_running(guest.name)
        chosen, skipped = choose(chain.disks(live), spec.disks)
        disks = self.admit(guest, chosen, record.uid, image_uses(self.hypervisor.guests()))
        if persistent is not None:
            disks = tuple(replace(d, persistent_disk_xml=chain.disk_xml(persistent, d.target)) for d in disks)
        disks = with_room(disks, open_store().check(record.identity, [source_of(disk) for disk in disks]))
        facts = chain.domain_facts(live)
        return replace(record, disks=disks, skipped=skipped, domain_xml=persistent or live, nvram=facts.nvram or "")

    def admit(
        self, guest: Guest, chosen: Sequence[chain.Disk], uid: str, uses: Iterable[ImageUse]
    ) -> tuple[DiskRecord, ...]:
        """The records of disks that can be backed up, room aside. `uses`: of all domains. Raises RefusedError."""
        _refuse_shared(guest, chosen, uses)
        disks = tuple(self._disk_record(disk, uid) for disk in chosen)
        _refuse_unwritable(disks)
        return disks

    def _disk_record(self, disk: chain.Disk, uid: str) -> DiskRecord:
        base = disk.source or ""
        self._refuse_outside(disk.target, (base, *(below.path for below in disk.chain)))
        overlay = chain.overlay_path(disk, uid[:8], str(self.overlay_dir) if self.overlay_dir else None)
        if os.path.lexists(overlay):
            raise RefusedError(
                f"disk {disk.target}: {overlay} already exists and was not created by this backup: find out what it "
                "is, and move it away",
                reason="OverlayExists",
            )
        info = image.info(Path(base), disk.format)
        if info.data_file or info.encrypted:
            what = "keeps its data in another file" if info.data_file else "is encrypted"
            raise RefusedError(f"disk {disk.target}: {base} {what}, which is not supported", reason="DiskNotEligible")
        status = Path(base).stat()
        is_file = stat.S_ISREG(status.st_mode)
        return DiskRecord(
            target=disk.target,
            base=base,
            overlay=overlay,
            format=disk.format,
            virtual_bytes=info.virtual_bytes,
            base_inode=status.st_ino if is_file else 0,
            base_bytes=status.st_size if is_file else 0,
            base_locked=is_file and has_writer(Path(base)),
            total_bytes=info.virtual_bytes,
            backing=tuple((below.path, below.format) for below in disk.chain),
        )

    def _refuse_outside(self, target: str, paths: Iterable[str]) -> None:
        roots = [root.resolve() for root in self.image_roots]
        for path in paths:
            if roots and not any(Path(os.path.realpath(path)).is_relative_to(root) for root in roots):
                raise RefusedError(
                    f"disk {target}: {path} is not in {', '.join(map(str, roots))}: move it there, or add "
                    "its directory to the agent's --image-roots",
                    reason="ImageOutsideRoots",
                )
            if roots and (names := _names(path)) > 1:
                raise RefusedError(
                    f"disk {target}: {path} has {names} names (hard links), and some may be outside of "
                    f"{', '.join(map(str, roots))}: use a separate copy (cp --reflink=auto)",
                    reason="ImageOutsideRoots",
                )


def _names(path: str) -> int:
    """The number of hard links of a file; 1 for anything that is not a regular file."""
    with errors_of(path):
        found = Path(path).stat()
    return found.st_nlink if stat.S_ISREG(found.st_mode) else 1


@dataclass(frozen=True)
class ImageUse:
    """An image that a disk of a domain uses, directly or as the backing image of another."""

    path: str
    domain: str
    domain_uuid: str
    target: str


def image_uses(guests: Iterable[Guest]) -> list[ImageUse]:
    """Every image that these domains use, by their live and their persistent XML."""
    return [ImageUse(path, guest.name, guest.uuid, target) for guest in guests for path, target in _used_by(guest)]


def _used_by(guest: Guest) -> list[tuple[str, str]]:
    used: list[tuple[str, str]] = []
    try:
        live, persistent = guest.live_xml(), guest.persistent_xml()
    except PermanentError as error:
        if error.reason != Cause.DOMAIN_NOT_FOUND:  # it was removed meanwhile
            raise
        return []
    for text in filter(None, (live, persistent)):
        for disk in chain.disks(text):
            below = [found.path for found in disk.chain]
            # Only live XML names the images below. Of a raw disk the guest itself writes every byte, a header too.
            if not live and disk.source and disk.kind == "file" and disk.format == "qcow2":
                below = image.images_below(Path(disk.source))
            used += [(path, disk.target) for path in (disk.source, *below) if path]
    return used


def _refuse_shared(guest: Guest, chosen: Sequence[chain.Disk], uses: Iterable[ImageUse]) -> None:
    """Refuse a base that another disk uses or builds on: the commit would change it there too."""
    bases = {os.path.realpath(disk.source or ""): disk.target for disk in chosen}
    for use in uses:
        mine = use.domain_uuid == guest.uuid
        target = bases.get(os.path.realpath(use.path))  # an image can have many names: links, ../ in backing files
        if target is not None and not (mine and target == use.target):
            user = f"disk {use.target} of this domain" if mine else f"disk {use.target} of domain {use.domain}"
            raise RefusedError(
                f"disk {target}: {use.path} is also used by {user}: use a separate image for each",
                reason="BaseInUse",
            )


def _refuse_unwritable(disks: Sequence[DiskRecord]) -> None:
    for directory in {Path(disk.overlay).parent for disk in disks}:
        if not os.access(directory, os.W_OK):
            raise RefusedError(
                f"the overlay directory {directory} is not writable: correct that, or set --overlay-dir",
                reason="OverlayDirectoryNotWritable",
            )


def choose(
    disks: Sequence[chain.Disk], wanted: Sequence[str]
) -> tuple[tuple[chain.Disk, ...], tuple[tuple[str, str], ...]]:
    """The disks to back up, and the others with the reason. Raises RefusedError."""
    known = {disk.target: disk for disk in disks}
    for target in wanted:
        if target not in known:
            raise RefusedError(
                f"spec.disks names {target!r}: the domain has {', '.join(sorted(known)) or 'no disk at all'}",
                reason="DiskNotFound",
            )
        if why := chain.ineligible(known[target]):
            raise RefusedError(
                f"spec.disks names {target!r}, which cannot be backed up: {why}", reason="DiskNotEligible"
            )
    chosen: list[chain.Disk] = []
    skipped: list[tuple[str, str]] = []
    for disk in disks:
        why = "not listed in spec.disks" if wanted and disk.target not in wanted else chain.ineligible(disk)
        if why:
            skipped.append((disk.target, why))
        else:
            chosen.append(disk)
    if not chosen:
        reasons = "; ".join(f"{target}: {why}" for target, why in skipped) or "it has no disks"
        raise RefusedError(f"no disk of this domain can be backed up: {reasons}", reason="NoEligibleDisk")
    return tuple(chosen), tuple(skipped)


def not_running(name: str) -> RefusedError:
    """The refusal of a domain that is off."""
    return RefusedError(
        f"domain {name} is not running: start it, or copy its disks as they are", reason="DomainNotRunning"
    )


def source_of(disk: DiskRecord) -> DiskSource:
    """The images of a disk that are copied."""
    images = ((disk.base, disk.format), *disk.backing)
    return DiskSource(disk.target, tuple(SourceImage(path, format) for path, format in images), disk.virtual_bytes)
