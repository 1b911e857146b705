"""QEMU's own locks on image files, so that we and QEMU see each other.

QEMU marks each permission that it has, and each that it does not share, by a read lock on one byte of the image
(block/file-posix.c), with open-file-description locks: they belong to the open file, not to the process, and go with
it. Checked against QEMU 7.2 in tests/hypervisor/test_locks.py.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

from vmbackup.errors import TransientError
from vmbackup.imaging.errors import errors_of
from vmbackup.paths import open_trusted

# RAW_LOCK_PERM_BASE and RAW_LOCK_SHARED_BASE of block/file-posix.c, BLK_PERM_* of include/block/block-common.h
_HAS = 100
_DOES_NOT_SHARE = 200
_CONSISTENT_READ, _WRITE, _RESIZE = 0, 1, 3
_ALL_BYTES = range(_HAS, _DOES_NOT_SHARE + 64)

_FLOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid (0 for these locks)


def hold_reader_lock(fd: int) -> None:
    """Hold what `qemu-img convert` holds on its source: I read, and share neither writing nor resizing.

    The lock ends when the open file of `fd` is closed. Raises TransientError if somebody writes to the image, or has
    locked it against readers.
    """
    path = Path(f"/proc/self/fd/{fd}").readlink()
    with errors_of(path):
        for byte in (_HAS + _CONSISTENT_READ, _DOES_NOT_SHARE + _WRITE, _DOES_NOT_SHARE + _RESIZE):
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
        for byte in (_HAS + _WRITE, _HAS + _RESIZE, _DOES_NOT_SHARE + _CONSISTENT_READ):
            if _held_by_another(fd, range(byte, byte + 1)):
                raise TransientError(f"{path} is being written by another process: let it finish", reason="ImageBusy")


def release_reader_lock(fd: int) -> None:
    """Release the locks of `hold_reader_lock`, in any thread, while `fd` is open. Raises OSError."""
    first, length = _ALL_BYTES.start, len(_ALL_BYTES)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, first, length, 0))


def is_locked(path: Path) -> bool:
    """Whether any process, also this one, has the image open through QEMU's locks, to read or to write.

    Asks only, never takes a lock. Raises as `imaging.errors` says if the file cannot be opened, or cannot be an
    image (paths.open_trusted).
    """
    return _probe(path, _ALL_BYTES)


def is_locked_by_another(fd: int) -> bool:
    """As `is_locked`, for an open image, ignoring our own locks on this open file."""
    return _held_by_another(fd, _ALL_BYTES)


def has_writer(path: Path) -> bool:
    """Whether anybody has the image open for writing through QEMU's locks. As `is_locked` otherwise."""
    return any(_probe(path, range(byte, byte + 1)) for byte in (_HAS + _WRITE, _HAS + _RESIZE))


def _probe(path: Path, lock_bytes: range) -> bool:
    with errors_of(path):
        fd = open_trusted(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            return _held_by_another(fd, lock_bytes)
        finally:
            os.close(fd)


def _held_by_another(fd: int, lock_bytes: range) -> bool:
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, lock_bytes.start, len(lock_bytes), 0)
    kind: int = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))[0]
    return kind != fcntl.F_UNLCK
