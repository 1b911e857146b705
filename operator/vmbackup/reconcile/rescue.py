"""Guests that a process left suspended or frozen when it died: they run again, by the same decisions.

Whoever has the backup's lock does it: the guardian that outlives the process (guardian.py), or the process that was
started in its place, before it does anything else. It needs libvirt and the journals; no API server, and no store.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from threading import Event, Thread

from vmbackup.errors import Cause, PermanentError, VMBackupError
from vmbackup.protocol.record import Record
from vmbackup.reconcile.backup import release_guest_of
from vmbackup.reconcile.node import Node
from vmbackup.reconcile.state.journal import record_of
from vmbackup.reconcile.steps.step import Ending
from vmbackup.reconcile.telling.announcer import tell_suspended

_log = logging.getLogger(__name__)

_PAUSES = (0.2, 0.5, 1.0, 2.0)  # seconds between attempts, while another process has the lock or the journal fails
_LOOK_SECONDS = 5.0  # between looks whether the guardian lives


def let_guests_run(node: Node) -> None:
    """Return once no guest is suspended or frozen by a backup of this node. Nothing is done where none is."""
    held = [record for record in node.records() if record.holds_guest]
    if held:
        for record in held:
            tell_suspended(node.metrics, record)
        with ThreadPoolExecutor(len(held), "rescue") as pool:
            list(pool.map(partial(_let_run, node), held))


def _let_run(node: Node, record: Record) -> None:
    _log.warning(
        "%s: the guest %s may be suspended or frozen by a process that has died: letting it run",
        record.full_name,
        record.domain,
    )
    attempt = 0
    while _held(node, record):
        try:
            if release_guest_of(node, record) is not Ending.INTERRUPTED:
                return
        except VMBackupError as error:
            _log.log(logging.INFO if attempt else logging.WARNING, "%s: %s", record.full_name, error)
            if error.reason == Cause.JOURNAL_UNWRITABLE:  # said once the guest runs: only that cannot be written down
                break
        except Exception:  # whatever it is, the guest still stands still
            _log.exception("%s: the guest %s cannot be let run", record.full_name, record.domain)
        if not _held(node, record):
            break
        time.sleep(_PAUSES[min(attempt, len(_PAUSES) - 1)])
        attempt += 1
    node.metrics.resumed(record.domain)
    _log.warning("%s: the guest %s runs again", record.full_name, record.domain)


def _held(node: Node, record: Record) -> bool:
    """Whether that is still so. Another process may have done it meanwhile, and even have ended the backup."""
    with suppress(PermanentError):
        now = record_of(node.state_dir, record.uid)
        return now is not None and now.holds_guest
    return False


@contextmanager
def guarded(node: Node) -> Generator[None]:
    """Have a guardian meanwhile, which lets guests run should this process die.

    Not as process number 1: then its end is the end of all of its container, and its restart does what is due.
    """
    guardian = _Guardian(node) if os.getpid() != 1 else None
    try:
        yield
    finally:
        if guardian is not None:
            guardian.dismiss(orderly=not any(record.holds_guest for record in node.records()))


class _Guardian:
    """The guardian of this process; another one, should it die."""

    def __init__(self, node: Node) -> None:
        hypervisor = node.hypervisor
        arguments = (hypervisor.uri, str(hypervisor.config_dir), str(node.state_dir), str(node.lock_dir))
        # -P: nothing is imported that lies where this process was started.
        self._command = (sys.executable, "-P", "-m", "vmbackup.guardian", *arguments)
        self._dismissed = Event()
        self._process = self._start()
        self._watch = Thread(target=self._start_again, name="guardian", daemon=True)
        self._watch.start()

    def dismiss(self, *, orderly: bool) -> None:
        """This process ends; `orderly`: no guest stands still, so nobody need wait for its end."""
        self._dismissed.set()
        self._watch.join()
        if self._process is not None and orderly:
            self._process.kill()
            self._process.wait()
        elif self._process is not None:
            with suppress(OSError, subprocess.TimeoutExpired):
                self._process.communicate(timeout=0.0)

    def _start(self) -> subprocess.Popen[bytes] | None:
        try:
            return subprocess.Popen(
                self._command,
                cwd="/",
                stdin=subprocess.PIPE,  # of which this process alone has the writing end
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            _log.warning("no guardian (%s): should this process die, a suspended guest waits for the next one", error)
            return None

    def _start_again(self) -> None:
        while not self._dismissed.wait(_LOOK_SECONDS):
            if self._process is None or self._process.poll() is not None:
                _log.warning("the guardian has ended: starting another")
                self._process = self._start()
