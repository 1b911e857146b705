"""Long-running programs: started with a log and a pid file, ended for certain, and never somebody else's.

A program either dies with the thread that started it (tests, benchmarks) or is detached and found again by its
pid file (the demo). A pid file holds the start time too, so that a number used again is not taken for our program.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


class SandboxError(Exception):
    """A part of the sandbox is not available or does not start; the text says why and what to do."""


class Program:
    """A program `name` whose pid file and log are in `directory` (`NAME.pid`, `NAME.log`)."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.log = directory / f"{name}.log"
        self._pid_file = directory / f"{name}.pid"
        self._child: subprocess.Popen[bytes] | None = None

    def start(
        self, argv: Sequence[str | Path], *, detached: bool = False, env: Mapping[str, str] | None = None
    ) -> None:
        """Start it, unless it runs. `env` is added to the environment. Attached, it is killed when our thread ends."""
        if self.running:
            return
        command = [str(word) for word in argv]
        if not detached:
            command = ["setpriv", "--pdeathsig", "KILL", "--", *command]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | (env or {}),
                start_new_session=True,  # Ctrl-C in a terminal is for us to handle, not for the parts
            )
        self._pid_file.write_text(f"{self._child.pid} {_start_time(self._child.pid)}\n")

    @property
    def pid(self) -> int | None:
        """The process id while it runs, else None."""
        if self._child is not None and self._child.poll() is not None:
            return None
        try:
            pid, started = self._pid_file.read_text().split()
        except (FileNotFoundError, ValueError):
            return None
        return int(pid) if _start_time(int(pid)) == started else None

    @property
    def running(self) -> bool:
        return self.pid is not None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it runs."""
        if pid := self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop(self, *, seconds: float = 10.0) -> None:
        """End it: SIGTERM, and SIGKILL when it has not ended after `seconds`. Returns once it is gone."""
        for number, limit in ((signal.SIGTERM, seconds), (signal.SIGKILL, 10.0)):
            self.signal(number)
            if self._gone_within(limit):
                self._pid_file.unlink(missing_ok=True)
                return
        raise SandboxError(f"{self.name} (pid {self.pid}) did not exit, even after SIGKILL; see {self.log}")

    def kill(self) -> None:
        """End it as a crash would: SIGKILL. Returns once it is gone."""
        self.signal(signal.SIGKILL)
        if not self._gone_within(10.0):
            raise SandboxError(f"{self.name} (pid {self.pid}) did not exit after SIGKILL")

    def wait_until(self, ready: Callable[[], bool], *, seconds: float) -> None:
        """Return once `ready()`; raise SandboxError with the end of the log when it ends before, or takes longer."""
        deadline = time.monotonic() + seconds
        while not ready():
            if not self.running:
                raise SandboxError(f"{self.name} exited while it started. The end of {self.log}:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise SandboxError(f"{self.name} is not ready after {seconds:.0f} s. {self.log}:\n{self.log_tail()}")
            time.sleep(0.05)

    def log_tail(self, lines: int = 15) -> str:
        """The end of its log."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def _gone_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.running:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        if self._child is not None:
            self._child.wait()  # no zombie stays behind
        return True


def _start_time(pid: int) -> str:
    """When a process started, in the kernel's clock ticks; '' when there is none or it is a zombie (proc(5))."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]
