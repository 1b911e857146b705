"""Bounds that are a claim: how long something took, less the time in which this machine had more work than CPU."""

from __future__ import annotations

import time
from pathlib import Path

_PRESSURE = Path("/proc/pressure/cpu")  # of Linux: for how long any process has waited for a CPU, in total
_REFRESH_SECONDS = 2.5  # after which the kernel has counted what it had not yet


class Stopwatch:
    """Runs from its making. Where the kernel does not tell of waiting for a CPU, all time counts."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._waited = _waited()

    @property
    def seconds(self) -> float:
        """Since the start, on the clock."""
        return time.monotonic() - self._started

    def within(self, bound: float) -> bool:
        """Whether at most `bound` seconds have passed, not counting those in which some process waited for a CPU."""
        return self.allows(self.seconds, bound)

    def allows(self, seconds: float, bound: float) -> bool:
        """The same of a part of the time since the start that took `seconds`."""
        if seconds <= bound:
            return True
        refreshed = time.monotonic() + _REFRESH_SECONDS
        while seconds - (_waited() - self._waited) > bound:
            if time.monotonic() > refreshed:
                return False
            time.sleep(0.1)
        return True

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s since the start, in {_waited() - self._waited:.1f} s of them the CPUs were taken"


def _waited() -> float:
    """Seconds."""
    try:
        words = _PRESSURE.read_text().split()
    except OSError:
        return 0.0
    return int(next(word for word in words if word.startswith("total=")).removeprefix("total=")) / 1e6
