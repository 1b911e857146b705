"""Mutating libvirt calls, each journalled before it is sent and when it is answered (PROTOCOL R4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from vmbackup.errors import PermanentError, UnknownOutcomeError
from vmbackup.protocol.record import Call, Record
from vmbackup.protocol.terms import Action
from vmbackup.protocol.transition import answered, begun
from vmbackup.reconcile.state.clock import boot_id, boottime
from vmbackup.reconcile.state.journal import Journal


def send(journal: Journal, action: Action, call: Callable[[], object]) -> None:
    """Send the call of an action.

    The marks need not survive a power cut, which ends the call, the guest and libvirtd alike; only this process's
    death. Raises UnknownOutcomeError with the call left marked as unanswered; any other error says it did not happen.
    """
    mark = Call(action.do, boot_id(), boottime())
    journal.write(begun(replace(journal.record, call=mark), action), durable=False)
    try:
        call()
    except UnknownOutcomeError:
        raise
    except Exception:
        _close(journal, replace(journal.record, call=None))
        raise
    _close(journal, answered(replace(journal.record, call=None), action))


def _close(journal: Journal, record: Record) -> None:
    """The call has its answer, whether or not that can be written down."""
    try:
        journal.write(record, durable=False)
    except PermanentError:
        journal.record = record
        raise


def forget_call(record: Record) -> Record:
    """The record once the barrier has passed: whatever the call did, it has done."""
    return replace(record, call=None)
