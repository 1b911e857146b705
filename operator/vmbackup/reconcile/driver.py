"""One backup of one domain, from any state to its end: observe, decide, act, report, until done."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace

from vmbackup.api.backup import Quiesce, SwitchPolicy
from vmbackup.errors import Cause, PermanentError, RefusedError, TransientError, UnknownOutcomeError, VMBackupError
from vmbackup.hypervisor.hypervisor import Hypervisor
from vmbackup.protocol.convergence import with_overdue
from vmbackup.protocol.decide import decide
from vmbackup.protocol.record import Copy, Guard, Record, Snapshot
from vmbackup.protocol.terms import Action, Do, Intent, Power
from vmbackup.protocol.transition import taken_up_again, with_call, without_switches
from vmbackup.reconcile.observe import View
from vmbackup.reconcile.request import Request
from vmbackup.reconcile.state.clock import boottime
from vmbackup.reconcile.steps.actions import perform
from vmbackup.reconcile.steps.snapshot import plan
from vmbackup.reconcile.steps.step import AT_ONCE, Ending, Next, Run, Task

_log = logging.getLogger(__name__)

_POLL = 1.0  # seconds; events wake it earlier
_RECONNECT_PAUSE = 1.0  # libvirtd takes up its running guests again after it has begun to answer
_SWITCH = 1.0  # seconds; one takes 25 to 60 ms
_WORTH_TELLING = 3  # hiccups in a row
_HICCUPS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # seconds between looks while looking fails


class Driver:
    """Drives one backup. `request` is asked before each step; `wake` (any thread) makes it look at once."""

    def __init__(
        self,
        *,
        hypervisor: Hypervisor,
        run: Run,
        request: Callable[[], Request],
        woken: threading.Event,
        journal_error: PermanentError | None = None,
    ) -> None:
        """`journal_error`: the journal has given up already, and the only task left is to resume the guest."""
        self._hypervisor = hypervisor
        self._run = run
        self._request = request
        self._woken = woken
        self._generation = hypervisor.generation
        # A record that was begun comes from an earlier run: anything may have happened since.
        run.doubt = self._record.snapshot is not Snapshot.NONE
        self._hiccups = 0
        self._journal_error = journal_error
        self._paused_by_another = False

    @property
    def _record(self) -> Record:
        return self._run.record

    def wake(self) -> None:
        """Look at once: the request or the domain has changed."""
        self._woken.set()

    def run(self) -> Ending:
        """Drive it to its end. Raises PermanentError only where the journal cannot be written."""
        unsubscribe = self._hypervisor.subscribe(self._record.domain_uuid, self.wake)
        try:
            while True:
                self._woken.clear()
                request = self._request()
                if request.stop and self._may_stop():
                    return Ending.INTERRUPTED
                if self._journal_error is not None and self._may_stop():
                    raise self._journal_error
                following = self._step(request)
                if following.ending is not None:
                    return following.ending
                if following.seconds > 0:
                    self._woken.wait(following.seconds)
        finally:
            unsubscribe()
            self._run.end()

    def _may_stop(self) -> bool:
        """Never with the guest suspended, frozen or slowed down by us, unless that cannot be changed now.

        Exceptions: somebody else paused the frozen guest, or a throttled guest cannot be observed.
        """
        slowed = self._record.throttles_guest and self._record.call is None and not self._hiccups
        held = self._record.holds_guest and not (self._record.guard is not Guard.OURS and self._paused_by_another)
        return not held and not slowed

    def _step(self, request: Request) -> Next:
        """One round: observe, decide, tell, act."""
        try:
            if request.retry != self._record.handled_retry:
                self._run.write(taken_up_again(self._record, request.retry))
            if self._unplanned(request) and not self._record.holds_guest and self._record.call is None:
                return plan(self._run, request)
            view = self._observe(request)
            action = self._decide(request, view)
            waits = action.do is Do.WAIT and not view.seen.call_in_flight
            self._paused_by_another = waits and view.seen.power is not Power.RUNNING
            _log.debug("%s: %s %s", self._record.name, action.do, action.target)
            if self._journal_error is None and not self._hastens(action):
                self._run.announcer.tell(self._record, view.seen, action)
            following = perform(self._run, Task(action, view, request))
            self._hiccups = 0
            return following
        except RefusedError as error:
            return self._run.fail_backup(str(error), error.reason)
        except UnknownOutcomeError as error:
            self._run.doubt = True
            self._run.announcer.event("UnknownOutcome", str(error), warning=True)
            return Next.wait(_POLL)
        except TransientError as error:
            return self._hiccup(error)
        except PermanentError as error:
            if error.reason != Cause.JOURNAL_UNWRITABLE:
                return self._hiccup(error)
            if self._may_stop():
                raise
            self._journal_error = error  # the guest comes first
            self._run.journal.give_up(without_switches(self._record))
            return AT_ONCE
        except Exception as error:
            if self._may_stop():
                raise
            _log.exception("%s: internal error while the guest is suspended; retrying until it runs", self._record.name)
            return self._hiccup(TransientError(f"internal error: {error!r}", reason="Fault"))

    def _hastens(self, action: Action) -> bool:
        """The guest is suspended for a switch of images: announce it afterwards, unless it takes longer than usual."""
        since = self._record.suspended_at or 0.0
        return self._record.guard is Guard.OURS and action.do is not Do.WAIT and boottime() - since < _SWITCH

    def _hiccup(self, error: VMBackupError) -> Next:
        pause = _HICCUPS[min(self._hiccups, len(_HICCUPS) - 1)]
        self._hiccups += 1
        _log.info("%s: %s", self._record.name, error)
        if self._hiccups == _WORTH_TELLING:
            if isinstance(error, PermanentError) and self._untouched():
                return self._run.fail_backup(str(error), error.reason)
            self._run.announcer.event(error.reason, str(error), warning=True)
        return Next.wait(pause)

    def _untouched(self) -> bool:
        """Nothing was done to the guest, and no call that may still be carried out was sent."""
        record = self._record
        return (
            record.snapshot is Snapshot.NONE
            and record.copy is Copy.OPEN
            and record.call is None
            and not record.holds_guest
        )

    def _observe(self, request: Request) -> View:
        if self._hypervisor.generation != self._generation:
            self._generation = self._hypervisor.generation
            self._run.doubt = True
            threading.Event().wait(_RECONNECT_PAUSE)
        view = self._run.observer.observe(self._record, doubt=self._run.doubt)
        if self._record.call is not None and not view.seen.call_in_flight:
            self._run.doubt = True
            self._run.write(with_call(self._record, None))
            view = self._run.observer.observe(self._record, doubt=True)
        if view.seen.disks and all(disk.written is not None and disk.written is disk.live for disk in view.seen.disks):
            self._run.doubt = False
        return replace(view, seen=with_overdue(self._record, view.seen, request.spec.commit.deadline_seconds))

    def _decide(self, request: Request, view: View) -> Action:
        unplanned = self._unplanned(request)
        intent = Intent(
            deleted=request.deleted,
            cancelled=request.cancelled,
            guarded=request.spec.switch_policy is SwitchPolicy.GUARDED,
            quiesce=request.spec.snapshot.quiesce is not Quiesce.SKIP,
            quiesce_required=request.spec.snapshot.quiesce is Quiesce.REQUIRE,
            backoff_limit=request.spec.commit.backoff_limit,
            offline=request.spec.commit.offline,
            stall_policy=request.spec.commit.stall_policy,
            stall_pause=request.spec.commit.stall_pause_seconds,
            leaving=request.stop or unplanned or self._journal_error is not None,
        )
        action = decide(intent, self._record, view.seen)
        waits = action.do is Do.WAIT and not view.seen.call_in_flight
        return Action(Do.PLAN) if waits and unplanned and not request.stop else action

    def _unplanned(self, request: Request) -> bool:
        """Its disks are not planned yet. A guest that an earlier run has frozen is thawed before that."""
        return not self._record.disks and self._record.copy is Copy.OPEN and not (request.deleted or request.cancelled)
