"""Control of a long copy from another thread: bandwidth, progress, and how to end it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

from vmbackup.imaging.locks import hold_reader_lock, release_reader_lock


class Cancelled(Exception):  # noqa: N818 - nothing went wrong
    """The copy was cancelled. The part that it has written is worthless."""


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
    """Controls a copy while it runs.

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
        """Hold QEMU's lock for readers on an image. Raises TransientError if it is in use, Cancelled if cancelled."""
        with self._sources.held(fd):
            self.check()
            yield

    def abandon(self) -> None:
        """Release all image locks even though the cancelled copy is stuck; it stops reading when it wakes up."""
        self._sources.let_go()

    def check(self) -> None:
        """Raise Cancelled if cancelled."""
        if self.cancelled.is_set():
            raise Cancelled

    def part(self, done: int, total: int) -> CopyControl:
        """The control of one part of a larger copy; the earlier parts have `done` bytes of `total`."""

        def progress(copied: int, _total: int) -> None:
            self.progress(done + copied, total)

        return replace(self, progress=progress)
