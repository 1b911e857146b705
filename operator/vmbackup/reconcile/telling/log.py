"""A reporter that writes to the log: for a backup whose VMBackup is gone or is not needed."""

from __future__ import annotations

import logging

from vmbackup.api.status import Report

_log = logging.getLogger(__name__)


class LogReporter:
    """Reports to the log. `name`: of the backup."""

    def __init__(self, name: str) -> None:
        self._name = name

    def report(self, report: Report) -> None:
        """A log has no status."""

    def event(self, reason: str, message: str, *, warning: bool = False) -> None:
        """A line in the log."""
        _log.log(logging.WARNING if warning else logging.INFO, "%s: %s: %s", self._name, reason, message)
