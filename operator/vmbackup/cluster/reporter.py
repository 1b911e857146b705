"""Who hears of a backup: its VMBackup on the API server."""

from __future__ import annotations

import logging
from collections.abc import Callable

from vmbackup.api.identity import BackupId
from vmbackup.api.status import Phase, Report
from vmbackup.cluster.events import Events, Subject
from vmbackup.cluster.status_writer import StatusWriter

_log = logging.getLogger(__name__)


class ClusterReporter:
    """Tells the VMBackup. `heard` hears each report first; `generation` is that of the spec being acted on."""

    def __init__(
        self,
        ref: BackupId,
        writer: StatusWriter,
        events: Events,
        *,
        generation: Callable[[], int],
        heard: Callable[[Report], None] = lambda _report: None,
    ) -> None:
        self._ref = ref
        self._writer = writer
        self._events = events
        self._generation = generation
        self._heard = heard

    def report(self, report: Report) -> None:
        """The state of this moment."""
        self._heard(report)
        self._writer.write(report, generation=self._generation())

    def event(self, reason: str, message: str, *, warning: bool = False) -> None:
        """Something worth an event."""
        level = logging.WARNING if warning else logging.INFO
        _log.log(level, "%s/%s: %s: %s", self._ref.namespace, self._ref.name, reason, message)
        (self._events.warning if warning else self._events.normal)(self._ref, reason, message)


class OrphanReporter:
    """For a chain that no VMBackup waits for. `subject` is what its events regard: one that is gone, or the node."""

    def __init__(self, name: str, events: Events, subject: Subject) -> None:
        self._name = name
        self._events = events
        self._subject = subject

    def report(self, report: Report) -> None:
        """No VMBackup is left that could show a status."""

    def event(self, reason: str, message: str, *, warning: bool = False) -> None:
        """A line in the log, and an event unless it is a phase: nothing is backed up any more."""
        _log.log(logging.WARNING if warning else logging.INFO, "%s: %s: %s", self._name, reason, message)
        if reason not in [*Phase]:
            (self._events.warning if warning else self._events.normal)(self._subject, reason, message)
