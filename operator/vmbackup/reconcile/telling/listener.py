"""Who hears of a backup."""

from __future__ import annotations

from typing import Protocol

from vmbackup.api.status import Report


class Reporter(Protocol):
    """Who is told. None of this may block or raise."""

    def report(self, report: Report) -> None:
        """The state of this moment; called often."""
        ...

    def event(self, reason: str, message: str, *, warning: bool = False) -> None:
        """Something worth a line in the log of events."""
        ...
