"""Backups whose driver is a process of its own, and dies, or is held, at a chosen moment.

The moments come from the code itself. All that a backup changes goes through three places: the journal, mutating calls
of libvirt (Hypervisor.call), the removal of an overlay. In the driver's process these are watched, so a run without a
chosen moment lists them all; what happens next is decided just before, or just after, any of them.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, fields
from enum import StrEnum
from fcntl import LOCK_EX, flock
from functools import wraps
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import libvirt
import libvirt_qemu

from tests.support.backups import DriverProcess, Told, make_backup, make_node, preload, spec_of
from tests.support.domains import wait_until
from vmbackup import cli
from vmbackup.api.backup import BackupSpec
from vmbackup.api.identity import BackupId
from vmbackup.api.status import Report
from vmbackup.errors import VMBackupError
from vmbackup.hypervisor import chain
from vmbackup.hypervisor.guest import Guest
from vmbackup.hypervisor.hypervisor import Hypervisor
from vmbackup.protocol.record import Record
from vmbackup.protocol.terms import Mirror, Power
from vmbackup.reconcile.request import Request
from vmbackup.reconcile.rescue import guarded
from vmbackup.reconcile.state import clock
from vmbackup.reconcile.state.journal import Journal, record_of

SLOT = 512  # bytes of a record of the guest
FIRST_SLOT = 1 << 20  # bytes; the BIOS looks for something to boot before that
SNAPSHOT = "taking the snapshot"

# What they are is not the same in each run, nor whether it changes.
_COUNTS = ("virtual_bytes", "total_bytes", "copied_bytes", "merged_bytes", "commit_seconds")

BARRIER_SECONDS = float(os.environ.get("VMBACKUP_TEST_BARRIER", "3"))
"""How long a driver waits for a call that was left unanswered: under `make chaos` the 31 s of PROTOCOL R4.

Otherwise less, since libvirt carries out a call of these guests within milliseconds.
"""

_IN_FLIGHT_SECONDS = 0.003  # after which a call that was sent is under way, and seldom answered yet

preload(__name__)


class When(StrEnum):
    BEFORE = "before"
    DURING = "during"  # a call has been sent, and is not answered
    AFTER = "after"


@dataclass(frozen=True)
class Moment:
    """A moment of a run: `nth` tells events of the same name apart."""

    when: When
    event: str
    nth: int = 1

    @property
    def in_call(self) -> bool:
        """Whether the journal shows a call without an answer at this moment."""
        if self.event.startswith("journal call=None"):
            return self.when is When.BEFORE
        if "call=" in self.event:
            return self.when is When.AFTER
        return not self.event.startswith(("journal", "start", "remove"))

    def __str__(self) -> str:
        return f"{self.when} {self.event}" + (f" ({self.nth})" if self.nth > 1 else "")


class Interruption(StrEnum):
    """What happens to the driver at its moment."""

    KILL = "kill"
    HOLD = "hold"  # it waits there until it is told to go on


@dataclass(frozen=True)
class Boot:
    """Which boot of its machine the driver is to believe in; `booted` is when it was, in seconds of CLOCK_BOOTTIME."""

    boot_id: str
    booted: float

    def believe(self) -> None:
        clock_gettime = time.clock_gettime

        def since_boot(which: int) -> float:
            return clock_gettime(which) - (self.booted if which == time.CLOCK_BOOTTIME else 0)

        time.clock_gettime = since_boot
        clock.Path = lambda _: SimpleNamespace(read_text=lambda: self.boot_id)  # of /proc/sys/kernel/random/boot_id


@dataclass(frozen=True)
class Task:
    """What a driver is to do. `directory` is for everything that belongs to the domain's backups."""

    uri: str
    config_dir: Path
    directory: Path
    domain: str
    targets: tuple[str, ...]
    uid: str
    spec: Mapping[str, Any] = field(default_factory=dict[str, Any])
    moment: Moment | None = None
    interruption: Interruption = Interruption.KILL
    boot: Boot | None = None
    guarded: bool = False  # by a guardian, as an agent is; a guardian always waits 31 s

    @property
    def state_dir(self) -> Path:
        return self.directory / f"state-{self.uid[:8]}"

    @property
    def stacks(self) -> Path:
        return self.directory / f"stacks-{self.uid[:8]}"

    @property
    def diary(self) -> Diary:
        return Diary(self.directory / "diary")


class Driving:
    """A driver that runs."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._driver = DriverProcess(_drive, task)
        self._line = self._driver.line

    def ended(self, seconds: float) -> bool:
        """Whether it ends, or is held, within this time."""
        return self._line.poll(seconds)

    def wait_until_held(self, seconds: float = 60) -> bool:
        """Wait for its moment. False if it has ended without."""
        assert self.ended(seconds), f"{self.task.moment} did not come within {seconds} s"
        return self._line.recv() is None

    def let_go(self) -> None:
        self._line.send(None)

    def kill(self) -> None:
        """SIGKILL it wherever it is, and return when it is gone; what it has started goes on."""
        self._driver.kill()

    def killed(self, seconds: float = 60) -> bool:
        """Wait for its end. Whether it was by SIGKILL."""
        exit_code = self._driver.exit_code(seconds)
        assert exit_code is not None, f"no end within {seconds} s"
        return exit_code == -signal.SIGKILL

    def __str__(self) -> str:
        """How it ended: for the message of a test that it has failed."""
        exit_code = self._driver.exit_code(0)
        ended = f"exit code {exit_code}"
        if exit_code != 0 or not self.ended(0):
            return ended
        report, moments, reasons = self._line.recv()
        came_by = "; ".join(moment.event for moment in moments if moment.when is When.BEFORE)
        return f"{ended}, {report.outcome}: {report.message}; events {reasons}; it came by {came_by}"

    def end(self, seconds: float = 120) -> tuple[Report, list[Moment], list[str]]:
        """Wait for its end: the last report, every moment that it came by, and the reasons of its events."""
        assert self.ended(seconds), f"still running after {seconds} s: {self._standing()}"
        answer = self._line.recv()
        self._driver.exit_code()
        return answer

    def _standing(self) -> str:
        """What its journal says, and what each of its threads does."""
        self._driver.show_stacks()
        wait_until(lambda: self.task.stacks.stat().st_size > 0, "its stacks", 5)
        return f"{record_of(self.task.state_dir, self.task.uid)}\n{self.task.stacks.read_text()}"


@dataclass(frozen=True)
class Diary:
    """What a guest has written and seen acknowledged: record 0, 1, 2, … on each of its disks; and the snapshots."""

    path: Path

    def _lines(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []

    @property
    def acknowledged(self) -> int:
        """How many records each disk holds."""
        return self._lines().count("record")

    def snapshots(self, uid: str) -> set[int]:
        """How many there were whenever this backup asked for its snapshot."""
        lines = self._lines()
        return {lines[:number].count("record") for number, line in enumerate(lines) if line == f"snapshot {uid}"}

    def note(self, line: str) -> None:
        with self.path.open("a") as file:
            print(line, file=file)

    def write_next(self, write: Callable[[str], object]) -> None:
        """Write the next record, by telling this qemu-io's command for it; one process at a time."""
        with self.path.open("a") as file:
            flock(file, LOCK_EX)
            number = self.acknowledged
            write(f"write -f -P {pattern(number)} {FIRST_SLOT + number * SLOT} {SLOT}")  # -f: and flush it
            print("record", file=file)


def pattern(number: int) -> int:
    """The byte that a record is filled with: never 0, and another than its neighbours'."""
    return number % 251 + 1


def records_in(content: bytes) -> int:
    """How many records there are: 0, 1, 2, … without a gap and without anything after them. Raises AssertionError."""
    slots = [content[at : at + SLOT] for at in range(FIRST_SLOT, len(content), SLOT)]
    count = next((n for n, slot in enumerate(slots) if slot != bytes([pattern(n)]) * SLOT), len(slots))
    assert not any(any(slot) for slot in slots[count:]), f"something follows record {count - 1}, but not the next one"
    return count


def guardians(state_dir: Path) -> list[int]:
    """The guardians of the backups that are journalled there."""
    found = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if _guards(path, state_dir)]
    return sorted(found)


def _guards(command_line: Path, state_dir: Path) -> bool:
    try:
        words = command_line.read_bytes().split(b"\0")
    except OSError:  # it has just ended
        return False
    return b"vmbackup.guardian" in words and os.fsencode(state_dir) in words


# -- in the driver's process


def _drive(task: Task, line: Connection) -> None:
    faulthandler.register(signal.SIGUSR1, task.stacks.open("w"))
    clock.BARRIER_SECONDS = BARRIER_SECONDS
    if task.boot is not None:
        task.boot.believe()
    hypervisor = Hypervisor(task.uri, config_dir=task.config_dir)
    watch = _Watch(task, _Writer(task, hypervisor).write, line)
    watch_all(watch.passed)
    _wait_for_ready()
    told = Told()
    request = Request(BackupSpec.parse(spec_of(task.domain, **task.spec)))
    node = make_node(hypervisor, task.state_dir, task.directory / "locks")
    key = BackupId("tests", "backup", task.uid)
    with guarded(node) if task.guarded else nullcontext():
        make_backup(node, key, lambda: request, task.directory / "store", told).run()
    line.send((told.timeline[-1][1], watch.moments, told.reasons))


class _Writer:
    """The guest's program: it writes whenever it runs."""

    def __init__(self, task: Task, hypervisor: Hypervisor) -> None:
        self._task = task
        self._call = hypervisor.call
        self._guest: Guest = hypervisor.guest(task.domain)

    def write(self) -> None:
        try:
            if self._guest.state()[0] is not Power.RUNNING:
                return
            self._task.diary.write_next(
                lambda command: self._call("writing", lambda connection: self._write(connection, command))
            )
        except Exception:  # libvirtd or the guest is gone: nothing is acknowledged
            return

    def _write(self, connection: libvirt.virConnect, command: str) -> None:
        domain = connection.lookupByName(self._task.domain)
        for target in self._task.targets:
            device = f"/machine/peripheral/virtio-disk{ord(target[-1]) - ord('a')}/virtio-backend"
            hmp = f'qemu-io -d {device} "{command}"'
            libvirt_qemu.qemuMonitorCommand(domain, hmp, libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP)


def watch_all(passed: Callable[[When, str], None]) -> None:
    """From now on call `passed` at every moment of the backups that this process runs."""

    def around(function: Callable[..., Any], name: Callable[..., str | None], *, is_call: bool = False) -> Any:
        @wraps(function)
        def watched(*arguments: Any, **options: Any) -> Any:
            event = name(*arguments, **options)
            if event is None:
                return function(*arguments, **options)
            passed(When.BEFORE, event)
            if is_call:
                passed(When.DURING, event)
            try:
                return function(*arguments, **options)
            finally:
                passed(When.AFTER, event)

        return watched

    Journal.start = classmethod(around(Journal.start.__func__, lambda *_: "start the journal"))
    Journal.write = around(Journal.write, lambda journal, record, **_: _changes(journal.record, record))
    Hypervisor.call = around(
        Hypervisor.call,
        lambda _, doing, *__, mutating=False: doing.partition(": ")[2] if mutating else None,
        is_call=True,
    )
    Path.unlink = around(Path.unlink, lambda path, **_: "remove an overlay" if ".vmb-" in path.name else None)


def _wait_for_ready() -> None:
    """From now on a commit is READY when its call returns: else that decides the order of what follows."""

    def commit(guest: Guest, target: str, *arguments: Any, **options: Any) -> None:
        start(guest, target, *arguments, **options)
        with suppress(VMBackupError, TimeoutError):  # libvirtd or the guest is gone
            wait_until(lambda: _mirror(guest, target) is not Mirror.PENDING, "READY", seconds=5)

    start = Guest.commit
    Guest.commit = commit


def _mirror(guest: Guest, target: str) -> Mirror:
    disks = chain.disks(guest.live_xml() or "<domain/>")
    return next((disk.mirror for disk in disks if disk.target == target), Mirror.NONE)


class _Watch:
    """Notes every moment, and interrupts the driver at the chosen one."""

    def __init__(self, task: Task, write: Callable[[], None], line: Connection | None = None) -> None:
        self._task = task
        self._write = write
        self._line = line
        self._came_by: Counter[str] = Counter()
        self.moments: list[Moment] = []

    def passed(self, when: When, event: str) -> None:
        """A moment has come."""
        if when is When.BEFORE:
            self._came_by[event] += 1
            if event == SNAPSHOT:
                self._task.diary.note(f"snapshot {self._task.uid}")
        elif when is When.AFTER:
            self._write()
        moment = Moment(when, event, self._came_by[event])
        self.moments.append(moment)
        if moment != self._task.moment:
            return
        if self._task.interruption is Interruption.HOLD and self._line is not None:
            self._line.send(None)
            self._line.recv()
        elif when is When.DURING:
            threading.Thread(target=_die_soon, daemon=True).start()
        else:
            os.kill(os.getpid(), signal.SIGKILL)


def _die_soon() -> None:
    time.sleep(_IN_FLIGHT_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _changes(old: Record, new: Record) -> str:
    """What a write to the journal says, in the names of the fields that it changes."""
    changed = [_name(each, new) for each in _changed(old, new) if each != "disks"]
    if len(old.disks) != len(new.disks):
        changed.append("disks")
    else:
        for before, after in zip(old.disks, new.disks, strict=True):
            changed += [f"{after.target}.{each}" for each in _changed(before, after)]
    return f"journal {', '.join(changed) or 'nothing'}"


def _changed(old: Any, new: Any) -> list[str]:
    names = [each.name for each in fields(new) if each.name not in _COUNTS]
    return [name for name in names if getattr(old, name) != getattr(new, name)]


def _name(changed: str, record: Record) -> str:
    if changed == "call":
        return f"call={record.call.name if record.call else None}"
    return changed


def _main() -> int:
    """A `vmbackup` that dies: python -m tests.support.kill_points WHEN EVENT NTH DIRECTORY COMMAND FLAG …"""
    when, event, nth, directory, *arguments = sys.argv[1:]
    moment = Moment(When(when), event, int(nth))
    task = Task("", Path(), Path(directory), "", (), "", moment=moment)
    watch_all(_Watch(task, lambda: None).passed)
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(_main())
