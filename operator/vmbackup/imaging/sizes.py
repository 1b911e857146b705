"""Sizes of images, and the free space for them."""

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
    """Bytes that a copy of an image may need: the allocated ones, and all of a block device. Errors are ours."""
    with opened_image(path) as fd:
        found = os.fstat(fd)
        return size_of(fd) if stat.S_ISBLK(found.st_mode) else found.st_blocks * 512


def free_bytes(path: Path) -> int:
    """Free bytes on the file system of a path, without those reserved for root. Raises OSError."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize
