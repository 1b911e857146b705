"""Real file systems for tests, on loop devices and tmpfs; they need root."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.storage import make_xfs, mounted, run


@pytest.fixture(scope="session")
def xfs_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A mounted XFS, which can reflink, for the whole run."""
    folder = tmp_path_factory.mktemp("xfs")
    image = folder / "xfs.img"
    make_xfs(image)
    with mounted(folder / "mnt", "-o", "loop", str(image)) as root:
        yield root


@pytest.fixture
def xfs(xfs_root: Path) -> Iterator[Path]:
    """An empty folder on an XFS; what the test leaves in it is removed."""
    with tempfile.TemporaryDirectory(dir=xfs_root) as folder:
        yield Path(folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=8m", "tmpfs") as root:
        yield root


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[Path]:
    """A block device of 4 MiB, all zeros."""
    image = tmp_path / "loop.img"
    with image.open("wb") as file:
        file.truncate(4 << 20)
    device = Path(run("losetup", "--find", "--show", str(image)).strip())
    try:
        yield device
    finally:
        run("losetup", "--detach", str(device))
