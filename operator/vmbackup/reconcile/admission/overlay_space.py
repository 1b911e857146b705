"""Room for overlays: what must be free before the snapshot, and when a copy is given up since it becomes scarce.

A guest whose overlay cannot grow is paused by QEMU in the middle of a write, so the backup gives way first. The rule is
simple, since nobody knows how much a guest will write: the longer the copy takes, the more. So a twentieth of the bytes
that have to be copied must be free, 64 MiB in any case (all that is asked for where the store clones), but never more
than the disks can hold; disks that share a file system are added up, and so is the copy, where it goes there too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vmbackup.errors import RefusedError
from vmbackup.imaging.errors import errors_of
from vmbackup.imaging.sizes import free_bytes
from vmbackup.protocol.record import DiskRecord, Record
from vmbackup.stores.base import Writes

SHARE = 20  # one byte of so many that have to be copied
FLOOR = 64 << 20  # bytes; below this an overlay would fill its file system almost at once
_LOWEST, _HIGHEST = 16 << 20, 4 << 30  # bytes; the watermark is a quarter of what was free, but within these
_FASTEST = 512 << 20  # bytes per second that a guest is thought to write


def with_room(disks: Sequence[DiskRecord], writes: Mapping[str, Writes]) -> tuple[DiskRecord, ...]:
    """The disks, each knowing the bytes that are free for overlays. `writes`: what the store will write, by target.

    Raises RefusedError naming the directory, what is free there, what is needed, and the cure.
    """
    directories = {disk.target: Path(disk.overlay).parent for disk in disks}
    devices = {target: _device(directory) for target, directory in directories.items()}
    room: dict[int, int] = {}
    for device in set(devices.values()):
        sharing = [disk for disk in disks if devices[disk.target] == device]
        copied_here = sum(writes[disk.target].bytes for disk in disks if writes[disk.target].device == device)
        room[device] = _checked(directories[sharing[0].target], sharing, writes, copied_here)
    return tuple(replace(disk, room=room[devices[disk.target]]) for disk in disks)


def _checked(directory: Path, disks: Sequence[DiskRecord], writes: Mapping[str, Writes], copied_here: int) -> int:
    copied = sum(writes[disk.target].bytes for disk in disks)
    needed = min(sum(disk.virtual_bytes for disk in disks), max(FLOOR, copied // SHARE))
    with errors_of(directory):
        free = free_bytes(directory)
    if free - copied_here < needed:
        copy = f", and the copy takes {copied_here >> 20} MiB of it" if copied_here else ""
        raise RefusedError(
            f"{directory} has {free >> 20} MiB free{copy}; the overlays of {', '.join(disk.target for disk in disks)} "
            f"need {max(1, needed >> 20)} MiB: free space there, or give --overlay-dir",
            reason="NoRoomForOverlay",
        )
    return free - copied_here


def low(record: Record) -> str:
    """Why the copy is to be given up: an overlay's file system has less left than its watermark. Empty if none has."""
    for disk in record.disks:
        directory = Path(disk.overlay).parent
        try:
            free = free_bytes(directory)
        except OSError:
            continue
        if free < watermark(disk.room):
            return (
                f"the copy was given up: {directory} has only {free >> 20} MiB left, and the guest needs them for the "
                f"overlay of {disk.target}: free space there, or give --overlay-dir"
            )
    return ""


def watermark(room: int) -> int:
    """Bytes below which what is left of `room` belongs to the guest alone. 0 for an overlay that was not planned."""
    return min(max(room // 4, _LOWEST), _HIGHEST, room // 2)


def patience(record: Record) -> float:
    """Seconds in which no guest uses up what is left below the watermark: so often it is looked at."""
    least = min((watermark(disk.room) for disk in record.disks), default=0)
    return min(1.0, max(0.1, least / _FASTEST))


def _device(directory: Path) -> int:
    with errors_of(directory):
        return directory.stat().st_dev
