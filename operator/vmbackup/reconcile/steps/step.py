"""What a step is: what it works with (Run), what it is about (Task), what it returns (Next), and how a call is sent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from vmbackup.api.status import RetryReason
from vmbackup.backoff import Backoff
from vmbackup.errors import PermanentError, UnknownOutcomeError, VMBackupError
from vmbackup.hypervisor.guest import Guest
from vmbackup.hypervisor.mark import Mark
from vmbackup.protocol import advice
from vmbackup.protocol.record import Call, DiskRecord, Record
from vmbackup.protocol.terms import Action, Do
from vmbackup.protocol.transition import answered, begun, copy_failed, failed, with_call
from vmbackup.reconcile.admission.plan import Planner
from vmbackup.reconcile.background.copying import Copying
from vmbackup.reconcile.background.merging import Merging
from vmbackup.reconcile.observe import Observer, View
from vmbackup.reconcile.request import Request
from vmbackup.reconcile.state.clock import boot_id, boottime
from vmbackup.reconcile.state.journal import Journal
from vmbackup.reconcile.telling.announcer import Announcer
from vmbackup.stores.base import Store


class Ending(StrEnum):
    """Why a run is over."""

    FINISHED = "finished"
    RELEASED = "released"  # deleted, and the finalizer may go
    INTERRUPTED = "interrupted"  # told to stop; another run carries on


@dataclass(frozen=True)
class Next:
    """What comes after a step: another look, after `seconds` at most, or the end of the run."""

    seconds: float = 0.0
    ending: Ending | None = None

    @classmethod
    def wait(cls, seconds: float) -> Next:
        """Look again after so many seconds, or at the next event."""
        return cls(seconds)

    @classmethod
    def done(cls, ending: Ending) -> Next:
        """The run is over."""
        return cls(ending=ending)


AT_ONCE = Next()


@dataclass
class Run:
    """The tools of every step of one backup, and the state that is kept from one step to the next."""

    journal: Journal
    guest: Guest
    observer: Observer
    announcer: Announcer
    planner: Planner
    open_store: Callable[[], Store]
    earlier: Callable[[], Iterable[Record]]  # the records of the other backups of this domain
    adopted_home: Callable[[], None]  # tells the backups whose overlay was merged
    copying: Copying
    merging: Merging
    backoff: Backoff
    failures: Counter[Do] = field(default_factory=Counter[Do])  # in a row, by action
    mark: Mark | None = None  # the mark on the domain, as this run has written it last
    doubt: bool = False  # an outcome is unknown, so QEMU itself must be asked what it writes (PROTOCOL R3)

    @property
    def record(self) -> Record:
        """The record as it is in the journal."""
        return self.journal.record

    def disk(self, target: str) -> DiskRecord:
        """The record of one disk."""
        return self.journal.record.disk(target)

    def write(self, record: Record, *, durable: bool = True) -> None:
        """Put the record into the journal."""
        self.journal.write(record, durable=durable)

    def fail_backup(self, why: str, reason: str = "") -> Next:
        """There will be no good copy. `reason`: why, for the condition; the chain is still brought home."""
        self.write(copy_failed(self.record, why, reason))
        self.announcer.backup_failed(self.record)
        return AT_ONCE

    def commit_failed(self, action: Action, why: str, reason: RetryReason) -> Next:
        """An attempt to bring a disk home has failed: it is counted, and made again after a while."""
        disk = self.disk(action.target)
        why = advice.commit_failed(disk, why)
        pause = self.backoff.after(disk.failures + 1)
        self.write(failed(self.record, action, why, retry_at=boottime() + pause))
        self.announcer.commit_failed(action.target, why, reason, pause)
        return AT_ONCE

    def end(self) -> None:
        """This run is over: end what it does in the background."""
        self.copying.cancel()
        self.merging.let_go()
        self.announcer.run_ended(self.record)


@dataclass(frozen=True)
class Task:
    """What a step is about: the decision, what it was decided on, and what the user asks for."""

    action: Action
    view: View
    request: Request

    @property
    def target(self) -> str:
        """The target of the disk; empty for an action on the whole domain."""
        return self.action.target


@dataclass(frozen=True)
class Step:
    """What one action does, and which background work may go on meanwhile (the rest is ended first)."""

    perform: Callable[[Run, Task], Next]
    beside_copy: bool = False  # it touches no image: a copy goes on. It may be repeated for hours
    keeps_merged: bool = False  # between merge and removal of an overlay: the overlay stays locked, no guest can start
    keeps_comparison: bool = False  # a comparison of two images goes on


@dataclass(frozen=True)
class Failure:
    """Why a call was not carried out. `count`: failures of this action in a row."""

    why: str
    reason: str
    count: int


_AGAIN = 0.2  # seconds before a step inside a switch of images is tried again
_MANY = 10  # failures, after which it is tried less often
_LATER = 5.0  # seconds


def try_again(_run: Run, _task: Task, failure: Failure) -> Next:
    """Decide again after a moment."""
    return Next.wait(_AGAIN if failure.count < _MANY else _LATER)


def _no_change(run: Run, _task: Task) -> Record:
    return run.record


def _nothing(_run: Run, _task: Task) -> None:
    pass


@dataclass(frozen=True)
class CallStep:
    """A step that sends one mutating libvirt call, journalled before it is sent and when it is answered (R4)."""

    call: Callable[[Run, Task], object]
    failed: Callable[[Run, Task, Failure], Next] = try_again
    noted: Callable[[Run, Task], Record] = _no_change  # the record to journal before the call; raises OSError
    answered: Callable[[Run, Task], None] = _nothing  # announces that it was carried out
    unknown: Callable[[Run, Task], None] = _nothing  # announces that its outcome is unknown
    lost_answer: str = ""  # the message, if an unknown outcome counts as a failure

    def perform(self, run: Run, task: Task) -> Next:
        """Send it. Raises UnknownOutcomeError, and PermanentError where the journal cannot be written."""
        action = task.action
        try:
            if (noted := self.noted(run, task)) is not run.record:
                run.write(noted, durable=False)
        except OSError as error:
            return self._failed(run, task, f"the UEFI variables {run.record.nvram} cannot be kept ({error.strerror})")
        try:
            send(run.journal, action, lambda: self.call(run, task))
        except UnknownOutcomeError:
            self.unknown(run, task)
            if not self.lost_answer:
                raise
            return self._failed(run, task, self.lost_answer)
        except VMBackupError as error:
            return self._failed(run, task, str(error), error.reason)
        run.failures.pop(action.do, None)
        self.answered(run, task)
        return AT_ONCE

    def _failed(self, run: Run, task: Task, why: str, reason: str = "") -> Next:
        run.failures[task.action.do] += 1
        return self.failed(run, task, Failure(why, reason, run.failures[task.action.do]))


def send(journal: Journal, action: Action, call: Callable[[], object]) -> None:
    """Send the call of an action.

    The journal lines need not survive a power cut, which ends the call, the guest and libvirtd alike; only the death of
    this process. Raises UnknownOutcomeError with the call left marked as unanswered; any other error says that it did
    not happen.
    """
    journal.write(begun(with_call(journal.record, Call(action.do, boot_id(), boottime())), action), durable=False)
    try:
        call()
    except UnknownOutcomeError:
        raise
    except Exception:
        _close(journal, with_call(journal.record, None))
        raise
    _close(journal, answered(with_call(journal.record, None), action))


def _close(journal: Journal, record: Record) -> None:
    """The call was answered, even if that cannot be journalled."""
    try:
        journal.write(record, durable=False)
    except PermanentError:
        journal.record = record
        raise
