"""How a long copy is steered and watched from another thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace


class Cancelled(Exception):  # noqa: N818 - nothing went wrong
    """The copy ended early because it was told to; what it had written so far is worthless."""


def _unlimited() -> int | None:
    return None


def _unwatched(_copied: int, _total: int) -> None:
    return


@dataclass(frozen=True)
class CopyControl:
    """How a copy is steered while it runs.

    `bandwidth` gives bytes per second (None: unlimited) and is asked about ten times a second, and before each read.
    `cancelled` ends the copy with Cancelled within 0.2 s, a slow device aside.
    `progress(done, total)` is called after each read, of 512 KiB, and counts holes too: throttle it yourself.
    """

    bandwidth: Callable[[], int | None] = _unlimited
    cancelled: threading.Event = field(default_factory=threading.Event)
    progress: Callable[[int, int], None] = _unwatched

    def check(self) -> None:
        """Raise Cancelled if told to end."""
        if self.cancelled.is_set():
            raise Cancelled

    def part(self, done: int, total: int) -> CopyControl:
        """The control of one part of a larger copy: `done` bytes of `total` came before it."""

        def progress(copied: int, _total: int) -> None:
            self.progress(done + copied, total)

        return replace(self, progress=progress)
