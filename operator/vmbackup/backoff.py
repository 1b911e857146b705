"""How long to wait before a retry."""

from __future__ import annotations

from dataclasses import dataclass

_MOST_DOUBLINGS = 64  # long after any cap; a float overflows at 1024


@dataclass(frozen=True)
class Backoff:
    """Capped exponential pauses, in seconds. The defaults are the pauses after a failed commit."""

    first: float = 5.0
    longest: float = 300.0

    def after(self, failures: int) -> float:
        """The pause after so many failures in a row, 1 or more."""
        return min(self.longest, self.first * 2.0 ** min(failures - 1, _MOST_DOUBLINGS))
