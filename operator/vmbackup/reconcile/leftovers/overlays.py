"""The disks that an earlier backup left on one of our overlays."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from vmbackup.errors import RefusedError
from vmbackup.hypervisor import chain
from vmbackup.imaging import image
from vmbackup.protocol.record import DiskRecord, Record, Snapshot


def left_on_overlay(live: str | None, persistent: str | None, earlier: Iterable[Record]) -> tuple[DiskRecord, ...]:
    """The disks that an earlier backup left on an overlay of ours, or whose overlay it left behind."""
    known = {
        disk.overlay: replace(disk, owner=disk.owner or record.full_name)
        for record in earlier
        for disk in record.disks
        if record.snapshot is not Snapshot.NONE
    }
    left = {disk.target: disk for overlay, disk in known.items() if os.path.lexists(overlay)}
    defined = {disk.target: disk.source or "" for disk in chain.disks(persistent or "<domain/>")}
    for disk in chain.disks(live or persistent or "<domain/>"):
        next_start = defined.get(disk.target, "")
        if disk.source and disk.source in known:
            left[disk.target] = known[disk.source]
        elif live and disk.source and chain.parse_overlay(disk.source):
            left[disk.target] = _found(disk, live, persistent)
        elif live and disk.source and disk.target not in left and _was_home(disk, next_start):
            left[disk.target] = DiskRecord(
                disk.target,
                base=disk.source,
                overlay=next_start,
                owner=_owner(next_start),
                format=disk.format,
                backing=tuple((image.path, image.format) for image in disk.chain),
                persistent_disk_xml=chain.disk_xml(live, disk.target),
            )
    return tuple(replace(disk, failures=0, retry_at=0.0, commit_running=False) for disk in left.values())


def _was_home(disk: chain.Disk, next_start: str) -> bool:
    """The disk is on the base of an overlay of ours that it would be on again at the next start."""
    if not chain.parse_overlay(next_start) or not os.path.lexists(next_start):
        return False
    below = image.images_below(Path(next_start))
    return bool(below) and os.path.realpath(below[0]) == os.path.realpath(disk.source or "")


def _owner(overlay: str) -> str:
    """Whose overlay it is, as far as its name says."""
    named = chain.parse_overlay(overlay)
    return f"a backup with the uid {named[0]}…" if named else ""


def _found(disk: chain.Disk, live: str, persistent: str | None) -> DiskRecord:
    """A disk on an overlay of ours, by its name, of a backup whose journal is lost: its base is what the chain says."""
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
        backing=tuple((image.path, image.format) for image in disk.chain[1:]),
        persistent_disk_xml=on_base,
    )
