"""A bandwidth limit that can change at any moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

BURST_SECONDS = 0.1
POLL_SECONDS = 0.1


class TokenBucket:
    """Allows `rate()` bytes per second, which may change at any time; None is unlimited.

    Bytes are accounted for after they were copied: the first piece goes at once, and the next one waits until the
    bucket is out of debt at the current rate.
    """

    def __init__(self, rate: Callable[[], int | None], clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._level = 0.0
        self._filled = clock()

    def spend(self, amount: int) -> None:
        """Account for `amount` bytes."""
        self._level -= amount

    def delay(self) -> float:
        """Seconds to wait, at the current rate, before more bytes may be copied."""
        now, rate = self._clock(), self._rate()
        elapsed, self._filled = now - self._filled, now
        if rate is None:
            self._level = 0.0
            return 0.0
        self._level = min(self._level + elapsed * rate, BURST_SECONDS * rate)
        return max(0.0, -self._level / rate)

    def wait(self, cancelled: threading.Event) -> None:
        """Wait until more bytes may be copied, or until `cancelled` is set."""
        while (delay := self.delay()) > 0 and not cancelled.wait(min(delay, POLL_SECONDS)):
            pass
