"""Runs backups as an agent does, without a cluster: the real driver on real libvirt, steered by the test.

In a thread of this process (`RunningBackup`), or in a process of its own that can be killed (`DriverProcess`).
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tests.support.domains import wait_until
from vmbackup.api.backup import BackupSpec
from vmbackup.api.identity import BackupId
from vmbackup.api.status import Phase, Report
from vmbackup.api.store import DirectoryStoreSpec, StoreSpec
from vmbackup.backoff import Backoff
from vmbackup.hypervisor.hypervisor import Hypervisor
from vmbackup.protocol.record import Record
from vmbackup.reconcile.backup import Backup
from vmbackup.reconcile.node import Node
from vmbackup.reconcile.request import Request
from vmbackup.reconcile.steps.step import Ending
from vmbackup.stores.registry import open_store
from vmbackup.telemetry.metrics import Metrics

_log = logging.getLogger(__name__)

SLOW = "1Mi"  # bytes per second: a copy or commit of 8 MiB and more can be caught in the middle


def make_node(hypervisor: Hypervisor, state_dir: Path, lock_dir: Path) -> Node:
    """A node with metrics of its own. Failed commits are tried again soon."""
    backoff = Backoff(first=0.2, longest=1.0)
    return Node(hypervisor, state_dir=state_dir, lock_dir=lock_dir, metrics=Metrics(), backoff=backoff)


def spec_of(domain: str, **more: Any) -> dict[str, Any]:
    """The smallest spec of a backup of this domain, and more."""
    return {"nodeName": "here", "domain": domain, "storeRef": {"name": "store"}} | more


def make_backup(node: Node, key: BackupId, request: Callable[[], Request], store: Path, told: Told) -> Backup:
    """A backup that an agent would run; its store is this folder."""
    spec = StoreSpec(DirectoryStoreSpec(str(store)))
    return Backup(node, key, request=request, open_store=lambda: open_store(spec), reporter=told)


@dataclass
class Told:
    """A reporter that remembers everything."""

    timeline: list[tuple[float, Report]] = field(default_factory=list)
    events: list[tuple[str, str]] = field(default_factory=list)

    def report(self, report: Report) -> None:
        self.timeline.append((time.monotonic(), report))

    def event(self, reason: str, message: str, *, warning: bool = False) -> None:
        self.events.append((reason, message))

    @property
    def reasons(self) -> list[str]:
        return [reason for reason, _ in self.events]


class RunningBackup:
    """A backup in a thread of its own."""

    def __init__(self, node: Node, key: BackupId, spec: dict[str, Any], store: Path, *, retry: str = "") -> None:
        self.node, self.key, self.store = node, key, store
        self.told = Told()
        self._spec = spec
        self._request = Request(BackupSpec.parse(spec), retry=retry)
        self._ending: list[Ending] = []
        self._backup = make_backup(node, key, lambda: self._request, store, self.told)
        self._errors: list[Exception] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._ending.append(self._backup.run())
        except Exception as error:
            _log.exception("%s has ended", self.key)
            self._errors.append(error)

    def raise_its_error(self, seconds: float = 60) -> None:
        """Wait for its end and raise what it raised."""
        self._thread.join(seconds)
        for error in self._errors:
            raise error

    def ask(self, **changes: Any) -> None:
        """Change the request: deleted, retry, stop."""
        self._request = replace(self._request, **changes)
        self._backup.wake()

    def edit(self, group: str, **fields: Any) -> None:
        """Change knobs of the spec while it runs."""
        self._spec = {**self._spec, group: {**self._spec.get(group, {}), **fields}}
        self.ask(spec=BackupSpec.parse(self._spec))

    @property
    def report(self) -> Report:
        return self.told.timeline[-1][1] if self.told.timeline else Report()

    @property
    def record(self) -> Record:
        return next(record for record in self.node.records() if record.uid == self.key.uid)

    @property
    def folder(self) -> Path:
        return Path(self.report.location)

    def wait_for(self, reached: Callable[[Report], bool], what: str, seconds: float = 60) -> Report:
        """Wait until the newest report is like that."""
        try:
            wait_until(lambda: reached(self.report), what, seconds)
        except TimeoutError as error:
            raise TimeoutError(f"{error}; it is {self.report}") from error
        return self.report

    def wait_for_phase(self, phase: Phase) -> Report:
        return self.wait_for(lambda report: report.phase is phase, phase)

    def wait_for_copying(self) -> Report:
        """Wait until it is in the middle of copying."""
        return self.wait_for(
            lambda report: report.phase is Phase.COPYING and any(disk.copied_bytes for disk in report.disks), "copying"
        )

    def overlay_seconds(self) -> float:
        """How long the disks were on their overlay, as far as the reports tell."""
        times = [when for when, report in self.told.timeline if report.chain_clean is False]
        home = next(when for when, report in self.told.timeline if when > times[-1] and report.chain_clean)
        return home - times[0]

    def end(self, seconds: float = 90) -> Report:
        """Wait for its end and return the last report."""
        self._thread.join(seconds)
        assert self._ending, f"not ended after {seconds} s: {self.report}, {self._errors}"
        return self.report

    @property
    def ending(self) -> Ending:
        self.end()
        return self._ending[0]


_processes = multiprocessing.get_context("forkserver")
_preloaded = [__name__]
_T = TypeVar("_T")


def preload(module: str) -> None:
    """Drivers are forked from a process that has imported these modules, and has no threads."""
    _preloaded.append(module)
    _processes.set_forkserver_preload(_preloaded)


class DriverProcess:
    """A driver of backups in a process of its own: `drive` runs there, and speaks over the other end of the line."""

    def __init__(self, drive: Callable[[_T, Connection], None], task: _T) -> None:
        self.line, other = _processes.Pipe()
        self._process = _processes.Process(target=drive, args=(task, other), daemon=True)
        self._process.start()
        other.close()

    def tell(self, what: Any) -> None:
        """Nothing happens where it has died meanwhile."""
        with suppress(OSError):
            self.line.send(what)

    def kill(self) -> None:
        """SIGKILL it wherever it is, and return when it is gone; what it has started goes on."""
        self._process.kill()
        self._process.join()

    def exit_code(self, seconds: float | None = None) -> int | None:
        """Wait for its end: its exit code, negative if by a signal; None if it runs after so many seconds."""
        self._process.join(seconds)
        return self._process.exitcode

    def show_stacks(self) -> None:
        """Let it write down where each of its threads is: `drive` has registered faulthandler for SIGUSR1."""
        if self._process.is_alive():
            os.kill(self._process.pid or 0, signal.SIGUSR1)


class BackupFactory(Protocol):
    """Starts backups; `spec` adds to the smallest spec there is."""

    def __call__(
        self,
        domain: str,
        *,
        again: RunningBackup | None = None,
        retry: str = "",
        store: Path | None = None,
        **spec: Any,
    ) -> RunningBackup: ...
