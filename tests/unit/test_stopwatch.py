"""A bound that is a claim is missed by what is slow, and not by a machine that has more work than CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import stopwatch
from tests.support.stopwatch import Stopwatch


@pytest.fixture
def pressure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(stopwatch, "_PRESSURE", tmp_path / "cpu")
    monkeypatch.setattr(stopwatch, "_REFRESH_SECONDS", 0.0)
    waited(tmp_path / "cpu", seconds=100)
    return tmp_path / "cpu"


def waited(pressure: Path, seconds: int) -> None:
    pressure.write_text(
        f"some avg10=0.00 avg60=0.00 avg300=0.00 total={seconds * 1_000_000}\nfull avg10=0.00 total=0\n"
    )


def test_what_is_quick_is_within_its_bound(pressure: Path):
    assert Stopwatch().within(60)


def test_what_is_slow_while_no_process_waits_for_a_cpu_is_not(pressure: Path):
    assert not Stopwatch().allows(8, bound=5)


def test_the_seconds_in_which_a_process_waited_for_a_cpu_do_not_count(pressure: Path):
    watch = Stopwatch()
    waited(pressure, seconds=104)
    assert watch.allows(8, bound=5)
    assert not watch.allows(10, bound=5)


def test_without_the_kernels_count_all_seconds_count(pressure: Path):
    pressure.unlink()
    assert not Stopwatch().allows(8, bound=5)
