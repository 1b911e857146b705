"""Small helpers for tests with real files and file systems."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

XFS_BYTES = 320 << 20  # mkfs.xfs wants at least 300 MB


@contextmanager
def mounted(where: Path, *arguments: str) -> Iterator[Path]:
    where.mkdir()
    run("mount", *arguments, str(where))
    try:
        yield where
    finally:
        run("umount", "--lazy", str(where))


def make_xfs(image: Path, size: int = XFS_BYTES) -> None:
    """A file that holds an empty XFS, of so many bytes."""
    with image.open("wb") as file:
        file.truncate(size)
    run("mkfs.xfs", "-q", str(image))


def run(*command: str) -> str:
    """Run a command that must succeed within a minute; its output."""
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def sha256sum(path: Path) -> str:
    return "sha256:" + run("sha256sum", str(path)).split()[0]
