from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.stopwatch import Stopwatch
from tests.support.storage import run, sha256sum
from vmbackup.errors import PermanentError
from vmbackup.imaging import Cancelled, CopyControl
from vmbackup.imaging.copy import can_clone, clone, clone_or_copy, copy_file, data_extents, digest_file
from vmbackup.imaging.digest import CHUNK

pytest_plugins = ("tests.support.fixtures_storage",)

KIB, MIB = 1 << 10, 1 << 20

# Name: length of the file, and where it has which data. The rest is a hole.
PATTERNS: dict[str, tuple[int, list[tuple[int, bytes]]]] = {
    "empty": (0, []),
    "one byte": (1, [(0, b"x")]),
    "one zero byte": (1, [(0, b"\0")]),
    "all hole": (40 * MIB, []),
    "all data": (5 * MIB, [(0, os.urandom(5 * MIB))]),
    "all written zeros": (3 * MIB, [(0, bytes(3 * MIB))]),
    "hole first": (5 * MIB, [(4 * MIB, os.urandom(MIB))]),
    "hole last": (5 * MIB, [(0, os.urandom(MIB))]),
    "odd length": (2 * MIB + 513, [(0, os.urandom(2 * MIB + 513))]),
    "odd length, zeros last": (2 * MIB + 100 * KIB + 7, [(0, os.urandom(2 * MIB))]),
    "zeros and data in one chunk": (MIB, [(0, os.urandom(64 * KIB) + bytes(128 * KIB) + os.urandom(64 * KIB))]),
    "data off the grid": (4 * MIB, [(MIB + 4096, os.urandom(3 * 4096)), (3 * MIB - 4096, os.urandom(8192))]),
    "one byte in zeros": (2 * MIB, [(0, bytes(MIB + 77) + b"x" + bytes(1000))]),
}


@pytest.fixture(params=PATTERNS)
def pattern(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    length, pieces = PATTERNS[request.param]
    return write_pieces(tmp_path / "source.img", length, pieces)


@pytest.fixture
def random_file(tmp_path: Path) -> Path:
    return write_pieces(tmp_path / "source.img", 8 * MIB, [(0, os.urandom(8 * MIB))])


def write_pieces(path: Path, length: int, pieces: list[tuple[int, bytes]]) -> Path:
    with path.open("wb") as file:
        file.truncate(length)
        for offset, data in pieces:
            file.seek(offset)
            file.write(data)
    return path


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_a_copy_has_the_same_bytes_and_the_digest_that_sha256sum_prints(pattern: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.img"
    copied = copy_file(pattern, copy, CopyControl())
    run("cmp", str(pattern), str(copy))
    assert copied.bytes == copy.stat().st_size == pattern.stat().st_size
    assert copied.digest == sha256sum(copy) == digest_file(pattern, CopyControl())


def test_a_copy_is_as_sparse_as_cp_makes_it(pattern: Path, tmp_path: Path) -> None:
    copy, by_cp = tmp_path / "copy.img", tmp_path / "cp.img"
    copy_file(pattern, copy, CopyControl())
    run("cp", "--sparse=always", "--reflink=never", str(pattern), str(by_cp))
    os.sync()
    # A run of zeros must cover one of our blocks at each end to become a hole, and cp's are smaller.
    assert allocated(copy) <= allocated(by_cp) + 2 * 64 * KIB


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_a_copied_image_is_the_same_to_a_guest(image_format: str, tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    run("qemu-img", "create", "-q", "-f", image_format, str(source), "64M")
    run("qemu-io", "-f", image_format, "-c", "write -P 7 5M 3M", "-c", "write -z 6M 1M", str(source))
    copy_file(source, copy, CopyControl())
    run("qemu-img", "compare", "-f", image_format, "-F", image_format, str(source), str(copy))


def test_a_copy_is_private(random_file: Path, tmp_path: Path) -> None:
    copy_file(random_file, tmp_path / "copy.img", CopyControl())
    assert (tmp_path / "copy.img").stat().st_mode & 0o777 == 0o600


def test_a_file_that_is_there_is_never_overwritten(random_file: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.img"
    there.write_text("precious")
    with pytest.raises(PermanentError, match=r"there\.img: File exists"):
        copy_file(random_file, there, CopyControl())
    assert there.read_text() == "precious"


def test_progress_rises_to_the_length_of_the_file(pattern: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    copy_file(pattern, tmp_path / "copy.img", CopyControl(progress=lambda done, total: seen.append((done, total))))
    length = pattern.stat().st_size
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert {total for _, total in seen} <= {length}
    assert seen[-1:] == ([(length, length)] if length else [])


def test_a_block_device_is_copied_whole_and_sparse(loop_device: Path, tmp_path: Path) -> None:
    data = os.urandom(MIB)
    with loop_device.open("r+b") as device:
        device.seek(2 * MIB)
        device.write(data)
    copied = copy_file(loop_device, tmp_path / "copy.img", CopyControl())
    assert copied.bytes == 4 * MIB
    assert (tmp_path / "copy.img").read_bytes() == bytes(2 * MIB) + data + bytes(MIB)
    assert copied.digest == sha256sum(loop_device)
    assert allocated(tmp_path / "copy.img") <= MIB + 64 * KIB


class SlowCopy:
    """A copy in another thread at 1 MiB per second, which the test steers once it has begun."""

    def __init__(self, pool: ThreadPoolExecutor, source: Path, destination: Path) -> None:
        self.rate: int | None = MIB
        begun = threading.Event()
        self.control = CopyControl(bandwidth=lambda: self.rate, progress=lambda _done, _total: begun.set())
        self.result = pool.submit(copy_file, source, destination, self.control)
        assert begun.wait(10)


@pytest.fixture
def slow_copy(random_file: Path, tmp_path: Path) -> Iterator[SlowCopy]:
    with ThreadPoolExecutor(1) as pool:
        copy = SlowCopy(pool, random_file, tmp_path / "copy.img")
        yield copy
        copy.control.cancelled.set()


def test_a_throttled_copy_ends_at_once_when_cancelled(slow_copy: SlowCopy) -> None:
    watch = Stopwatch()
    slow_copy.control.cancelled.set()
    with pytest.raises(Cancelled):
        slow_copy.result.result(timeout=60)
    assert watch.within(0.5), watch


def test_a_limit_that_is_lifted_while_copying_counts_at_once(slow_copy: SlowCopy, tmp_path: Path) -> None:
    watch = Stopwatch()
    slow_copy.rate = None
    assert slow_copy.result.result(timeout=60).digest == sha256sum(tmp_path / "copy.img")
    assert watch.within(4), watch  # it had 7 s to go


def test_the_limit_is_kept(random_file: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    copy_file(random_file, tmp_path / "copy.img", CopyControl(bandwidth=lambda: 16 * MIB))
    assert time.monotonic() - started > 7 / 16 * 0.9  # the first piece goes at once


def test_a_long_hole_can_be_cancelled(tmp_path: Path) -> None:
    source = write_pieces(tmp_path / "source.img", 1 << 40, [])
    control = CopyControl()
    threading.Timer(0.05, control.cancelled.set).start()
    started = time.monotonic()
    with pytest.raises(Cancelled):
        digest_file(source, control)
    assert time.monotonic() - started < 10  # the whole of it would take many minutes


def test_a_full_target_is_named_with_its_cure(random_file: Path, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(4 * MIB))
    with pytest.raises(PermanentError, match=r"copy\.img: No space left on device: free space") as error:
        copy_file(random_file, small_disk / "copy.img", CopyControl())
    assert error.value.reason == "NoSpace"


def test_a_source_that_shrinks_is_an_error_and_not_a_short_copy(random_file: Path, tmp_path: Path) -> None:
    control = CopyControl(progress=lambda done, _total: os.truncate(random_file, done))
    with pytest.raises(PermanentError, match="became shorter"):
        copy_file(random_file, tmp_path / "copy.img", control)


def test_a_missing_source_leaves_no_destination(tmp_path: Path) -> None:
    with pytest.raises(PermanentError, match=r"gone\.img: No such file") as error:
        copy_file(tmp_path / "gone.img", tmp_path / "copy.img", CopyControl())
    assert error.value.reason == "NotFound"
    assert not (tmp_path / "copy.img").exists()


def test_data_extents_cover_all_data_and_little_else(tmp_path: Path) -> None:
    path = write_pieces(tmp_path / "source.img", 9 * MIB, [(MIB, b"x" * MIB), (7 * MIB, b"y" * 4096)])
    with path.open("rb") as file:
        assert list(data_extents(file.fileno(), path, 9 * MIB)) == [(MIB, 2 * MIB), (7 * MIB, 7 * MIB + 4096)]


def test_a_clone_shares_its_blocks_and_keeps_its_content(xfs: Path) -> None:
    source, copy = xfs / "source.img", xfs / "copy.img"
    data = os.urandom(16 * MIB)
    source.write_bytes(data)
    copied = clone_or_copy(source, copy, CopyControl())
    assert (copied.bytes, copied.digest) == (16 * MIB, "")
    assert "shared" in run("filefrag", "-v", str(copy))
    with source.open("r+b") as file:
        file.write(bytes(MIB))
    assert digest_file(copy, CopyControl()) == "sha256:" + hashlib.sha256(data).hexdigest()


def test_where_a_clone_is_impossible_the_copy_has_its_digest(random_file: Path, xfs: Path) -> None:
    assert clone_or_copy(random_file, xfs / "copy.img", CopyControl()).digest == sha256sum(random_file)


@pytest.mark.parametrize(("folder", "possible"), [("xfs", True), ("tmp_path", False)])
@pytest.mark.parametrize("length", [0, 100, 3 * MIB])
def test_can_clone_says_what_clone_then_does(
    folder: str, possible: bool, length: int, xfs: Path, request: pytest.FixtureRequest
) -> None:
    source = xfs / "source.img"
    source.write_bytes(os.urandom(length))
    target: Path = request.getfixturevalue(folder)
    with source.open("rb") as from_, (target / "probe").open("wb") as probe, (target / "copy").open("wb") as to:
        assert can_clone(from_.fileno(), probe.fileno()) is possible
        assert clone(from_.fileno(), to.fileno()) is possible


def test_buffers_are_handed_round_in_order(tmp_path: Path) -> None:
    data = b"".join(bytes([n]) * CHUNK for n in range(20))
    path = write_pieces(tmp_path / "source.img", len(data), [(0, data)])
    assert digest_file(path, CopyControl()) == "sha256:" + hashlib.sha256(data).hexdigest()


def test_what_is_written_back_while_copying_is_written_right(tmp_path: Path) -> None:
    """Longer than what is handed to the kernel at once, with a hole over the edge of such a window."""
    source = write_pieces(
        tmp_path / "source.img", 150 * MIB, [(0, os.urandom(40 * MIB)), (90 * MIB, os.urandom(45 * MIB))]
    )
    copied = copy_file(source, tmp_path / "copy.img", CopyControl())
    assert copied.digest == sha256sum(source) == sha256sum(tmp_path / "copy.img")


def test_a_clone_that_fails_is_not_taken_for_an_impossible_one(xfs: Path) -> None:
    (xfs / "source.img").write_bytes(b"x" * 4096)
    (xfs / "copy.img").touch()
    with (
        (xfs / "source.img").open("rb") as from_,
        (xfs / "copy.img").open("rb") as read_only,
        pytest.raises(OSError, match="Bad file descriptor"),
    ):
        clone(from_.fileno(), read_only.fileno())
