"""One run of `vmbackup run`: the backup in a thread of its own, beside it the signals, the screen and the verdict."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from uuid import uuid4

from vmbackup.api.identity import BackupId
from vmbackup.api.status import GUEST_AWAY, Outcome, Phase, Reason, Report
from vmbackup.commands.running import verdict
from vmbackup.commands.running.backup_file import BackupFile
from vmbackup.commands.running.screen import Screen
from vmbackup.errors import Cause, VMBackupError
from vmbackup.protocol.record import Record
from vmbackup.reconcile.backup import Backup
from vmbackup.reconcile.node import Node
from vmbackup.reconcile.request import Request
from vmbackup.reconcile.steps.step import Ending
from vmbackup.stores.registry import open_store

_log = logging.getLogger(__name__)

_OFF_GRACE = 15.0  # seconds: a guest that is off on its overlay may be about to start again
_HOLD_SECONDS = 0.5  # for which a warning may wait for the report that says the same
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TOLD_BY_THE_VERDICT = (Phase.FAILED, Reason.COMMIT_LIMIT_REACHED)
_SHOW_CURSOR = b"\x1b[?25h"


class Session:
    """Hears what the backup reports. Asks it to stop on a signal, or when it cannot continue without a human."""

    def __init__(self, node: Node, file: BackupFile, earlier: Record | None, screen: Screen, *, retry: bool) -> None:
        self._node = node
        self._file = file
        self._screen = screen
        uid = earlier.uid if earlier else file.uid or str(uuid4())
        self._id = BackupId(file.namespace, file.name, uid)
        handled = earlier.handled_retry if earlier else ""
        self._retry = time.strftime("%Y-%m-%dT%H:%M:%S") if retry else handled
        self._continues = earlier is not None and not earlier.finished
        self._last = Report()
        self._held: tuple[str, str] | None = None
        self._signalled = self._stuck = False
        self._off_since: float | None = None
        self._backup = Backup(
            node, self._id, request=self._request, open_store=lambda: open_store(file.store), reporter=self
        )

    def run(self) -> int:
        """Run it; the exit code."""
        word = "Continuing" if self._continues else "Backup"
        self._screen.line(word, f"{self._file} of the domain {self._file.spec.domain}, uid {self._id.uid}")
        try:
            ending = asyncio.run(self._attended())
        except VMBackupError as error:
            self._tell_held()
            return print_broken(str(error), self._record(), unknown=error.reason == Cause.JOURNAL_VERSION)
        except Exception:
            _log.exception("internal error of vmbackup")
            return print_broken("internal error of vmbackup (see the log)", self._record())
        finally:
            self._tell_held()
        end = self._verdict(ending)
        for line in end.lines:
            self._screen.line(line.word, line.message, style=line.style)
        return end.exit_code

    async def _attended(self) -> Ending:
        """The backup in a thread of its own, while this one handles signals. Ignored signals (nohup) stay ignored.

        The kernel gives a signal to any thread. That wakes an event loop, but not a thread that waits for a lock: of
        ten signals one was handled only when the backup was over.
        """
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, self._on_signal)
        return await asyncio.to_thread(self._backup.run)

    def _on_signal(self) -> None:
        if self._signalled:
            if os.isatty(1):
                os.write(1, _SHOW_CURSOR)
            os._exit(verdict.INTERRUPTED)
        self._signalled = True
        self._backup.wake()
        self._screen.line("Stopping", "at the next safe point; a second signal stops at once", style="yellow")

    # -- what the backup asks and reports, in its thread

    def _request(self) -> Request:
        return Request(self._file.spec, retry=self._retry, stop=self._signalled or self._stuck)

    def report(self, report: Report) -> None:
        """See Reporter."""
        self._last = report
        if report.outcome is Outcome.REFUSED and self._held == (report.reason, report.message):
            self._held = None  # the verdict says it
        self._tell_held()
        self._screen.report(report)
        if self._needs_a_human(report) and not self._stuck:
            self._stuck = True
            self._backup.wake()

    def event(self, reason: str, message: str, *, warning: bool = False) -> None:
        """See Reporter. A warning before the snapshot waits a moment for the next report: it may be the refusal."""
        self._tell_held()
        last = self._last
        if last.outcome is Outcome.REFUSED and (reason, message) == (last.reason, last.message):
            return  # the verdict says it
        if warning and last.phase is Phase.PENDING:
            self._held = (reason, message)
            later = threading.Timer(_HOLD_SECONDS, self._tell_held)
            later.daemon = True
            later.start()
        elif reason not in _TOLD_BY_THE_VERDICT:
            self._screen.line(reason, message, style="yellow" if warning else "")

    def _tell_held(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            self._screen.line(*held, style="yellow")

    def _needs_a_human(self, report: Report) -> bool:
        """Quarantined; or off on its overlay, with nothing left to do but to wait for its start."""
        waits = report.phase is Phase.PENDING or report.backup_complete is not None
        if report.reason not in GUEST_AWAY or not waits:
            self._off_since = None
            return report.reason == Reason.QUARANTINED
        self._off_since = self._off_since or time.monotonic()
        return time.monotonic() - self._off_since >= _OFF_GRACE

    # -- the end

    def _verdict(self, ending: Ending) -> verdict.Verdict:
        if ending is not Ending.INTERRUPTED:
            return verdict.ended(self._last)
        if self._stuck and not self._signalled:
            return verdict.needs_you(self._last)
        return verdict.interrupted(self._last)

    def _record(self) -> Record | None:
        return next((record for record in self._node.records() if record.uid == self._id.uid), None)


def print_broken(why: str, record: Record | None, *, unknown: bool = False) -> int:
    """Print why the backup could not be run; the exit code. The parameters are those of `verdict.broken`."""
    exit_code, line = verdict.broken(why, record, unknown=unknown)
    print(line, file=sys.stderr)
    return exit_code
