"""Small helpers for tests with real files and file systems."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def mounted(where: Path, *arguments: str) -> Iterator[Path]:
    where.mkdir()
    run("mount", *arguments, str(where))
    try:
        yield where
    finally:
        run("umount", "--lazy", str(where))


def run(*command: str) -> str:
    """Run a command that must succeed within a minute; its output."""
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def sha256sum(path: Path) -> str:
    return "sha256:" + run("sha256sum", str(path)).split()[0]
