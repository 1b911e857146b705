"""Holding a guest still: freeze, suspend, resume, thaw; and the mark on its domain that says that it is us."""

from __future__ import annotations

import logging

from vmbackup.errors import PermanentError, UnknownOutcomeError, VMBackupError
from vmbackup.hypervisor.guest import Guest
from vmbackup.hypervisor.mark import Mark, MarkedDisk
from vmbackup.protocol.record import Freeze, Guard
from vmbackup.reconcile.state.journal import Journal
from vmbackup.reconcile.telling.announcer import Announcer

_log = logging.getLogger(__name__)


class Holding:
    """Does so for one backup. The mark is there before the guest stands still, and goes when it does so no more."""

    def __init__(self, journal: Journal, guest: Guest, announcer: Announcer) -> None:
        self._journal = journal
        self._guest = guest
        self._announcer = announcer
        self._marked: Mark | None = None

    def freeze(self, timeout: int) -> None:
        """Freeze the file systems. Seconds to wait for the guest agent."""
        self._mark(frozen=True)
        try:
            self._guest.freeze(timeout)
        except PermanentError:  # there is no guest agent: nothing is frozen
            self._unmark()
            raise

    def suspend(self) -> None:
        """Suspend the guest, for a snapshot or for the pivots that are intended."""
        record = self._journal.record
        self._mark(frozen=record.freeze is Freeze.FROZEN)
        self._announcer.suspending(record)
        self._guest.suspend()

    def pivot(self, target: str) -> None:
        """Switch a disk back. A guest that was suspended before that was intended is marked with it now."""
        if self._journal.record.guard is Guard.OURS:
            self._mark(frozen=False)
        self._guest.pivot(target)

    def resume(self) -> None:
        """Let the guest run."""
        record = self._journal.record
        self._guest.resume()
        self._announcer.resumed(record)
        if record.guard is Guard.OURS and not record.frozen:
            self._set(None)

    def thaw(self, timeout: int) -> None:
        """Thaw the file systems. Seconds to wait for the guest agent."""
        try:
            self._guest.thaw(timeout)
        except PermanentError:
            self._unmark()
            raise
        self._unmark()

    def _unmark(self) -> None:
        """Not frozen. A guest that is suspended by us keeps its mark."""
        if self._journal.record.guard is not Guard.OURS:
            self._set(None)

    def _mark(self, *, frozen: bool) -> None:
        record = self._journal.record
        disks = tuple(MarkedDisk(disk.target, disk.overlay, disk.pivot_intended) for disk in record.disks)
        mark = Mark(record.uid, frozen, disks)
        if mark != self._marked:
            self._set(mark)

    def _set(self, mark: Mark | None) -> None:
        """The journal is what counts: without its second copy all goes on."""
        try:
            self._guest.mark(mark)
            self._marked = mark
        except UnknownOutcomeError:
            raise
        except VMBackupError as error:
            _log.warning("%s", error)
