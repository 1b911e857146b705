"""A driver of a backup as a process of its own, which may be killed, stopped and started again."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.support.backups import DriverProcess, Told, make_backup, make_node, preload, spec_of
from tests.support.kill_points import SNAPSHOT, Boot, When, watch_all
from vmbackup.api.backup import BackupSpec
from vmbackup.api.identity import BackupId
from vmbackup.api.status import Report
from vmbackup.errors import VMBackupError
from vmbackup.hypervisor.hypervisor import Hypervisor
from vmbackup.reconcile.request import Request

_HELD_SECONDS = 30.0  # at most: the process that holds it may have died

preload(__name__)


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
    changes: Mapping[str, Any] = field(default_factory=dict[str, Any])
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
        self._driver = DriverProcess(_drive, task)
        self._line = self._driver.line

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
            self.ended = Ended(Report(), error=("Died", f"exit code {self._driver.exit_code()}"))
            return
        if isinstance(said, Ended):
            self.ended = said
            self._driver.exit_code()
        else:
            self.moment = said

    def ask(self, **changes: Any) -> None:
        """Change its request: deleted, delete_data, stop, retry, spec (a mapping)."""
        self._driver.tell(changes)

    def jump(self, seconds: float) -> None:
        """Its wall clock jumps."""
        self._driver.tell(seconds)

    def let_go(self) -> None:
        """It goes on, if it was held."""
        if self.moment is not None:
            self.moment = None
            self._driver.tell(None)

    def show_stacks(self) -> None:
        """Let it write down where each of its threads is."""
        if self.ended is None:
            self._driver.show_stacks()

    def kill(self) -> None:
        """SIGKILL. Returns when it is gone."""
        self._driver.kill()
        self._line.close()


# -- in the driver's process


class _Story(Told):
    """A reporter that also writes down what changes, to find the cause of a failure."""

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
    requests = [_request(Request(BackupSpec.parse(spec_of(task.domain, **task.spec))), task.changes)]
    go_on = threading.Event()
    _mark_moments(task, line, go_on)
    told = _Story(task)
    node = make_node(Hypervisor(task.uri, config_dir=task.config_dir), task.state_dir, task.lock_dir)
    backup = make_backup(node, BackupId("soak", "backup", task.uid), lambda: requests[-1], task.store, told)

    def listen() -> None:
        while True:
            try:
                said = line.recv()
            except (EOFError, OSError):
                os._exit(1)  # the process that started this driver is gone
            if said is None:
                go_on.set()
            elif isinstance(said, float):
                _jump(said)
            else:
                requests.append(_request(requests[-1], said))
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
