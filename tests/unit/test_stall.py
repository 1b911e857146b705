"""Which commit is late, and how far a guest's writes are slowed down for it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.decisions import committing, on_overlay, seen
from vmbackup.protocol.convergence import is_ours, lowered, next_limit, same, step_seconds, with_overdue
from vmbackup.protocol.record import Throttle
from vmbackup.protocol.terms import Mirror

MI = 1 << 20


@pytest.mark.parametrize(
    ("started", "now", "job", "overdue"),
    [
        (100.0, 159.9, {"job": True, "mirror": Mirror.PENDING}, False),
        (100.0, 160.0, {"job": True, "mirror": Mirror.PENDING}, True),
        (100.0, 900.0, {"job": True, "mirror": Mirror.READY}, False),
        (100.0, 900.0, {"job": True}, True),
        (100.0, 900.0, {}, False),
        (None, 900.0, {"job": True, "mirror": Mirror.PENDING}, False),
    ],
    ids=["in time", "late", "READY", "without <mirror>", "no job", "not begun in this boot"],
)
def test_a_commit_is_late_once_its_attempt_is_older_than_its_deadline(
    started: float | None, now: float, job: dict[str, Any], overdue: bool
) -> None:
    found = with_overdue(committing({"commit_started": started}), seen(on_overlay(**job), now=now), 60)
    assert found.disks[0].overdue is overdue


def throttle(*limits: int, original: dict[str, int] | None = None, **more: Any) -> Throttle:
    return Throttle(tuple((original or {}).items()), limits, **more)


@pytest.mark.parametrize(
    ("known", "merged", "remaining", "limit"),
    [
        (throttle(), 6000 * MI, 500 * MI, 50 * MI),
        (throttle(original={"write_bytes_sec": 40 * MI}), 6000 * MI, 500 * MI, 20 * MI),
        (throttle(original={"total_bytes_sec": 30 * MI}), 6000 * MI, 500 * MI, 15 * MI),
        (throttle(original={"write_bytes_sec": MI // 2}), 6000 * MI, 500 * MI, MI // 2),
        (throttle(), 0, 500 * MI, 16 << 10),
        (throttle(50 * MI, merged=5000 * MI, remaining=500 * MI), 6000 * MI, 500 * MI, 25 * MI),
        (throttle(50 * MI, merged=5000 * MI, remaining=500 * MI), 6000 * MI, 260 * MI, 25 * MI),
        (throttle(50 * MI, merged=5000 * MI, remaining=500 * MI), 6000 * MI, 250 * MI, None),
        (throttle(50 * MI, merged=6000 * MI, remaining=500 * MI), 6000 * MI, 500 * MI, 25 * MI),
        (throttle(MI + 1, merged=5000 * MI, remaining=500 * MI), 6000 * MI, 500 * MI, MI),
        (throttle(MI, merged=5000 * MI, remaining=500 * MI), 6000 * MI, 500 * MI, None),
        (throttle(MI, merged=0, remaining=5 * MI), 120 * MI, 5 * MI, MI // 2),
        (throttle(MI // 32, merged=0, remaining=5 * MI), 60 * MI, 5 * MI, None),
    ],
    ids=[
        "half of what the commit merges",
        "half of what the user allows",
        "half of what the user allows in all",
        "never more than the user allows",
        "nothing merged: the lowest",
        "nothing won: half",
        "less than a quarter won: half",
        "a quarter won: wait",
        "the job makes no progress: half",
        "not below 1 MiB/s",
        "at 1 MiB/s: no further",
        "lower where the commit is slow",
        "but not below a 32nd of it",
    ],
)
def test_a_limit_is_halved_until_the_commit_gains_on_the_guest(
    known: Throttle, merged: int, remaining: int, limit: int | None
) -> None:
    assert next_limit(known, merged, remaining, 60.0) == limit


@pytest.mark.parametrize(
    ("original", "expected"),
    [
        ({}, {"write_bytes_sec": MI}),
        ({"read_bytes_sec": 9 * MI}, {"read_bytes_sec": 9 * MI, "write_bytes_sec": MI}),
        (
            {"read_bytes_sec_max": 9 * MI, "write_bytes_sec": 5 * MI, "write_bytes_sec_max": 6 * MI},
            {"read_bytes_sec_max": 9 * MI, "write_bytes_sec": MI},
        ),
        (
            {"total_bytes_sec": 10 * MI, "total_bytes_sec_max": 20 * MI, "total_bytes_sec_max_length": 3},
            {"read_bytes_sec": 9 * MI, "write_bytes_sec": MI},
        ),
    ],
    ids=["none", "reading has its own", "no burst of writes", "a total is divided"],
)
def test_only_writing_is_slowed_down(original: dict[str, int], expected: dict[str, int]) -> None:
    assert lowered(original, MI) == expected


@pytest.mark.parametrize(
    ("known", "present", "ours"),
    [
        (throttle(4 * MI), {"write_bytes_sec": 4 * MI}, True),
        (throttle(4 * MI), {}, False),
        (throttle(4 * MI), {"write_bytes_sec": 5 * MI}, False),
        (throttle(4 * MI, pending=True), {}, True),
        (throttle(4 * MI, 2 * MI, pending=True), {"write_bytes_sec": 4 * MI}, True),
        (throttle(4 * MI, 2 * MI, pending=True), {}, False),
        (throttle(4 * MI, 2 * MI), {"write_bytes_sec": 4 * MI}, False),
    ],
    ids=[
        "as set",
        "taken away by its user",
        "changed by its user",
        "perhaps never set",
        "perhaps not lowered further",
        "taken away meanwhile",
        "an earlier limit, by its user",
    ],
)
def test_what_is_not_ours_is_recognised(known: Throttle, present: dict[str, int], ours: bool) -> None:
    assert is_ours(known, present) is ours


def test_a_burst_of_one_second_is_what_libvirt_makes_of_none() -> None:
    assert same({"write_bytes_sec_max": MI, "write_bytes_sec_max_length": 1}, {"write_bytes_sec_max": MI})
    assert not same({"write_bytes_sec_max": MI, "write_bytes_sec_max_length": 2}, {"write_bytes_sec_max": MI})


def test_a_limit_has_half_a_minute_to_show_what_it_does_or_the_deadline_if_that_is_shorter() -> None:
    assert [step_seconds(deadline) for deadline in (1, 20, 3600)] == [1, 20, 30]
