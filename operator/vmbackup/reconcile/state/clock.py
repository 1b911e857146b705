"""Time that no clock jump disturbs, and the barrier of PROTOCOL R4."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path

from vmbackup.protocol.record import Call

# libvirt gives up waiting for a domain's job after 30 s (PROTOCOL R4): after that, an unanswered call cannot begin.
BARRIER_SECONDS = 31.0


def boottime() -> float:
    """Seconds since this machine booted, suspension included (CLOCK_BOOTTIME)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@cache
def boot_id() -> str:
    """Which boot of this machine it is."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def may_be_in_flight(
    call: Call | None, *, boot: str, now: float, answering_since: float | None, control_idle: bool
) -> bool:
    """R4: whether this unanswered call may still be carried out.

    Not after a reboot. Else until libvirt says that nothing is under way for the domain (`control_idle`) and 31 s have
    passed since the later of the call and of libvirtd answering again (`answering_since`, None while it does not).
    """
    if call is None or call.boot_id != boot:
        return False
    if answering_since is None or not control_idle:
        return True
    return now - max(call.boottime, answering_since) < BARRIER_SECONDS
