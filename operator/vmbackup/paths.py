"""Opens paths that other users may have prepared: part by part, with each folder held open, as openat2(2) does.

Uses only system calls that every kernel and every container allows.
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

    Prevents the owner of such a folder from redirecting us to root-only files. Raises OSError: ELOOP for any other
    link, EINVAL for anything that is not a regular file or block device, for example a FIFO, which would block.
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
    """The target of a path, held open, and the owners of the links on the way."""
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
    """The content of a small file of a guest. Raises OSError, also if it has a second name (hard link)."""
    with os.fdopen(open_trusted(path), "rb") as file:
        found = os.fstat(file.fileno())
        if found.st_nlink > 1:
            raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))
        if found.st_size > limit:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        return file.read(limit)


@contextmanager
def held(root: Path, *names: str, make_mode: int | None = None) -> Generator[Path]:
    """A path to the folder root/name/name/…, which stays open for the block.

    The path leads to the same folder even if it is renamed meanwhile, and never through a symbolic link below the root.
    `make_mode`: create missing folders, durably, with this mode. Raises OSError: ENOTDIR if a name is a link or not a
    folder.
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
    """The path as people know it, also of a path that `held` gave."""
    found = _HELD.fullmatch(str(path))
    return str(path) if found is None else f"{Path(found[1]).readlink()}{found[2]}"
