"""Reports a backup to its VMBackup on the API server."""

from __future__ import annotations

import logging
from collections.abc import Callable

from vmbackup.api.identity import BackupId
from vmbackup.api.status import Phase, Report
from vmbackup.cluster.events import Events, Subject
from vmbackup.cluster.status_writer import StatusWriter

_log = logging.getLogger(__name__)


class ClusterReporter:
    """Writes status and events. `heard` gets each report first; `generation` is that of the spec being acted on."""

    def __init__(
        self,
        identity: BackupId,
        writer: StatusWriter,
        events: Events,
        *,
        generation: Callable[[], int],
        heard: Callable[[Report], None] = lambda _report: None,
    ) -> None:
        self._identity = identity
        self._writer = writer
        self._events = events
        self._generation = generation
        self._heard = heard

    def report(self, report: Report) -> None:
        """Write the current state to the status."""
        self._heard(report)
        self._writer.write(report, generation=self._generation())

    def event(self, reason: str, message: str, *, warning: bool = False) -> None:
        """Create an event."""
        level = logging.WARNING if warning else logging.INFO
        _log.log(level, "%s: %s: %s", self._identity.full_name, reason, message)
        (self._events.warning if warning else self._events.normal)(self._identity, reason, message)


class OrphanReporter:
    """Reports on an orphan. `subject` is the object that its events regard: a VMBackup that is gone, or the node."""

    def __init__(self, name: str, events: Events, subject: Subject) -> None:
        self._name = name
        self._events = events
        self._subject = subject

    def report(self, report: Report) -> None:
        """Does nothing: no VMBackup is left that could have a status."""

    def event(self, reason: str, message: str, *, warning: bool = False) -> None:
        """Log it, and create an event unless it is a phase: nothing is being backed up."""
        _log.log(logging.WARNING if warning else logging.INFO, "%s: %s: %s", self._name, reason, message)
        if reason not in [*Phase]:
            (self._events.warning if warning else self._events.normal)(self._subject, reason, message)
