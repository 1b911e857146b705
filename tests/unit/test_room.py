"""How much room overlays must have before the snapshot, and when a copy is given up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vmbackup.errors import RefusedError
from vmbackup.protocol.record import DiskRecord, Record
from vmbackup.reconcile.admission import overlay_space as room
from vmbackup.stores.base import Writes

MIB, GIB = 1 << 20, 1 << 30


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[Path, int]:
    """What is free on the file system of a directory; set by the test."""
    known: dict[Path, int] = {}
    monkeypatch.setattr(room, "free_bytes", known.__getitem__)
    return known


def disk(directory: Path, target: str = "vda", virtual: int = 100 * GIB) -> DiskRecord:
    return DiskRecord(target, overlay=str(directory / f"{target}.vmb.qcow2"), virtual_bytes=virtual)


@pytest.mark.parametrize(
    ("copied", "virtual", "needed"),
    [
        (0, 100 * GIB, 64 * MIB),  # all is cloned
        (1 * GIB, 100 * GIB, 64 * MIB),
        (40 * GIB, 100 * GIB, 2 * GIB),
        (32 * MIB, 40 * MIB, 40 * MIB),  # no more than the disk can hold
    ],
)
def test_what_is_needed_is_a_share_of_what_has_to_be_copied(
    tmp_path: Path, free: dict[Path, int], copied: int, virtual: int, needed: int
) -> None:
    one = disk(tmp_path, virtual=virtual)
    free[tmp_path] = needed
    assert room.with_room([one], {"vda": Writes(copied)}) == (replace(one, room=needed),)
    free[tmp_path] = needed - 1
    with pytest.raises(RefusedError) as refused:
        room.with_room([one], {"vda": Writes(copied)})
    assert refused.value.reason == "NoRoomForOverlay"
    assert str(tmp_path) in str(refused.value)
    assert f"need {needed // MIB} MiB" in str(refused.value)
    assert "--overlay-dir" in str(refused.value)


def test_disks_that_share_a_file_system_are_added_up(tmp_path: Path, free: dict[Path, int]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    disks = [disk(tmp_path), disk(other, "vdb")]
    writes = {"vda": Writes(40 * GIB), "vdb": Writes(20 * GIB)}
    free |= dict.fromkeys((tmp_path, other), 3 * GIB)
    assert [each.room for each in room.with_room(disks, writes)] == [3 * GIB, 3 * GIB]
    free |= dict.fromkeys((tmp_path, other), 3 * GIB - 1)
    with pytest.raises(RefusedError, match="vda, vdb"):
        room.with_room(disks, writes)


def test_a_copy_that_goes_to_the_same_file_system_takes_its_part_of_the_room(
    tmp_path: Path, free: dict[Path, int]
) -> None:
    here = {"vda": Writes(40 * GIB, tmp_path.stat().st_dev)}
    free[tmp_path] = 42 * GIB
    assert room.with_room([disk(tmp_path)], here)[0].room == 2 * GIB
    free[tmp_path] = 41 * GIB
    with pytest.raises(RefusedError, match="the copy takes 40960 MiB of it"):
        room.with_room([disk(tmp_path)], here)
    elsewhere = {"vda": Writes(40 * GIB, Path("/proc").stat().st_dev)}
    assert room.with_room([disk(tmp_path)], elsewhere)[0].room == 41 * GIB


@pytest.mark.parametrize(
    ("free_at_first", "watermark"),
    [(0, 0), (20 * MIB, 10 * MIB), (40 * MIB, 16 * MIB), (1 * GIB, 256 * MIB), (100 * GIB, 4 * GIB)],
)
def test_the_watermark_is_a_quarter_of_what_was_free_within_bounds(free_at_first: int, watermark: int) -> None:
    assert room.watermark(free_at_first) == watermark


def test_below_the_watermark_the_copy_is_given_up_with_the_directory_and_the_cure(
    tmp_path: Path, free: dict[Path, int]
) -> None:
    record = Record("uid", "default", "nightly", disks=(replace(disk(tmp_path), room=1 * GIB),))
    free[tmp_path] = 256 * MIB
    assert not room.low(record)
    free[tmp_path] = 255 * MIB
    said = room.low(record)
    assert f"{tmp_path} has only 255 MiB left" in said
    assert "--overlay-dir" in said


def test_a_file_system_that_cannot_be_asked_is_not_low(tmp_path: Path) -> None:
    assert not room.low(Record("uid", "default", "x", disks=(replace(disk(tmp_path / "gone"), room=1 * GIB),)))


@pytest.mark.parametrize(("free_at_first", "seconds"), [(64 * MIB, 0.1), (1 * GIB, 0.5), (100 * GIB, 1.0)])
def test_the_less_there_is_the_more_often_it_is_looked_at(tmp_path: Path, free_at_first: int, seconds: float) -> None:
    record = Record("uid", "default", "x", disks=(replace(disk(tmp_path), room=free_at_first),))
    assert room.patience(record) == seconds
