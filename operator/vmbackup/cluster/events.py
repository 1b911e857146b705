"""Sends Kubernetes events to the API server in the background, so that no backup waits for it."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from vmbackup.backoff import Backoff
from vmbackup.cluster.client import Cluster
from vmbackup.errors import TransientError

logger = logging.getLogger(__name__)

_RETRIES = Backoff(first=0.5, longest=15.0)
_HURRIED_RETRIES = Backoff(first=0.5, longest=1.0)
_LIMIT = 1000  # events that wait: about 1 MB; one backup makes some ten
_NOTE_LIMIT = 1000  # characters: the API server takes 1 kB (events.k8s.io/v1, field note)


class Subject(Protocol):
    """The object that an event regards."""

    @property
    def namespace(self) -> str:
        """The namespace of the event."""
        ...

    @property
    def name(self) -> str:
        """The name of the object."""
        ...

    @property
    def regarding(self) -> Mapping[str, str]:
        """The reference of the object."""
        ...


@dataclass(frozen=True)
class NodeRef:
    """A node of the cluster, or a hypervisor outside of it, for events that concern no VMBackup.

    Its events are in the namespace `default`, as for every object without one. `kubectl describe node` finds events by
    uid, and the kubelet uses the name of the node as its uid.
    """

    name: str
    namespace: str = "default"

    @property
    def regarding(self) -> Mapping[str, str]:
        """The object reference of the node."""
        return {"apiVersion": "v1", "kind": "Node", "name": self.name, "uid": self.name}


class Events:
    """Events of this agent, sent in order by a thread that lives only while there is something to send.

    No method waits or raises. While the server is away events are kept, each with its own time; beyond `limit` the
    oldest are dropped, and the log says how many. An event that the server refuses is logged and not retried.
    """

    def __init__(self, cluster: Cluster, *, node: str, limit: int = _LIMIT) -> None:
        self._cluster = cluster
        self._node = node
        self._limit = limit
        self._waiting: deque[Mapping[str, Any]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._failures = 0
        self._failed_at = 0.0
        self._dropped = 0
        self._hurried = False
        self._closed = False

    def normal(self, subject: Subject, reason: str, message: str) -> None:
        """Create an event of type Normal."""
        self._emit(subject, "Normal", reason, message)

    def warning(self, subject: Subject, reason: str, message: str) -> None:
        """Create an event of type Warning."""
        self._emit(subject, "Warning", reason, message)

    def flush(self, seconds: float) -> bool:
        """Wait at most this long until all are sent or refused. False: not yet; it keeps trying."""
        with self._changed:
            self._hurried = True
            self._changed.notify_all()
            arrived = self._changed.wait_for(lambda: not self._waiting, seconds)
            self._hurried = False
            return arrived

    def close(self) -> None:
        """Discard events that are not sent yet."""
        with self._changed:
            self._closed = True
            if self._waiting:
                logger.warning("%d events were not sent", len(self._waiting))
            self._waiting.clear()
            self._changed.notify_all()

    def _emit(self, subject: Subject, kind: str, reason: str, message: str) -> None:
        event = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"name": f"{subject.name[:200]}.{uuid.uuid4().hex[:16]}", "namespace": subject.namespace},
            "eventTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "type": kind,
            "reason": reason,
            "action": reason,
            "note": message if len(message) <= _NOTE_LIMIT else message[: _NOTE_LIMIT - 1] + "…",
            "reportingController": "vmbackup",
            "reportingInstance": f"vmbackup-{self._node}"[:128],
            "regarding": subject.regarding,
        }
        with self._changed:
            if self._closed:
                logger.debug("event %s about %s/%s not sent: closed", reason, subject.namespace, subject.name)
                return
            self._waiting.append(event)
            if len(self._waiting) > self._limit:
                self._waiting.popleft()
                self._dropped += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._send_all, name="events", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def _send_all(self) -> None:
        while (event := self._next()) is not None:
            metadata = event["metadata"]
            try:
                self._cluster.create_event(metadata["namespace"], event)
            except TransientError as error:
                self._failed(event, error)
                continue
            except Exception as error:  # also unforeseen errors of the client: this thread must go on
                logger.warning("event %s about %s not sent: %s", event["reason"], metadata["name"], error)
            self._done_with(event)

    def _next(self) -> Mapping[str, Any] | None:
        """The event to send next, once it is due; None, and the thread has ended, when there is none."""
        with self._changed:
            while self._waiting:
                delay = self._failed_at + self._pause() - time.monotonic()
                if delay <= 0:
                    return self._waiting[0]
                self._changed.wait(delay)
            self._thread = None
            return None

    def _pause(self) -> float:
        """Seconds from the last failure to the next attempt."""
        if not self._failures:
            return 0.0
        return (_HURRIED_RETRIES if self._hurried else _RETRIES).after(self._failures)

    def _failed(self, event: Mapping[str, Any], error: TransientError) -> None:
        level = logging.DEBUG if self._failures else logging.WARNING
        name = event["metadata"]["name"]
        logger.log(level, "event %s about %s not sent, will try again: %s", event["reason"], name, error)
        with self._changed:
            self._failed_at = time.monotonic()
            self._failures += 1

    def _done_with(self, event: Mapping[str, Any]) -> None:
        with self._changed:
            self._failures = 0
            if self._waiting and self._waiting[0] is event:  # else it was dropped or discarded meanwhile
                self._waiting.popleft()
            if self._dropped:
                logger.warning("%d events were dropped while the API server was away", self._dropped)
                self._dropped = 0
            self._changed.notify_all()
