"""A driver of a backup as a process of its own, which may be killed, stopped and started again."""

from __future__ import annotations

import faulthandler
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.support.backups import Told, make_node
from tests.support.kill_points import SNAPSHOT, Boot, When, watch_all
from vmbackup.api.backup import BackupSpec
from vmbackup.api.identity import BackupId
from vmbackup.api.status import Report
from vmbackup.api.store import DirectoryStoreSpec, StoreSpec
from vmbackup.errors import VMBackupError
from vmbackup.hypervisor.hypervisor import Hypervisor
from vmbackup.reconcile.backup import Backup
from vmbackup.reconcile.request import Request
from vmbackup.stores.registry import open_store

_HELD_SECONDS = 30.0  # at most: whoever holds it may have died

# A driver is forked from a process that has imported everything, and has no threads.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([__name__])


@dataclass(frozen=True)
class Task:
    """What a driver is to do. `serial_log`: where the guest acknowledges; `marks`: where its length is noted around the
    snapshot. It is held at the moments of these numbers, or goes on where it cannot be held: within a call.
    """

    uri: str
    config_dir: Path
    state_dir: Path
    lock_dir: Path
    store: Path
    serial_log: Path
    marks: Path
    domain: str
    uid: str
    spec: Mapping[str, Any]
    hold_at: tuple[int, ...] = ()
    wishes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    boot: Boot | None = None


@dataclass(frozen=True)
class Ended:
    """How it ended. `error`: the reason and the text of what it raised."""

    report: Report
    ending: str = ""
    error: tuple[str, str] = ("", "")
    events: tuple[str, ...] = ()

    @property
    def short(self) -> str:
        """For the log."""
        return f"{self.ending} {self.report.outcome} {self.report.reason} {self.report.message} {self.error}"


class Driving:
    """A driver that runs. For one thread."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.moment: tuple[int, str] | None = None  # that it has come to, and is held at
        self.ended: Ended | None = None
        self._line, other = _processes.Pipe()
        self._process = _processes.Process(target=_drive, args=(task, other), daemon=True)
        self._process.start()
        other.close()

    def poll(self, seconds: float) -> None:
        """Take in what it says, waiting a while for it."""
        if self.ended is not None:
            time.sleep(seconds)
            return
        try:
            if not self._line.poll(seconds):
                return
            said = self._line.recv()
        except (EOFError, OSError):
            self._process.join()
            self.ended = Ended(Report(), error=("Died", f"exit code {self._process.exitcode}"))
            return
        if isinstance(said, Ended):
            self.ended = said
            self._process.join()
        else:
            self.moment = said

    def ask(self, **wishes: Any) -> None:
        """Change its request: deleted, delete_data, stop, retry, spec (a mapping)."""
        self._tell(wishes)

    def jump(self, seconds: float) -> None:
        """Its wall clock jumps."""
        self._tell(seconds)

    def let_go(self) -> None:
        """It goes on, if it was held."""
        if self.moment is not None:
            self.moment = None
            self._tell(None)

    def _tell(self, what: Any) -> None:
        with suppress(OSError):  # it has died meanwhile
            self._line.send(what)

    def show_stacks(self) -> None:
        """Let it write down where each of its threads is."""
        if self.ended is None and self._process.pid:
            os.kill(self._process.pid, signal.SIGUSR1)

    def kill(self) -> None:
        """SIGKILL. Returns when it is gone."""
        self._process.kill()
        self._process.join()
        self._line.close()


# -- in the driver's process


class _Story(Told):
    """A reporter that also writes down what changes, for whoever looks for the cause of a failure."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self._file = task.marks.with_name(f"story-{task.uid[:8]}")
        faulthandler.register(signal.SIGUSR1, file=self._file.with_suffix(".stacks").open("w"))

    def report(self, report: Report) -> None:
        if not self.timeline or (self.timeline[-1][1].reason, self.timeline[-1][1].message) != (
            report.reason,
            report.message,
        ):
            self._write(f"{report.phase} {report.reason}: {report.message}")
        super().report(report)

    def event(self, reason: str, message: str, *, warning: bool = False) -> None:
        self._write(f"event {reason}: {message}")
        super().event(reason, message, warning=warning)

    def _write(self, line: str) -> None:
        with self._file.open("a") as file:
            print(f"{time.strftime('%H:%M:%S')} {os.getpid()} {line}", file=file)


def _drive(task: Task, line: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the soak, which ends its drivers
    logging.getLogger("vmbackup").setLevel(logging.CRITICAL)
    if task.boot is not None:
        task.boot.believe()
    minimal = {"nodeName": "here", "domain": task.domain, "storeRef": {"name": "store"}}
    wishes = [_request(Request(BackupSpec.parse(minimal | dict(task.spec))), task.wishes)]
    go_on = threading.Event()
    _mark_moments(task, line, go_on)
    store = StoreSpec(DirectoryStoreSpec(str(task.store)))
    told = _Story(task)
    backup = Backup(
        make_node(Hypervisor(task.uri, config_dir=task.config_dir), task.state_dir, task.lock_dir),
        BackupId("soak", "backup", task.uid),
        request=lambda: wishes[-1],
        open_store=lambda: open_store(store),
        reporter=told,
    )

    def listen() -> None:
        while True:
            try:
                said = line.recv()
            except (EOFError, OSError):
                os._exit(1)  # whoever wanted this backup is gone
            if said is None:
                go_on.set()
            elif isinstance(said, float):
                _jump(said)
            else:
                wishes.append(_request(wishes[-1], said))
                backup.wake()

    threading.Thread(target=listen, daemon=True).start()
    ending, error = "", ("", "")
    try:
        ending = str(backup.run())
    except VMBackupError as raised:
        error = raised.reason, str(raised)
    except Exception as raised:  # a defect
        error = "Exception", repr(raised)
    report = told.timeline[-1][1] if told.timeline else Report()
    line.send(Ended(report, ending, error, tuple(f"{reason}: {message}" for reason, message in told.events)))
    os._exit(0)


def _jump(seconds: float) -> None:
    wall = time.time
    time.time = lambda: wall() + seconds


def _request(request: Request, changes: Mapping[str, Any]) -> Request:
    spec = changes.get("spec")
    return replace(request, **{**changes, **({"spec": _edited(request.spec, spec)} if spec else {})})


def _edited(spec: BackupSpec, bandwidths: Mapping[str, int | None]) -> BackupSpec:
    copy, commit = bandwidths["copy"], bandwidths["commit"]
    return replace(spec, copy=replace(spec.copy, bandwidth=copy), commit=replace(spec.commit, bandwidth=commit))


def _note(task: Task, mark: Mapping[str, Any]) -> None:
    with task.marks.open("a") as marks:
        print(json.dumps(mark), file=marks)


def _mark_moments(task: Task, line: Connection, go_on: threading.Event) -> None:
    passed = 0

    def pass_by(when: When, event: str) -> None:
        nonlocal passed
        passed += 1
        if event == SNAPSHOT and when is not When.DURING:
            mark = {"uid": task.uid, "when": when, "bytes": task.serial_log.stat().st_size}
            _note(task, mark)
        if event == "redefining":
            _note(task, {"uid": task.uid, "when": when, "at": time.monotonic()})
        if passed in task.hold_at:
            go_on.clear()
            line.send((passed, f"{when} {event}"))
            if when is not When.DURING:
                go_on.wait(_HELD_SECONDS)

    watch_all(pass_by)
