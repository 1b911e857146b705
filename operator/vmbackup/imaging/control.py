"""How a long copy is steered and watched from another thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

from vmbackup.imaging.locks import hold_reader_lock, release_reader_lock


class Cancelled(Exception):  # noqa: N818 - nothing went wrong
    """The copy ended early because it was told to; what it had written so far is worthless."""


def _unlimited() -> int | None:
    return None


def _unwatched(_copied: int, _total: int) -> None:
    return


class _Sources:
    """The images that a copy holds as a reader."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._open: set[int] = set()

    @contextmanager
    def held(self, fd: int) -> Generator[None]:
        with self._mutex:
            hold_reader_lock(fd)
            self._open.add(fd)
        try:
            yield
        finally:
            with self._mutex:
                self._open.remove(fd)

    def let_go(self) -> None:
        with self._mutex, suppress(OSError):
            for fd in self._open:
                release_reader_lock(fd)


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
    _sources: _Sources = field(default_factory=_Sources)

    @contextmanager
    def reading(self, fd: int) -> Generator[None]:
        """Hold QEMU's lock for readers on an image. Raises TransientError if it is in use, Cancelled if told to end."""
        with self._sources.held(fd):
            self.check()
            yield

    def abandon(self) -> None:
        """Let go of every image though the copy, which was cancelled, is stuck: it reads no more when it goes on."""
        self._sources.let_go()

    def check(self) -> None:
        """Raise Cancelled if told to end."""
        if self.cancelled.is_set():
            raise Cancelled

    def part(self, done: int, total: int) -> CopyControl:
        """The control of one part of a larger copy: `done` bytes of `total` came before it."""

        def progress(copied: int, _total: int) -> None:
            self.progress(done + copied, total)

        return replace(self, progress=progress)
