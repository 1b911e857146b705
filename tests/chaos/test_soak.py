"""The soak itself: its choices, its oracle, and a short one."""

from __future__ import annotations

import struct
from itertools import product
from pathlib import Path

import pytest

from sandbox.oracle import ProofError
from tests.chaos.soak.choices import ACCEPTS_LOSS, ENDS_QEMU, KINDS, Plan, plan
from tests.chaos.soak.faults import FAULTS
from tests.chaos.soak.guests import KINDS as GUESTS
from tests.chaos.soak.guests import read_sectors
from tests.chaos.soak.soak import soak

FIRST, BULK, BULK_SECTORS, BLOCKS = 2047, 36864, 64, 256  # of writer.S


def plans(seed: int, count: int = 300) -> list[Plan]:
    return [plan(seed, f"{kind}-1", number) for kind, number in product(GUESTS, range(1, count))]


def test_what_happens_depends_only_on_the_seed() -> None:
    assert plans(7) == plans(7)
    assert plan(7, "plain-1", 250) == plans(7)[249]
    assert plans(7) != plans(8)


def test_every_kind_of_fault_happens() -> None:
    chosen = {fault.kind for each in plans(1) for fault in each.faults}
    assert chosen == KINDS.keys() == FAULTS.keys()


def test_what_no_agent_can_close_is_not_among_the_choices() -> None:
    for each in plans(2):
        kinds = {kind for fault in each.faults for kind in (fault.kind, fault.meanwhile)}
        if each.spec["switchPolicy"] == "Live" or kinds.intersection(ACCEPTS_LOSS):
            assert not kinds.intersection(ENDS_QEMU), each


def image(last: int) -> bytearray:
    """What a guest of one sector has written with its first records."""
    content = bytearray((BULK + BLOCKS * BULK_SECTORS) * 512)
    for number in range(1, last + 1):
        word = struct.pack("<I", number)
        content[(FIRST + number) * 512 : (FIRST + number + 1) * 512] = word * 128
        start = (BULK + number * 37 % BLOCKS * BULK_SECTORS) * 512
        content[start : start + BULK_SECTORS * 512] = word * 128 * BULK_SECTORS
    return content


def test_the_oracle_counts_the_records_of_a_sound_image(tmp_path: Path) -> None:
    path = tmp_path / "raw"
    for last in (0, 1, 300):
        path.write_bytes(image(last))
        assert read_sectors(path, "an image").last == last


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ((FIRST + 100) * 512, "record 100 is missing"),
        ((FIRST + 300) * 512 + 4, "record 300 is missing or torn"),
        ((BULK + 299 * 37 % BLOCKS * BULK_SECTORS) * 512, "as it was written with record 299"),
    ],
)
def test_the_oracle_finds_what_is_missing_torn_or_stale(tmp_path: Path, where: int, what: str) -> None:
    content = image(300)
    content[where : where + 4] = bytes(4)
    path = tmp_path / "raw"
    path.write_bytes(content)
    with pytest.raises(ProofError, match=what):
        read_sectors(path, "an image")


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_a_short_soak_loses_nothing(tmp_path: Path) -> None:
    tally = soak(1, 10, guests=3, log=tmp_path / "log.jsonl")
    print(tally.text)
    assert not tally.findings
    assert tally.records > 0
    assert tally.faults.total() > 0
    assert tally.backups["succeeded"] > 0
