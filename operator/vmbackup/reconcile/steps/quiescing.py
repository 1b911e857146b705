"""Freezing or thawing a guest has failed: what is known then, and when it is tried again."""

from __future__ import annotations

from dataclasses import replace

from vmbackup.errors import Cause
from vmbackup.protocol.record import Freeze
from vmbackup.protocol.terms import Action, Do
from vmbackup.protocol.transition import answered, failed
from vmbackup.reconcile.observe import Observer
from vmbackup.reconcile.state.clock import boottime
from vmbackup.reconcile.state.journal import Journal
from vmbackup.reconcile.telling.announcer import Announcer

_NO_AGENT = (Cause.AGENT_NOT_CONFIGURED, Cause.UNSUPPORTED)  # reasons for which nothing can ever be frozen
_THAW_ATTEMPTS = 20
_THAW_PAUSE = 3.0  # seconds


class Quiescing:
    """Keeps the record of one backup where the guest agent does not do what it is asked for."""

    def __init__(self, journal: Journal, observer: Observer, announcer: Announcer) -> None:
        self._journal = journal
        self._observer = observer
        self._announcer = announcer

    def freeze_failed(self, why: str, reason: str, *, required: bool) -> None:
        """Not frozen, as far as is known; but a guest agent that was asked in vain may still freeze later: thaw."""
        refused = reason in _NO_AGENT
        record = failed(replace(self._journal.record, call=None), Action(Do.FREEZE), why, retry_at=0.0)
        self._journal.write(replace(record, freeze=Freeze.TRIED) if refused else record, durable=True)
        if not required:
            self._announcer.event("NotQuiesced", f"the snapshot will be crash-consistent: {why}", warning=not refused)

    def thaw_failed(self, count: int, why: str, reason: str) -> None:
        """It is tried again, `count` times in all; unless there is no agent."""
        record = replace(self._journal.record, call=None)
        if reason in _NO_AGENT:  # then nothing is frozen: a run that was killed while freezing could not know that
            self._journal.write(answered(record, Action(Do.THAW)), durable=True)
            return
        self._observer.thaw_after = boottime() + _THAW_PAUSE
        if count >= _THAW_ATTEMPTS:
            self._journal.write(replace(record, freeze=Freeze.TRIED), durable=True)
            cure = "gave up thawing, thaw it by hand (virsh domfsthaw)"
            self._announcer.event("ThawFailed", f"{cure}: {why}", warning=True)
