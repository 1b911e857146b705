"""Slowing down a guest's writes so that a commit converges, and undoing it."""

from __future__ import annotations

from dataclasses import replace

from vmbackup.errors import Cause, PermanentError, UnknownOutcomeError, VMBackupError
from vmbackup.hypervisor.guest import BlockJob, Guest
from vmbackup.protocol import convergence as stall
from vmbackup.protocol.record import Throttle
from vmbackup.protocol.terms import Action, Do
from vmbackup.protocol.transition import answered
from vmbackup.reconcile.state.clock import boottime
from vmbackup.reconcile.state.journal import Journal
from vmbackup.reconcile.steps.calls import send
from vmbackup.reconcile.telling.announcer import Announcer

_ATTEMPTS = 5  # to undo it, after which the way home goes on without
_AGAIN = 1.0  # seconds between them


class Throttling:
    """Lowers and restores the live <iotune> of the disks of one backup; the persistent XML is not touched."""

    def __init__(self, journal: Journal, guest: Guest, announcer: Announcer) -> None:
        self._journal = journal
        self._guest = guest
        self._announcer = announcer
        self._failures = 0

    def perform(self, action: Action, job: BlockJob | None, deadline: float) -> float:
        """Carry out THROTTLE or UNTHROTTLE; returns the seconds to wait before the next look.

        `deadline`: the commit's, in seconds. Raises UnknownOutcomeError, and PermanentError of the journal.
        """
        if action.do is Do.UNTHROTTLE:
            return self._restore(action)
        if job is not None:  # else it has just ended
            self._lower(action, job, deadline)
        return 0.0

    def _lower(self, action: Action, job: BlockJob, deadline: float) -> None:
        """Lower the limit, if the present one does not let the commit converge."""
        disk = self._journal.record.disk(action.target)
        now = boottime()
        known = disk.throttle or Throttle(())
        known = replace(known, next_at=now + stall.step_seconds(deadline))
        try:
            present = self._guest.byte_limits(action.target)
        except VMBackupError as error:
            self._not_lowered(action, known, error)
            return
        if not known.limits:
            known = replace(known, original=tuple(sorted(present.items())))
        elif not stall.is_ours(known, present):
            self._yield(action, known)
            return
        remaining = job.end - job.current
        limit = stall.next_limit(known, job.current, remaining, now - (disk.commit_started or now))
        looked = replace(known, merged=job.current, remaining=remaining)
        if limit is None:
            self._write(action.target, looked, durable=False)
            return
        self._write(action.target, replace(looked, limits=(*known.limits, limit), pending=True))
        tune = stall.lowered(dict(known.original), limit)
        try:
            send(self._journal, action, lambda: self._guest.limit_bytes(action.target, tune))
        except UnknownOutcomeError:
            raise
        except VMBackupError as error:
            self._not_lowered(action, looked, error)
            return
        self._announcer.throttled(action.target, limit)

    def _restore(self, action: Action) -> float:
        throttle = self._journal.record.disk(action.target).throttle
        try:
            if throttle and not throttle.yielded and self._set_back(action, throttle):
                return 0.0
        except UnknownOutcomeError:
            raise
        except VMBackupError as error:
            self._raise_if_journal(error)
            self._failures += 1
            if self._failures < _ATTEMPTS:
                return _AGAIN
            self._announcer.not_unthrottled(action.target, dict(throttle.original) if throttle else {}, str(error))
        self._failures = 0
        self._journal.write(answered(self._journal.record, action), durable=True)
        return 0.0

    def _set_back(self, action: Action, throttle: Throttle) -> bool:
        """Set what it was before, unless somebody else has changed it since. Whether there was something to set."""
        original, present = dict(throttle.original), self._guest.byte_limits(action.target)
        if stall.same(present, original):
            return False
        if not stall.is_ours(throttle, present):
            self._announcer.limits_yielded(action.target)
            return False
        send(self._journal, action, lambda: self._guest.limit_bytes(action.target, original))
        self._failures = 0
        self._announcer.unthrottled(action.target)
        return True

    def _yield(self, action: Action, known: Throttle) -> None:
        self._write(action.target, replace(known, yielded=True))
        self._announcer.limits_yielded(action.target)

    def _not_lowered(self, action: Action, known: Throttle, error: VMBackupError) -> None:
        self._raise_if_journal(error)
        self._write(action.target, replace(known, yielded=isinstance(error, PermanentError)))
        self._announcer.not_throttled(action.target, str(error))

    def _raise_if_journal(self, error: VMBackupError) -> None:
        if error.reason == Cause.JOURNAL_UNWRITABLE:
            raise error

    def _write(self, target: str, throttle: Throttle, *, durable: bool = True) -> None:
        self._journal.write(self._journal.record.with_disk(target, throttle=throttle), durable=durable)
