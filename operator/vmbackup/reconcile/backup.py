"""One VMBackup on this node: its journal, its domain and that domain's lock, and the driver on top of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from vmbackup.api.identity import BackupId
from vmbackup.api.status import Outcome, Phase, Reason, Report
from vmbackup.errors import PermanentError, RefusedError, TransientError, VMBackupError
from vmbackup.hypervisor.guest import Guest
from vmbackup.protocol.record import Copy, Record, Snapshot
from vmbackup.protocol.terms import CANCELLED
from vmbackup.protocol.transition import (
    asked_again,
    brought_home,
    of_domain,
    of_this_boot,
    refused,
    resumed_after_crash,
    with_call_of,
    with_commits_of,
    without_switches,
)
from vmbackup.reconcile.admission.plan import Planner
from vmbackup.reconcile.background.copying import Copying, delete_stored
from vmbackup.reconcile.background.merging import Merging
from vmbackup.reconcile.driver import Driver
from vmbackup.reconcile.node import Node
from vmbackup.reconcile.observe import Observer
from vmbackup.reconcile.request import Request, spec_of
from vmbackup.reconcile.state import journal as journals
from vmbackup.reconcile.state.clock import boot_id, boottime
from vmbackup.reconcile.state.domain_lock import domain_lock
from vmbackup.reconcile.state.journal import Journal
from vmbackup.reconcile.steps.step import Ending, Run
from vmbackup.reconcile.telling.announcer import Announcer
from vmbackup.reconcile.telling.listener import Reporter
from vmbackup.reconcile.telling.log import LogReporter
from vmbackup.reconcile.telling.summary import Progress, summarize
from vmbackup.stores.base import Store

_WAIT = 1.0  # seconds between attempts to get the domain, or its lock


class Backup:
    """Runs one VMBackup, from its journal if there is one. `request` is asked again and again."""

    def __init__(
        self,
        node: Node,
        key: BackupId,
        *,
        request: Callable[[], Request],
        open_store: Callable[[], Store],
        reporter: Reporter,
        spec: Mapping[str, Any] | None = None,
        store: Mapping[str, Any] | None = None,
        admit: Callable[[Guest | None], None] = lambda _guest: None,
    ) -> None:
        """`spec`, `store`: the specs of VMBackup and VMBackupStore on an API server, for the journal.

        The journal outlives the VMBackup, and is used while the API server is away. `admit` raises RefusedError if
        its domain may not be backed up, or does not exist; it is asked before the backup begins.
        """
        self._node = node
        self._key = key
        self._spec = spec or {}
        self._store = store or {}
        self._request: Callable[[], Request] = request
        self._open_store = open_store
        self._reporter = reporter
        self._admit = admit
        self._woken = threading.Event()
        self._journal_error: PermanentError | None = None
        self._waited = False  # for another process that has this very backup

    def wake(self) -> None:
        """Look at once: the request has changed. From any thread."""
        self._woken.set()

    def run(self) -> Ending:
        """Run it to its end. Raises PermanentError where the journal or a lock cannot be written.

        Where another process has run it and this node's state knows nothing of that, it is not run again: INTERRUPTED.
        """
        # One process for each journal: else a second `vmbackup run` would replace it under the first.
        with domain_lock(self._key.uid, self._already_run, self._node.lock_dir) as held:
            if not held or (self._waited and journals.record_of(self._node.state_dir, self._key.uid) is None):
                return Ending.INTERRUPTED
            return self._run()

    def _run(self) -> Ending:
        journal = self._journal()
        try:
            over = journal.record.finished and not journal.record.holds_guest
            if over and not self._open_again(journal.record):
                return self._after_the_end(journal)
            return self._drive(journal)
        finally:
            journal.close()

    def _drive(self, journal: Journal) -> Ending:
        if self._request().cancelled and _untouched(journal.record):
            return self._ended_before_start(journal)
        guest: Guest | None = None
        try:
            guest = self._guest(journal.record)
            if guest is not None:
                self._ask(journal.record, guest)
        except RefusedError as error:
            if guest is not None and journal.record.holds_guest and not self._released(journal, guest):
                message = f"refused ({error}), but its guest is still suspended or frozen and is resumed first"
                raise TransientError(message, reason="GuestHeld") from error
            return self._refused(journal, error)
        if guest is None:
            return self._ended_before_start(journal)
        while True:
            with domain_lock(guest.uuid, lambda: self._queued(journal.record), self._node.lock_dir) as held:
                if not held:
                    return self._ended_before_start(journal)
                earlier = self._earlier(guest.uuid)
                holders = [] if self._request().stop else [record for record in earlier if record.holds_guest]
                if not holders:
                    return self._driver(journal, guest, earlier).run()
            for record in holders:  # its process has died, and a rescuer would wait for the end of this one
                release_guest_of(self._node, record)
            if not self._queued(journal.record):
                return self._ended_before_start(journal)

    def _journal(self) -> Journal:
        state_dir, key = self._node.state_dir, self._key
        journal = Journal.of(state_dir, key.uid)
        if journal is None:
            if aside := journals.set_aside(state_dir, key.uid):
                done = "starting over, after merging any overlay that is left"
                message = f"the journal was unreadable (kept as {aside}); {done}"
                self._reporter.event("JournalGarbled", message, warning=True)
            record = Record(
                key.uid,
                key.namespace,
                key.name,
                spec=self._spec,
                store=self._store,
                handled_retry=self._request().retry,
                started=time.time(),
                boot_id=boot_id(),
            )
            return Journal.start(state_dir, record)
        taken_up = resumed_after_crash(of_this_boot(journal.record, boot_id(), boottime()))
        self._write(journal, taken_up, durable=False)
        return journal

    def _write(self, journal: Journal, record: Record, *, durable: bool) -> None:
        """Write the journal. If that fails while the guest is suspended or frozen, the guest comes first."""
        try:
            journal.write(record, durable=durable)
        except PermanentError as error:
            if not (record.holds_guest or record.throttles_guest):
                raise
            journal.give_up(without_switches(record))
            self._journal_error = error

    def _open_again(self, record: Record) -> bool:
        """It ended with something left to do, and is asked for again, or deleted."""
        request = self._request()
        return record.left_behind and (request.deleted or request.retry != record.handled_retry)

    def _after_the_end(self, journal: Journal) -> Ending:
        """Nothing is left to do for the chain. The end may not have reached the API server before a run was killed."""
        record, request = journal.record, self._request()
        if not request.deleted:
            self._reporter.report(summarize(asked_again(record, request.retry), None, None, Progress({}, {})))
            return Ending.FINISHED
        if request.delete_data:
            delete_stored(record, self._open_store)
        if record.copy is Copy.FAILED and record.snapshot is Snapshot.DONE:
            with suppress(VMBackupError):  # the store may have been away at the end, and then kept what was copied
                self._open_store().discard(self._key)
        journal.remove()
        return Ending.RELEASED

    def _guest(self, record: Record) -> Guest | None:
        """The domain, once libvirtd answers. None: told to stop waiting. Raises RefusedError if there is none."""
        while True:
            try:
                return self._node.hypervisor.guest(record.domain_uuid or self._request().spec.domain)
            except RefusedError:
                if not record.disks:
                    self._ask(record, None)  # a requester who may not back it up does not learn whether it exists
                    raise
                # a transient domain that stopped: its files are what there is
                return Guest(self._node.hypervisor, record.domain_uuid, record.domain)
            except TransientError as error:
                self._reporter.report(replace(summarize(record, None, None, Progress({}, {})), message=str(error)))
                if not self._pause(record):
                    return None

    def _ask(self, record: Record, guest: Guest | None) -> None:
        """Ask whether it may begin. A backup that has begun is never stopped: the guest comes first."""
        if record.snapshot is Snapshot.NONE and not self._request().deleted:
            self._admit(guest)

    def _already_run(self) -> bool:
        """Another process has this backup: wait until it ends, unless told to stop. That process reports the status."""
        if not self._waited:
            self._waited = True
            message = "another process is already running this backup; is there a second agent for this node?"
            self._reporter.event("AlreadyRunning", message, warning=True)
        return not self._awaited().stop

    def _queued(self, record: Record) -> bool:
        if record.snapshot is Snapshot.NONE:
            message = "another backup of this domain is running"
            self._reporter.report(Report(Phase.PENDING, Reason.QUEUED, message, chain_clean=True))
        return self._pause(record)

    def _pause(self, record: Record) -> bool:
        """Wait a while; whether to go on waiting."""
        request = self._awaited()
        return not (request.stop or ((request.deleted or request.cancelled) and _untouched(record)))

    def _awaited(self) -> Request:
        self._woken.wait(_WAIT)
        self._woken.clear()
        return self._request()

    def _ended_before_start(self, journal: Journal) -> Ending:
        """Told to stop, or deleted or cancelled before anything was begun."""
        request = self._request()
        if request.stop:
            return Ending.INTERRUPTED
        if request.cancelled and not request.deleted:
            return self._refused(journal, RefusedError(CANCELLED, reason=Reason.CANCELLED))
        self._node.metrics.finished(Outcome.DELETED)
        journal.remove()
        return Ending.RELEASED

    def _refused(self, journal: Journal, error: RefusedError) -> Ending:
        journal.write(refused(journal.record, str(error), error.reason, time.time()), durable=True)
        report = summarize(journal.record, None, None, Progress({}, {}))
        self._reporter.report(report)
        self._reporter.event(report.reason, report.message, warning=True)
        self._node.metrics.finished(report.outcome or Outcome.REFUSED)
        return Ending.FINISHED

    def _released(self, journal: Journal, guest: Guest) -> bool:
        """Resume and thaw a guest that an earlier run has left, and nothing else; whether it is held no longer."""
        asked = self._request
        self._request = lambda: replace(asked(), stop=True)
        try:
            with domain_lock(guest.uuid, lambda: False, self._node.lock_dir) as held:
                if held:
                    self._driver(journal, guest, self._earlier(guest.uuid)).run()
        finally:
            self._request = asked
        return not journal.record.holds_guest

    def _driver(self, journal: Journal, guest: Guest, earlier: Sequence[Record]) -> Driver:
        node = self._node
        record = of_domain(journal.record, guest.name, guest.uuid)
        record = with_call_of(with_commits_of(record, earlier), earlier, boot_id())
        self._write(journal, record, durable=True)
        copying = Copying(self._request, self.wake, node.metrics)
        request = self._request()
        over = record.finished and (request.deleted or request.retry == record.handled_retry)
        announcer = Announcer(self._reporter, node.metrics, copying, ended=over)
        observer = Observer(node.hypervisor, guest)
        run = Run(
            journal=journal,
            guest=guest,
            observer=observer,
            planner=Planner(node.hypervisor, node.overlay_dir, node.image_roots),
            open_store=self._open_store,
            earlier=lambda: self._earlier(guest.uuid),
            adopted_home=lambda: self._adopted_home(guest.uuid),
            copying=copying,
            merging=Merging(observer, self.wake),
            announcer=announcer,
            backoff=node.backoff,
        )
        return Driver(
            hypervisor=node.hypervisor,
            run=run,
            request=self._request,
            woken=self._woken,
            journal_error=self._journal_error,
        )

    def _earlier(self, domain_uuid: str) -> list[Record]:
        records = self._node.records()
        return [record for record in records if record.domain_uuid == domain_uuid and record.uid != self._key.uid]

    def _adopted_home(self, domain_uuid: str) -> None:
        """PROTOCOL R7: tell the backups whose overlay came home: chain clean, and ready if the copy is stored."""
        for record in self._earlier(domain_uuid):
            if not record.left_behind:
                continue
            reporter = None if record.orphan else self._node.reporter_of(record)
            with domain_lock(record.uid, lambda: False, self._node.lock_dir) as held:
                if held:
                    self._note_home(record, reporter)

    def _note_home(self, record: Record, reporter: Reporter | None) -> None:
        home = brought_home(record)
        journal = Journal.start(self._node.state_dir, home)
        journal.close()
        if record.orphan:
            journal.remove()
        if reporter is not None:
            reporter.report(summarize(home, None, None, Progress({}, {})))
            reporter.event(Reason.CHAIN_HOME, "a later backup of this domain merged the overlay")


def release_guest_of(node: Node, record: Record) -> Ending:
    """Resume and thaw the guest of a backup whose process has died, and do nothing else.

    INTERRUPTED when the guest runs, or another process has the backup. Raises VMBackupError.
    """
    request = Request(spec_of(record), retry=record.handled_retry, stop=True)
    reporter = LogReporter(record.full_name)
    backup = Backup(node, record.identity, request=lambda: request, open_store=_no_store, reporter=reporter)
    return backup.run()


def _no_store() -> Store:
    raise PermanentError("internal error: a store was requested while only resuming a guest", reason="NoStore")


def _untouched(record: Record) -> bool:
    """Nothing was begun, and its guest is neither suspended nor frozen."""
    return record.snapshot is Snapshot.NONE and not record.holds_guest
