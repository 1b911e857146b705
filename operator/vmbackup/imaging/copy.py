"""Copies an image file: as a clone if the file system can, else as a sparse copy that is digested on the way."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from vmbackup.errors import PermanentError
from vmbackup.imaging.control import CopyControl
from vmbackup.imaging.digest import CHUNK, Digester
from vmbackup.imaging.errors import classified, errors_of
from vmbackup.imaging.throttle import TokenBucket
from vmbackup.paths import open_plain, open_trusted

FICLONE = 0x40049409  # linux/fs.h; in Python's fcntl since 3.14
FICLONERANGE = 0x4020940D
_CANNOT_CLONE = frozenset((errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.ENOSYS))

ZERO_BLOCK = 64 << 10  # a run of this many zero bytes becomes a hole
_ZEROES = bytes(ZERO_BLOCK)
_FLUSH_WINDOW = 32 << 20


@dataclass(frozen=True)
class Copied:
    """A finished copy: its length in bytes, and its digest as `sha256:<hex>`."""

    bytes: int
    digest: str


def clone(source_fd: int, destination_fd: int) -> bool:
    """Make the destination share all blocks of the source (FICLONE): metadata only, whatever the size.

    False where these file systems cannot. Other errors are raised as OSError (no space for the metadata, for example).
    """
    try:
        fcntl.ioctl(destination_fd, FICLONE, source_fd)
    except OSError as error:
        if error.errno in _CANNOT_CLONE:
            return False
        raise
    return True


def can_clone(source_fd: int, destination_fd: int) -> bool:
    """Whether `clone` would work, tried on the first block only, so cheap on a large image in use."""
    block = os.fstatvfs(source_fd).f_bsize
    length = block if os.fstat(source_fd).st_size >= block else 0  # 0: to the end
    try:
        fcntl.ioctl(destination_fd, FICLONERANGE, struct.pack("qQQQ", source_fd, 0, length, 0))
    except OSError as error:
        if error.errno in _CANNOT_CLONE:
            return False
        raise
    return True


def copy_file(source: Path, destination: Path, control: CopyControl) -> Copied:
    """Copy an image file or block device to a new sparse file, durable on return (the directory entry aside).

    The source must not change meanwhile: QEMU's lock for readers is held on it. Holes stay holes, and zeros become
    holes. The digest is that of the whole file, holes as zeros. Raises Cancelled, TransientError if somebody writes to
    the source, or PermanentError naming the file and the cure; the destination is then worthless.
    """
    with _locked_pair(source, destination, control) as (source_fd, destination_fd):
        return _copy(source, source_fd, destination, destination_fd, control)


def clone_or_copy(source: Path, destination: Path, control: CopyControl) -> Copied:
    """As `copy_file`, but by a clone where the file system can: within milliseconds, and the digest stays empty."""
    with _locked_pair(source, destination, control) as (source_fd, destination_fd):
        with errors_of(destination):
            if clone(source_fd, destination_fd):
                os.fsync(destination_fd)
                return Copied(size_of(destination_fd), "")
        return _copy(source, source_fd, destination, destination_fd, control)


def copy_stored(source: Path, destination: Path, control: CopyControl) -> Copied:
    """As `copy_file`, of a file that no guest uses: no symbolic link is followed, and QEMU's locks are not taken."""
    with _opened_plain(source) as source_fd, created(destination) as destination_fd:
        return _copy(source, source_fd, destination, destination_fd, control)


@contextmanager
def _locked_pair(source: Path, destination: Path, control: CopyControl) -> Generator[tuple[int, int]]:
    with reading(source, control) as source_fd, created(destination) as destination_fd:
        yield source_fd, destination_fd


def _copy(source: Path, source_fd: int, destination: Path, destination_fd: int, control: CopyControl) -> Copied:
    size = size_of(source_fd)
    with errors_of(destination):
        os.ftruncate(destination_fd, size)
    digest = _transfer(source_fd, source, size, control, _SparseWriter(destination_fd, destination))
    with errors_of(destination):
        os.fsync(destination_fd)
    return Copied(size, digest)


def digest_file(path: Path, control: CopyControl) -> str:
    """The digest `sha256:<hex>` of a file, holes as zeros, as sha256sum prints it. Raises as `copy_file`."""
    with _opened_plain(path) as fd:
        return _transfer(fd, path, size_of(fd), control, None)


@contextmanager
def opened_image(path: Path) -> Generator[int]:
    """The image of a guest open for reading (paths.open_trusted). Errors of opening it are raised as ours."""
    with errors_of(path):
        fd = open_trusted(path)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _opened_plain(path: Path) -> Generator[int]:
    with errors_of(path):
        fd = open_plain(path)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def reading(path: Path, control: CopyControl) -> Generator[int]:
    """As `opened_image`, under QEMU's lock for readers: no process can start writing to it. See CopyControl.reading."""
    with opened_image(path) as fd, control.reading(fd):
        yield fd


@contextmanager
def created(path: Path) -> Generator[int]:
    """A new file for a guest's data, open for writing; an existing file is an error."""
    with errors_of(path):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def size_of(fd: int) -> int:
    """Length in bytes of an open file or block device."""
    return os.lseek(fd, 0, os.SEEK_END)


def _transfer(source_fd: int, source: Path, size: int, control: CopyControl, writer: _SparseWriter | None) -> str:
    bucket = TokenBucket(control.bandwidth)
    os.posix_fadvise(source_fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    # From Linux 6.3 on: our reading does not push what the guest reads out of the page cache.
    os.posix_fadvise(source_fd, 0, 0, os.POSIX_FADV_NOREUSE)
    with Digester() as digester:
        position = 0
        for start, end in chain(data_extents(source_fd, source, size), [(size, size)]):
            while position < start:
                control.check()
                position += digester.hole(start - position)
                control.progress(position, size)
            while position < end:
                bucket.wait(control.cancelled)
                control.check()
                buffer = digester.buffer()
                length = _read(source_fd, source, buffer, position, min(CHUNK - position % CHUNK, end - position))
                if writer:
                    writer.write(buffer, length, position)
                digester.data(buffer, length)
                bucket.spend(length)
                position += length
                control.progress(position, size)
    return f"sha256:{digester.hexdigest()}"


def data_extents(fd: int, path: Path, size: int) -> Iterator[tuple[int, int]]:
    """Where a file has data: (start, end) in bytes, in order. Devices and file systems without holes: all of it."""
    with suppress(OSError):  # a file system mounted read-only, a device
        os.fsync(fd)  # XFS: SEEK_DATA sees all that was written only then
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole from here on
                return
            if error.errno != errno.EINVAL:
                raise classified(error, path) from error
            start, end = end, size
        yield start, min(end, size)


def _read(fd: int, path: Path, buffer: bytearray, position: int, length: int) -> int:
    try:
        got = os.preadv(fd, [memoryview(buffer)[:length]], position)
    except OSError as error:
        raise classified(error, path) from error
    if got == 0:
        raise PermanentError(f"{path} became shorter while it was read: nothing may truncate it", reason="Changed")
    return got


class _SparseWriter:
    """Writes all but zeros, and keeps the kernel writing back at the pace of the copy.

    Without that, gigabytes of dirty pages pile up, which the final fsync has to wait for, and push everything else out
    of the page cache.
    """

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path
        self._window = 0  # where the window starts that was not handed to the kernel yet

    def write(self, buffer: bytearray, length: int, position: int) -> None:
        for start, end in _non_zero(buffer, length):
            view = memoryview(buffer)[start:end]
            while view:
                try:
                    written = os.pwrite(self._fd, view, position + start)
                except OSError as error:
                    raise classified(error, self._path) from error
                view, start = view[written:], start + written
        if position + length >= self._window + _FLUSH_WINDOW:
            # Starts to write back the newest window, and drops what has been written of the one before.
            first = max(0, self._window - _FLUSH_WINDOW)
            os.posix_fadvise(self._fd, first, position + length - first, os.POSIX_FADV_DONTNEED)
            self._window = position + length


def _non_zero(buffer: bytearray, length: int) -> Iterator[tuple[int, int]]:
    """The runs of blocks that are not all zeros, as (start, end). `startswith` compares in place, by memcmp."""
    start = 0
    for block in range(0, length, ZERO_BLOCK):
        end = min(block + ZERO_BLOCK, length)
        if buffer.startswith(_ZEROES[: end - block], block, end):
            if start < block:
                yield start, block
            start = end
    if start < length:
        yield start, length
