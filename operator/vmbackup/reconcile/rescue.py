"""Resumes and thaws guests that a process left suspended or frozen when it died, by the same decisions.

The process that gets the backup's lock does it: the guardian that outlives the process (guardian.py), or the process
that was started in its place, before it does anything else. It needs libvirt and the journals, but no API server and no
store.
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


def release_guests(node: Node) -> None:
    """Resume and thaw all guests that backups of this node hold. Returns when none is held."""
    held = [record for record in node.records() if record.holds_guest]
    if held:
        for record in held:
            tell_suspended(node.metrics, record)
        with ThreadPoolExecutor(len(held), "rescue") as pool:
            list(pool.map(partial(_release, node), held))


def _release(node: Node, record: Record) -> None:
    _log.warning(
        "%s: the guest %s was left suspended or frozen by a process that died; resuming it",
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
            if error.reason == Cause.JOURNAL_UNWRITABLE:  # the guest runs: only the journal cannot be written
                break
        except Exception:  # whatever the error is, the guest is still suspended or frozen
            _log.exception("%s: the guest %s could not be resumed", record.full_name, record.domain)
        if not _held(node, record):
            break
        time.sleep(_PAUSES[min(attempt, len(_PAUSES) - 1)])
        attempt += 1
    node.metrics.resumed(record.domain)
    _log.warning("%s: the guest %s runs again", record.full_name, record.domain)


def _held(node: Node, record: Record) -> bool:
    """Whether the guest is still held. Another process may have resumed it, and even ended the backup.

    A journal that cannot be read now (too many open files, say) tells nothing, so the guest still counts as held.
    """
    try:
        now = record_of(node.state_dir, record.uid)
    except PermanentError as error:
        return error.reason != Cause.JOURNAL_VERSION
    return now is not None and now.holds_guest


@contextmanager
def guarded(node: Node) -> Generator[None]:
    """Run a guardian meanwhile, which resumes guests if this process dies.

    Not as process number 1: its end ends the whole container, and the restarted container resumes the guests.
    """
    guardian = _Guardian(node) if os.getpid() != 1 else None
    try:
        yield
    finally:
        if guardian is not None:
            guardian.dismiss(orderly=not any(record.holds_guest for record in node.records()))


class _Guardian:
    """The guardian of this process; it is replaced if it dies."""

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
        """This process ends. `orderly`: no guest is suspended or frozen, so the guardian need not wait."""
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
                stdin=subprocess.PIPE,  # only this process has its writing end
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            left = "if this process dies, a suspended guest stays suspended until the next start"
            _log.warning("could not start the guardian (%s): %s", error, left)
            return None

    def _start_again(self) -> None:
        while not self._dismissed.wait(_LOOK_SECONDS):
            if self._process is None or self._process.poll() is not None:
                _log.warning("the guardian ended; starting another")
                self._process = self._start()
