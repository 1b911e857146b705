"""`vmbackup top` as somebody has it before them: at a terminal of its own, until Ctrl-C."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from vmbackup.api.status import DiskReport, DiskState, Phase, Reason, Report
from vmbackup.telemetry.health import HealthServer
from vmbackup.telemetry.metrics import Metrics

VMBACKUP = Path(sys.executable).with_name("vmbackup")
SECONDS = 30  # for anything to be shown on a loaded machine
OTHER_SCREEN, BACK, CURSOR_HIDDEN, CURSOR = b"\x1b[?1049h", b"\x1b[?1049l", b"\x1b[?25l", b"\x1b[?25h"


class Terminal:
    """`vmbackup top` on a pseudo terminal, for which Ctrl-C is what it is at any terminal. A context manager."""

    def __init__(self, server: HealthServer) -> None:
        url = f"http://127.0.0.1:{server.port}/metrics"
        self._ours, theirs = pty.openpty()
        self._process = subprocess.Popen(
            ["setsid", "--ctty", VMBACKUP, "top", f"--url={url}", "--interval=0.2"],
            env=os.environ | {"TERM": "xterm", "COLUMNS": "160", "LINES": "30"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._ours)
        self._process.kill()
        self._process.wait()

    def until(self, text: bytes) -> bytes:
        """What it shows from now on, up to this text."""
        shown = b""
        while text not in shown:
            more = self._read()
            assert more, f"it ended before {text}, after {shown}"
            shown += more
        return shown

    def interrupt(self) -> tuple[int, bytes]:
        """Type Ctrl-C; its exit code, and what it shows before that."""
        os.write(self._ours, b"\x03")
        shown = b"".join(iter(self._read, b""))
        return self._process.wait(SECONDS), shown

    def _read(self) -> bytes:
        """What it shows next; nothing at its end."""
        assert select.select([self._ours], [], [], SECONDS)[0], "it shows nothing more"
        try:
            return os.read(self._ours, 65536)
        except OSError:  # EIO: the other end is closed
            return b""


def serving(metrics: Metrics, port: int = 0) -> HealthServer:
    return HealthServer(metrics.registry, {}, host="127.0.0.1", port=port)


def copied(metrics: Metrics, mib: int) -> None:
    disk = DiskReport("vda", DiskState.COPYING, copied_bytes=mib << 20, total_bytes=1000 << 20)
    report = Report(Phase.COPYING, Reason.COPYING, last_progress_time=time.time(), disks=(disk,))
    metrics.told("web-01", report)


def test_it_shows_a_table_keeps_it_fresh_and_leaves_the_terminal_as_it_was() -> None:
    metrics = Metrics()
    with serving(metrics) as server, Terminal(server) as terminal:
        first = terminal.until(b"no domain is being backed up")
        assert OTHER_SCREEN in first
        assert CURSOR_HIDDEN in first
        copied(metrics, 100)
        assert b"web-01" in terminal.until(b"10%")
        copied(metrics, 250)
        assert b"25%" in terminal.until(b"MiB/s")
        metrics.failed("web-01", time.time())
        terminal.until(b"FAILED")
        code, last = terminal.interrupt()
    assert code == 0
    assert CURSOR in last
    assert BACK in last
    assert b"Traceback" not in last


def test_an_agent_that_goes_away_is_shown_as_such_and_the_look_goes_on() -> None:
    metrics = Metrics()
    with serving(metrics) as server:
        terminal = Terminal(server)
        terminal.until(b"vmbackup 0")
    with terminal:
        terminal.until(b"does not answer: Connection refused")
        with serving(metrics, server.port):
            terminal.until(b"vmbackup 0")
