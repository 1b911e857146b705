"""How large images are, and how much room there is for them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from vmbackup.imaging.copy import opened_image, size_of


def length(path: Path) -> int:
    """Bytes of a guest's image, a file or block device. Errors are ours."""
    with opened_image(path) as fd:
        return size_of(fd)


def allocated_bytes(path: Path) -> int:
    """Bytes that a copy of it may need: what is allocated, of a device all. Errors are ours."""
    with opened_image(path) as fd:
        found = os.fstat(fd)
        return size_of(fd) if stat.S_ISBLK(found.st_mode) else found.st_blocks * 512


def free_bytes(path: Path) -> int:
    """Bytes that are free on the file system of a path, the reserve of its root user aside. Raises OSError."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize
