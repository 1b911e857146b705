"""A thread for what may block, such as a terminal that somebody has stopped: no guest waits for it."""

from __future__ import annotations

import atexit
import logging
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from threading import Thread

_FAREWELL_SECONDS = 5.0
_MOST = 10_000  # that wait at a time; a reader that is so far behind reads no more


class BackgroundOutput:
    """Does one thing after the other, in a thread of its own."""

    def __init__(self, name: str) -> None:
        self._tasks: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def do(self, task: Callable[[], object]) -> None:
        """Have this done after all others; never, where too many wait already. It must not raise."""
        if self._tasks.qsize() < _MOST:
            self._tasks.put(task)

    def end(self, seconds: float | None = None) -> None:
        """Return once all is done, or after so long."""
        self._tasks.put(None)
        self._thread.join(seconds)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()


class StderrLog(logging.Handler):
    """Looks up sys.stderr for each line: a live display puts its own there, so that lines appear above it.

    Nobody who logs waits for it: a pipe that is not read would keep a guest suspended.
    """

    def __init__(self) -> None:
        super().__init__()
        self._aside = BackgroundOutput("log")
        atexit.register(self._aside.end, _FAREWELL_SECONDS)

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        self._aside.do(partial(_write, self.format(record)))


def _write(line: str) -> None:
    with suppress(OSError, ValueError):  # nobody reads any more
        print(line, file=sys.stderr, flush=True)
