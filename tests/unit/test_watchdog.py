"""/healthz: a stuck event loop, a libvirtd that is away for long, and a dead watch are told by name."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pytest

from vmbackup.agent.runtime import watchdog
from vmbackup.agent.runtime.watchdog import Watchdog


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that a test sets."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def answers(dog: Watchdog) -> dict[str, str]:
    return {name: check() for name, check in dog.checks.items()}


def test_an_event_loop_that_is_blocked_for_30_seconds_is_stuck(clock: SimpleNamespace) -> None:
    dog = Watchdog(SimpleNamespace(answering_since=1.0, uri="test"), lambda: "")

    async def turn() -> None:
        beating = asyncio.create_task(dog.beat())
        await asyncio.sleep(0)
        beating.cancel()

    clock.now += 100
    assert "stuck for 100 s" in answers(dog)["event loop"]
    asyncio.run(turn())
    clock.now += 30
    assert answers(dog) == {"event loop": "", "libvirt": "", "watch": ""}
    clock.now += 1
    assert "stuck for 31 s" in answers(dog)["event loop"]


def test_libvirtd_may_be_away_for_a_minute_but_not_longer(clock: SimpleNamespace) -> None:
    hypervisor = SimpleNamespace(answering_since=None, uri="qemu:///system")
    dog = Watchdog(hypervisor, lambda: "")
    assert answers(dog)["libvirt"] == ""
    clock.now += 61
    assert "qemu:///system has not answered for 61 s" in answers(dog)["libvirt"]
    hypervisor.answering_since = time.monotonic()
    assert answers(dog)["libvirt"] == ""
    hypervisor.answering_since = None
    assert answers(dog)["libvirt"] == ""


def test_a_libvirtd_that_is_away_is_no_reason_to_restart_the_agent() -> None:
    dog = Watchdog(SimpleNamespace(answering_since=None, uri="test"), lambda: "")
    assert set(dog.checks) - set(watchdog.RESTART_MENDS) == {"libvirt"}
    assert set(watchdog.RESTART_MENDS) < set(dog.checks)


def test_what_the_sweep_says_of_the_watch_is_told() -> None:
    dog = Watchdog(SimpleNamespace(answering_since=1.0, uri="test"), lambda: "3 were not noticed")
    assert dog.checks["watch"]() == "3 were not noticed"
