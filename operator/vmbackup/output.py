"""A thread for output that may block, such as a stopped terminal, so that no guest waits for it."""

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
_MOST = 10_000  # tasks in the queue; when there are more, the reader of the output has stopped


class BackgroundOutput:
    """Runs tasks one after the other in its own thread."""

    def __init__(self, name: str) -> None:
        self._tasks: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def do(self, task: Callable[[], object]) -> None:
        """Run this after all earlier tasks; drop it if too many are waiting. It must not raise."""
        if self._tasks.qsize() < _MOST:
            self._tasks.put(task)

    def end(self, seconds: float | None = None) -> None:
        """Wait until all tasks are done, at most this long."""
        self._tasks.put(None)
        self._thread.join(seconds)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()


class StderrLog(logging.Handler):
    """Logs to sys.stderr, looked up for each line: a live display replaces it, so that lines appear above the display.

    Logging never blocks: otherwise a pipe without a reader would keep a guest suspended.
    """

    def __init__(self) -> None:
        super().__init__()
        self._aside = BackgroundOutput("log")
        atexit.register(self._aside.end, _FAREWELL_SECONDS)

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        self._aside.do(partial(_write, self.format(record)))


def _write(line: str) -> None:
    with suppress(OSError, ValueError):  # the reader is gone
        print(line, file=sys.stderr, flush=True)
