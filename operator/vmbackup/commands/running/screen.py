"""The output of `vmbackup run`: a line for each event; on a terminal also a progress bar below them."""

from __future__ import annotations

import time
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from vmbackup.api.status import GUEST_AWAY, Phase, Reason, Report
from vmbackup.commands.amounts import size
from vmbackup.output import BackgroundOutput

_LINE_EVERY = 10.0  # seconds between two progress lines when there is no bar
_WAITS = (Reason.QUEUED, *GUEST_AWAY, Reason.WAITING_FOR_CALLS, Reason.WAITING_FOR_OTHERS)  # without an event


class LineConsole(Console):
    """A console that a closed pipe or terminal only silences: the backup continues without output."""

    def on_broken_pipe(self) -> None:
        """Replaces the method of rich, which would end the thread."""
        self.quiet = True


class Screen:
    """Shows one backup, from any thread. Use it as a context manager: it removes the bar at the end.

    The terminal may be stopped (Ctrl-S), so no caller waits for it, except the end of the context.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("  {task.description:<13}"),
            BarColumn(bar_width=32),
            TaskProgressColumn(),
            TextColumn("{task.fields[bytes]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task(Phase.PENDING, total=None, bytes="")
        self._last_message = ""
        self._line_due = time.monotonic() + _LINE_EVERY
        self._output = BackgroundOutput("screen")

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._output.end()
        if self._bar.live.is_started:
            with suppress(OSError):
                self._bar.stop()

    def report(self, report: Report) -> None:
        """Show the progress."""
        self._output.do(partial(self._report, time.strftime("%H:%M:%S"), report))

    def line(self, word: str, message: str, *, style: str = "") -> None:
        """Print a word and a sentence about it. The same sentence is not printed twice in a row."""
        self._output.do(partial(self._line, time.strftime("%H:%M:%S"), word, message, style))

    def _report(self, clock: str, report: Report) -> None:
        copied = sum(disk.copied_bytes for disk in report.disks)
        total = sum(disk.total_bytes for disk in report.disks)
        merged = sum(disk.merged_bytes for disk in report.disks)
        done = f"{size(copied)} of {size(total)}" if total else ""
        if report.phase is Phase.COMMITTING:
            done = f"{size(merged)} merged"
        self._bar.update(self._task, description=report.phase, completed=copied, total=total or None, bytes=done)
        if waiting := _waiting_for(report):
            self._line(clock, report.reason, waiting, "")
        elif done and not self._console.is_terminal and time.monotonic() >= self._line_due:
            self._line(clock, report.phase, done, "")

    def _line(self, clock: str, word: str, message: str, style: str) -> None:
        if message == self._last_message:
            return
        self._last_message = message
        self._line_due = time.monotonic() + _LINE_EVERY
        text = Text.assemble((clock, "dim"), "  ", (f"{word:<13}", style or "bold"), " ", message)
        with suppress(OSError):
            self._console.print(text, soft_wrap=True)


def _waiting_for(report: Report) -> str:
    """What the backup is waiting for, if there is no event for that."""
    if report.reason in _WAITS:
        return report.message
    return report.message if report.reason == Reason.PENDING and not report.disks else ""
