"""Sends the status of a VMBackup to the API server in the background, so that no backup waits for it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from vmbackup.api.identity import BackupId
from vmbackup.api.status import Report
from vmbackup.backoff import Backoff
from vmbackup.cluster.client import Cluster
from vmbackup.cluster.status import is_significant, render

logger = logging.getLogger(__name__)

_RETRIES = Backoff(first=0.5, longest=30.0)
_HURRIED_RETRIES = Backoff(first=0.5, longest=1.0)


class StatusWriter:
    """Writes the status of one VMBackup.

    `write` never waits: a thread sends, which lives only while there is something to send. Significant changes (phase,
    conditions, a handled retry) are sent at once and in order, progress at most every `interval` seconds. While the
    server is away only the newest status is kept, and retried until it arrives.
    `previous` is the status as last seen, `generation` that of the spec being acted on; `late` is called with
    the time since which a status waits to be sent (seconds since the epoch), and with None when none waits.
    """

    def __init__(
        self,
        cluster: Cluster,
        identity: BackupId,
        *,
        generation: int,
        previous: Mapping[str, Any] | None = None,
        interval: float = 2.0,
        late: Callable[[float | None], None] = lambda _since: None,
    ) -> None:
        self._cluster = cluster
        self._identity = identity
        self._interval = interval
        self._late = late
        self._generation = generation
        self._newest: Mapping[str, Any] = previous or {}
        self._written: Mapping[str, Any] = {}
        self._pending: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._sent_at = float("-inf")
        self._failures = 0
        self._hurried = False
        self._gone = False

    @property
    def gone(self) -> bool:
        """The object was found deleted, or replaced by another of its name: nothing more is written."""
        return self._gone

    @property
    def latest(self) -> Mapping[str, Any]:
        """The newest status, on the server or on its way."""
        return self._newest

    def write(self, report: Report, *, generation: int | None = None) -> None:
        """Send this report. `generation`: that of the spec being acted on, if it has changed."""
        with self._changed:
            self._generation = self._generation if generation is None else generation
            status = render(report, generation=self._generation, previous=self._newest, now=time.time())
            if self._gone or status == self._newest:
                return
            self._newest = status
            if not self._pending:
                self._late(time.time())
            if self._failures:
                self._pending.clear()
            elif self._pending and not is_significant(self._pending[-1], status):
                self._pending.pop()
            self._pending.append(status)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._send_all, name=f"status-{self._identity.name}", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()

    def flush(self, seconds: float) -> bool:
        """Wait at most this long until all is written or the object is gone. False: not yet; it keeps trying."""
        with self._changed:
            self._hurried = True
            self._changed.notify_all()
            arrived = self._changed.wait_for(lambda: not self._pending, seconds)
            self._hurried = False
            return arrived

    def close(self) -> None:
        """Discard statuses that are not written yet."""
        with self._changed:
            self._pending.clear()
            self._late(None)
            self._changed.notify_all()

    def _send_all(self) -> None:
        while (status := self._next()) is not None:
            try:
                answer = self._cluster.put_status(self._identity, status)
            except Exception as error:  # also unforeseen errors of the client: this thread must go on
                self._failed(error)
            else:
                self._arrived(status, answer)

    def _next(self) -> dict[str, Any] | None:
        """The status to send next, once it is due; None, and the thread has ended, when there is none."""
        with self._changed:
            while self._pending:
                while len(self._pending) > 1 and not is_significant(self._written, self._pending[0]):
                    self._pending.pop(0)
                delay = self._sent_at + self._pause(self._pending[0]) - time.monotonic()
                if delay <= 0:
                    return self._pending[0]
                self._changed.wait(delay)
            self._thread = None
            return None

    def _pause(self, status: Mapping[str, Any]) -> float:
        """How long after the last write this one is due, in seconds."""
        if self._failures:
            return (_HURRIED_RETRIES if self._hurried else _RETRIES).after(self._failures)
        return 0.0 if self._hurried or is_significant(self._written, status) else self._interval

    def _failed(self, error: Exception) -> None:
        level = logging.DEBUG if self._failures else logging.WARNING
        logger.log(level, "status of %s not written, will try again: %s", self._identity.full_name, error)
        with self._changed:
            self._sent_at = time.monotonic()
            self._failures += 1
            del self._pending[:-1]

    def _arrived(self, status: dict[str, Any], answer: dict[str, Any] | None) -> None:
        with self._changed:
            self._sent_at = time.monotonic()
            self._failures = 0
            if answer is None:
                self._gone = True
                self._pending.clear()
            else:
                self._written = status
                self._pending = [waiting for waiting in self._pending if waiting is not status]
            self._late(time.time() if self._pending else None)
            self._changed.notify_all()
