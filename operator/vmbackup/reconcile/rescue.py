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

from vmbackup.api.spec import BackupSpec
from vmbackup.errors import PermanentError, VMBackupError
from vmbackup.reconcile.backup import Backup, Node
from vmbackup.reconcile.driver import Ending
from vmbackup.reconcile.journal import record_of
from vmbackup.reconcile.narration import tell_suspended
from vmbackup.reconcile.plan import key_of
from vmbackup.reconcile.record import Record
from vmbackup.reconcile.wish import Wish
from vmbackup.report.log import LogReporter
from vmbackup.stores.base import Store

_log = logging.getLogger(__name__)

_PAUSES = (0.2, 0.5, 1.0, 2.0)  # seconds between attempts, while another process has the lock or the journal fails
_FAREWELL_SECONDS = 5.0


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
    wish = Wish(_spec(record), retry=record.handled_retry, stop=True)
    reporter = LogReporter(record.full_name)
    backup = Backup(node, key_of(record), wish=lambda: wish, open_store=_no_store, reporter=reporter)
    attempt = 0
    while _held(node, record):
        try:
            if backup.run() is not Ending.INTERRUPTED:
                return
        except VMBackupError as error:
            _log.log(logging.INFO if attempt else logging.WARNING, "%s: %s", record.full_name, error)
            if error.reason == "JournalUnwritable":  # said once the guest runs: only that cannot be written down
                break
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


def _spec(record: Record) -> BackupSpec:
    """Its spec. `vmbackup run` does not journal it; of no interest to a run that is to end but for its defaults."""
    return BackupSpec.parse(record.spec or {"nodeName": "here", "domain": record.domain, "storeRef": {"name": "none"}})


def _no_store() -> Store:
    raise PermanentError("a guest is let run without any store: this is a fault of vmbackup", reason="NoStore")


@contextmanager
def guarded(node: Node) -> Generator[None]:
    """Have a guardian meanwhile, which lets guests run should this process die.

    Not as process number 1: then its end is the end of all of its container, and its restart does what is due.
    """
    guardian = _start_guardian(node) if os.getpid() != 1 else None
    try:
        yield
    finally:
        if guardian is not None:
            _dismiss(guardian, orderly=not any(record.holds_guest for record in node.records()))


def _start_guardian(node: Node) -> subprocess.Popen[bytes] | None:
    hypervisor = node.hypervisor
    arguments = (hypervisor.uri, str(hypervisor.config_dir), str(node.state_dir), str(node.lock_dir))
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "vmbackup.guardian", *arguments],
            stdin=subprocess.PIPE,  # of which this process alone has the writing end
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        _log.warning("no guardian (%s): should this process die, a suspended guest waits for the next one", error)
        return None


def _dismiss(guardian: subprocess.Popen[bytes], *, orderly: bool) -> None:
    with suppress(OSError, subprocess.TimeoutExpired):
        guardian.communicate(b"." if orderly else b"", timeout=_FAREWELL_SECONDS if orderly else 0.0)
