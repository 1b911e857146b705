"""Paths that other hands may have prepared: walked part by part, each folder held open, as openat2(2) does it.

In calls that every kernel and every container lets us make.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

_HOLD = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MOST_LINKS = 40  # as the kernel
_HELD = re.compile(r"(/proc/\d+/fd/\d+)(.*)", re.DOTALL)


def open_trusted(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file or block device, following only symbolic links that root, we, or the owner of it have made.

    So who owns a folder of ours or of QEMU's cannot lead us to what only root may read. Raises OSError: ELOOP for any
    other link, EINVAL for what is no file, such as a FIFO, which would keep us waiting.
    """
    fd, owners = _walk(path)
    try:
        found = os.fstat(fd)
        if owners - {0, os.geteuid(), found.st_uid}:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISBLK(found.st_mode)):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)
    finally:
        os.close(fd)


def open_plain(path: Path) -> int:
    """Open a regular file for reading, never through a symbolic link. Raises OSError: ELOOP, or EINVAL as above."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return fd


def _walk(path: Path) -> tuple[int, set[int]]:
    """What a path leads to, held open, and who owns the links on the way."""
    ahead = list(reversed(path.absolute().parts))
    here = os.open("/", _HOLD)
    owners: set[int] = set()
    links = 0
    try:
        while ahead:
            part = ahead.pop()
            below = os.open(part, _HOLD, dir_fd=here)
            found = os.fstat(below)
            if not stat.S_ISLNK(found.st_mode):
                os.close(here)
                here = below
                continue
            try:
                links += 1
                if links > _MOST_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                owners.add(found.st_uid)
                ahead.extend(reversed(Path(os.readlink("", dir_fd=below)).parts))
            finally:
                os.close(below)
    except BaseException:
        os.close(here)
        raise
    return here, owners


def read_trusted(path: Path, limit: int) -> bytes:
    """The content of a small file of a guest. Raises OSError, also where it has another name (a hard link)."""
    with os.fdopen(open_trusted(path), "rb") as file:
        found = os.fstat(file.fileno())
        if found.st_nlink > 1:
            raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))
        if found.st_size > limit:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        return file.read(limit)


@contextmanager
def held(root: Path, *names: str, make_mode: int | None = None) -> Generator[Path]:
    """The folder of these names, one in the other, below `root`: a path that leads to this very one from here on.

    Whatever becomes of its names meanwhile, and never through a symbolic link below the root. `make_mode`: make what is
    missing, durably, with this mode. Raises OSError: ENOTDIR where one of them is a link, or no folder.
    """
    if any(name in ("", ".", "..") or "/" in name for name in names):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    if make_mode is not None:
        root.mkdir(mode=make_mode, parents=True, exist_ok=True)
    here = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in names:
            below = _below(here, name, make_mode)
            os.close(here)
            here = below
        yield Path(f"/proc/{os.getpid()}/fd/{here}")  # not /proc/self: qemu-img is given such paths too
    finally:
        os.close(here)


def _below(folder: int, name: str, make_mode: int | None) -> int:
    if make_mode is not None:
        try:
            os.mkdir(name, make_mode, dir_fd=folder)
            os.fsync(folder)
        except FileExistsError:
            pass
    return os.open(name, _FOLDER, dir_fd=folder)


def name_of(path: Path | str) -> str:
    """The name that people know of a path, also of one that `held` gave."""
    found = _HELD.fullmatch(str(path))
    return str(path) if found is None else f"{Path(found[1]).readlink()}{found[2]}"
