"""`vmbackup run`: one backup on this hypervisor, without a cluster, by the machine and journal of the agent."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from vmbackup.api.identity import BackupId
from vmbackup.api.status import GUEST_AWAY, DiskState, Outcome, Phase, Reason, Report
from vmbackup.commands.backup_file import BackupFile, read
from vmbackup.commands.screen import LineConsole, Screen
from vmbackup.errors import Cause, RefusedError, VMBackupError
from vmbackup.hypervisor.hypervisor import Hypervisor
from vmbackup.protocol.record import Record, Snapshot
from vmbackup.reconcile.backup import Backup
from vmbackup.reconcile.node import Node
from vmbackup.reconcile.request import Request
from vmbackup.reconcile.rescue import guarded
from vmbackup.reconcile.state.journal import forget
from vmbackup.reconcile.steps.step import Ending
from vmbackup.stores.registry import open_store
from vmbackup.telemetry.metrics import Metrics

_log = logging.getLogger(__name__)

READY, FAILED_HOME, REFUSED, ON_OVERLAY, INTERRUPTED = 0, 1, 2, 3, 130  # exit codes (README.md)

_OFF_GRACE = 15.0  # seconds: a guest that is off on its overlay may be about to start again
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SHOW_CURSOR = b"\x1b[?25h"


@dataclass(frozen=True)
class RunSettings:
    """The flags of `vmbackup run`."""

    file: str
    store: str | None
    store_path: Path | None
    retry: bool
    libvirt_uri: str
    libvirt_config_dir: Path | None
    state_dir: Path
    overlay_dir: Path | None
    image_roots: tuple[Path, ...] | None


def run(settings: RunSettings) -> int:
    """Run the backup to its end, or until interrupted; the exit code. Raises VMBackupError where nothing was begun."""
    file = read(settings.file, store_file=settings.store, store_path=settings.store_path)
    hypervisor = Hypervisor(settings.libvirt_uri, config_dir=settings.libvirt_config_dir)
    try:
        roots = settings.image_roots or ()
        node = Node(hypervisor, settings.state_dir, Metrics(), overlay_dir=settings.overlay_dir, image_roots=roots)
        records = node.records()
        earlier = taken_up(file, records, retry=settings.retry)
        if not hypervisor.ping():
            return _broken(f"no libvirtd answers at {settings.libvirt_uri}: start it, or give --libvirt-uri", earlier)
        if earlier is None:
            _forget_done(file, records, settings.state_dir)
        with guarded(node), Screen(LineConsole(highlight=False)) as screen:
            return _Run(node, file, earlier, screen, retry=settings.retry).run()
    finally:
        hypervisor.close()


def taken_up(file: BackupFile, records: Sequence[Record], *, retry: bool) -> Record | None:
    """The earlier run of this very backup that is carried on; None: this is a new one. Raises RefusedError."""
    same = [record for record in records if (record.namespace, record.name) == (file.namespace, file.name)]
    if file.uid:
        same = [record for record in records if record.uid == file.uid]
    wanted = [record for record in same if not record.finished or (retry and record.gave_up) or file.uid]
    if not wanted:
        if retry:
            raise RefusedError(f"no backup {file} has given up here: leave out --retry, or correct --state-dir")
        return None
    record = max(wanted, key=lambda each: each.started or 0.0)
    if record.domain and file.spec.domain not in (record.domain, record.domain_uuid):
        raise RefusedError(
            f"the unfinished backup {file} is one of the domain {record.domain}: finish that first, or give this "
            "one another metadata.name"
        )
    return record


def _forget_done(file: BackupFile, records: Sequence[Record], state_dir: Path) -> None:
    """Remove the journals of earlier runs of this name that left nothing to do. Those of an agent have their spec."""
    for record in records:
        mine = (record.namespace, record.name) == (file.namespace, file.name) and not record.spec
        if mine and record.done:
            forget(state_dir, record.uid)


class _Run:
    """One run: hears what the backup tells, and asks it to stop on a signal, or where only a human can help."""

    def __init__(self, node: Node, file: BackupFile, earlier: Record | None, screen: Screen, *, retry: bool) -> None:
        self._node = node
        self._file = file
        self._screen = screen
        self._key = BackupId(file.namespace, file.name, _uid_of(file, earlier))
        handled = earlier.handled_retry if earlier else ""
        self._retry = time.strftime("%Y-%m-%dT%H:%M:%S") if retry else handled
        self._carries_on = earlier is not None and not earlier.finished
        self._last = Report()
        self._signalled = self._stuck = False
        self._off_since: float | None = None
        self._backup = Backup(
            node, self._key, request=self._request, open_store=lambda: open_store(file.store), reporter=self
        )

    def run(self) -> int:
        """Run it; the exit code."""
        begun = "Carrying on" if self._carries_on else "Backup"
        self._screen.line(begun, f"{self._file} of the domain {self._file.spec.domain}, uid {self._key.uid}")
        try:
            ending = asyncio.run(self._attended())
        except VMBackupError as error:
            return _broken(str(error), self._record(), unknown=error.reason == Cause.JOURNAL_VERSION)
        except Exception:
            _log.exception("this is a fault of vmbackup")
            return _broken("it ended unexpectedly", self._record())
        return self._verdict(ending)

    async def _attended(self) -> Ending:
        """The backup, in a thread of its own, while this one answers signals; those that are ignored (nohup) stay so.

        The kernel gives a signal to any thread. An event loop is woken all the same, a wait for a lock is not: of ten
        signals one was answered only when the backup was over.
        """
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, self._on_signal)
        return await asyncio.to_thread(self._backup.run)

    # -- what the backup asks and tells, in its thread

    def _request(self) -> Request:
        return Request(self._file.spec, retry=self._retry, stop=self._signalled or self._stuck)

    def report(self, report: Report) -> None:
        """See Reporter."""
        self._last = report
        self._screen.report(report)
        if self._needs_a_human(report) and not self._stuck:
            self._stuck = True
            self._backup.wake()

    def event(self, reason: str, message: str, *, warning: bool = False) -> None:
        """See Reporter. The end is told by the verdict."""
        if reason != Phase.FAILED:
            self._screen.line(reason, message, style="yellow" if warning else "")

    def _needs_a_human(self, report: Report) -> bool:
        """Quarantined; or off on its overlay, with nothing left to do but to wait for its start."""
        waits = report.phase is Phase.PENDING or report.backup_complete is not None
        if report.reason not in GUEST_AWAY or not waits:
            self._off_since = None
            return report.reason == Reason.QUARANTINED
        self._off_since = self._off_since or time.monotonic()
        return time.monotonic() - self._off_since >= _OFF_GRACE

    def _on_signal(self) -> None:
        if self._signalled:
            if os.isatty(1):
                os.write(1, _SHOW_CURSOR)
            os._exit(INTERRUPTED)
        self._signalled = True
        self._backup.wake()
        self._screen.line("Stopping", "at the next safe point; once more ends it at once", style="yellow")

    # -- the end

    def _verdict(self, ending: Ending) -> int:
        last = self._last
        if ending is Ending.INTERRUPTED:
            return self._stopped()
        if last.outcome is Outcome.SUCCEEDED:
            self._screen.line("Ready", last.message, style="bold green")
            for disk in last.disks:
                if disk.state is not DiskState.SKIPPED:
                    self._screen.line(disk.target, f"{disk.format}, {disk.total_bytes} bytes, {disk.digest}")
            return READY
        if last.outcome is Outcome.REFUSED:
            self._screen.line("Refused", f"{last.reason}: {last.message}", style="bold red")
            return REFUSED
        if last.chain_clean:
            self._screen.line("Failed", f"{last.reason}: {last.message}; every disk is home", style="bold red")
            return FAILED_HOME
        cure = f"the guest runs on its overlay, and lost nothing: {last.message}; fix that, then run with --retry"
        self._screen.line("Failed", f"{last.reason}: {cure}", style="bold red")
        return ON_OVERLAY

    def _stopped(self) -> int:
        last = self._last
        if self._stuck and not self._signalled:
            cure = "start it, then run again" if last.reason == Reason.DOMAIN_OFF else "then run again"
            self._screen.line("Stopped", f"{last.reason}: {last.message}; {cure}", style="bold red")
            return ON_OVERLAY
        where = "nothing was begun" if last.chain_clean else "the guest runs on its overlay"
        self._screen.line("Interrupted", f"{where}: run again to carry on", style="bold yellow")
        return INTERRUPTED

    def _record(self) -> Record | None:
        return next((record for record in self._node.records() if record.uid == self._key.uid), None)


def _broken(why: str, record: Record | None, *, unknown: bool = False) -> int:
    """It cannot even be tried: say so in one line. What its record says of the chain is what was known last."""
    begun = record is not None and record.snapshot is not Snapshot.NONE and (record.gave_up or not record.finished)
    on_overlay = unknown or begun
    where = "the guest may be on its overlay: fix that, then run again" if on_overlay else "nothing was touched"
    print(f"vmbackup run: {why}; {where}", file=sys.stderr)
    return ON_OVERLAY if on_overlay else REFUSED


def _uid_of(file: BackupFile, earlier: Record | None) -> str:
    return earlier.uid if earlier else file.uid or str(uuid4())
