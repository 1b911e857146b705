from __future__ import annotations

import threading

import pytest

from vmbackup.imaging.throttle import BURST_SECONDS, TokenBucket


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Limited:
    """A bucket whose rate and clock the test turns by hand."""

    def __init__(self, rate: int | None) -> None:
        self.rate = rate
        self.clock = Clock()
        self.bucket = TokenBucket(lambda: self.rate, self.clock)


def test_the_first_bytes_go_at_once() -> None:
    assert Limited(100).bucket.delay() == 0


def test_what_was_spent_is_waited_for_at_the_rate() -> None:
    limited = Limited(100)
    limited.bucket.spend(250)
    assert limited.bucket.delay() == pytest.approx(2.5)
    limited.clock.now += 2.0
    assert limited.bucket.delay() == pytest.approx(0.5)
    limited.clock.now += 0.5
    assert limited.bucket.delay() == pytest.approx(0)


def test_over_a_long_time_the_rate_is_met_exactly() -> None:
    limited = Limited(1000)
    started = limited.clock.now
    for _ in range(500):
        limited.clock.now += limited.bucket.delay()
        limited.bucket.spend(64)
    limited.clock.now += limited.bucket.delay()
    assert limited.clock.now - started == pytest.approx(500 * 64 / 1000)


def test_a_pause_does_not_save_up_more_than_a_burst() -> None:
    limited = Limited(1000)
    limited.clock.now += 3600
    assert limited.bucket.delay() == 0
    limited.bucket.spend(1000)
    assert limited.bucket.delay() == pytest.approx(1 - BURST_SECONDS)


def test_a_new_rate_counts_at_once_for_what_is_owed() -> None:
    limited = Limited(10)
    limited.bucket.spend(1000)
    assert limited.bucket.delay() == pytest.approx(100)
    limited.rate = 1000
    assert limited.bucket.delay() == pytest.approx(1)


def test_without_a_limit_there_is_no_wait_and_no_debt_for_a_later_limit() -> None:
    limited = Limited(None)
    limited.bucket.spend(10**12)
    assert limited.bucket.delay() == 0
    limited.rate = 100
    assert limited.bucket.delay() == 0


def test_waiting_ends_when_cancelled() -> None:
    bucket = TokenBucket(lambda: 1)
    bucket.spend(10**6)
    cancelled = threading.Event()
    cancelled.set()
    bucket.wait(cancelled)
