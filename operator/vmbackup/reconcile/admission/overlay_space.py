"""Space for overlays: how much must be free before the snapshot, and when a copy is given up for lack of it.

QEMU pauses a guest whose overlay cannot grow, so the backup gives up first. How much a guest will write is unknown; it
grows with the duration of the copy. So a twentieth of the bytes to copy must be free, at least 64 MiB (all that a store
that clones needs), at most the size of the disks. Disks that share a file system are added up. A copy that goes to the
same file system is added too.
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

SHARE = 20  # a twentieth of the bytes to copy
FLOOR = 64 << 20  # bytes; with less an overlay fills its file system almost at once
_LOWEST, _HIGHEST = 16 << 20, 4 << 30  # bytes; limits of the watermark, a quarter of what was free
_FASTEST = 512 << 20  # bytes per second: the highest write rate assumed of a guest


def with_room(disks: Sequence[DiskRecord], writes: Mapping[str, Writes]) -> tuple[DiskRecord, ...]:
    """The disks with `room`, the bytes free for overlays. `writes`: the bytes that the store will write, by target.

    Raises RefusedError with the directory, the free and the needed space, and the cure.
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
            f"need {max(1, needed >> 20)} MiB: free space there, or set --overlay-dir",
            reason="NoRoomForOverlay",
        )
    return free - copied_here


def low(record: Record) -> str:
    """Why the copy must be given up: the file system of an overlay is below its watermark. Empty if none is."""
    for disk in record.disks:
        directory = Path(disk.overlay).parent
        try:
            free = free_bytes(directory)
        except OSError:
            continue
        if free < watermark(disk.room):
            return (
                f"the copy was given up: {directory} has only {free >> 20} MiB left, and the guest needs them for the "
                f"overlay of {disk.target}: free space there, or set --overlay-dir"
            )
    return ""


def watermark(room: int) -> int:
    """The free bytes below which the copy is given up. 0 for an overlay that was not planned."""
    return min(max(room // 4, _LOWEST), _HIGHEST, room // 2)


def patience(record: Record) -> float:
    """Seconds between two checks: no guest can use up the space below the watermark in that time."""
    least = min((watermark(disk.room) for disk in record.disks), default=0)
    return min(1.0, max(0.1, least / _FASTEST))


def _device(directory: Path) -> int:
    with errors_of(directory):
        return directory.stat().st_dev
