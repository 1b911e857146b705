"""What the demo shows: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sandbox.demo.watch import Status, condition

PHASES = ("Pending", "Snapshotting", "Copying", "Committing", "Pivoted")
_MEANING = {
    "Pending": "checked, queued",
    "Snapshotting": "all disks at the same moment; the guest now writes to overlays",
    "Copying": "the frozen images are copied to the store while the guest runs",
    "Committing": "the overlays are merged back into the images",
    "Pivoted": "every disk is on its own image again",
}


class Story:
    """One backup as observed: when each phase began, on our clock, and the latest status."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.started = time.monotonic()
        self.began: dict[str, float] = {}
        self.status: Status = {}
        self.guest = ""
        self._finished: float | None = None

    @property
    def phase(self) -> str:
        return self.status.get("phase", "Pending")

    @property
    def percent(self) -> int:
        return self.status.get("progress", {}).get("percent", 0)

    def take(self, status: Status) -> bool:
        """Store a new status; returns whether its phase is new."""
        self.status = status
        now = time.monotonic() - self.started
        if condition(status, "Ready").get("status") in ("True", "False"):
            self._finished = now
        new = self.phase not in self.began
        self.began.setdefault(self.phase, now)
        return new

    def seconds_in(self, phase: str) -> float | None:
        """How long a phase took, or has taken so far; None if it was not seen."""
        if phase not in self.began:
            return None
        later = [begin for begin in self.began.values() if begin > self.began[phase]]
        end = min(later, default=self._finished or time.monotonic() - self.started)
        return end - self.began[phase]


class View:
    """Shows headings, steps and a Story. On a terminal the story is redrawn in place until the view is left."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._live: Live | None = None
        self._percent_shown = 0

    def heading(self, text: str) -> None:
        self.console.print(f"\n[bold]{text}[/bold]")

    def step(self, text: str) -> None:
        """A completed step."""
        self.console.print(Text.assemble(("  ✔ ", "green"), text), soft_wrap=True)

    def detail(self, text: str) -> None:
        """The output of a command."""
        for line in text.splitlines():
            self.console.print(Text(f"      {line}", style="dim"), soft_wrap=True)

    def __enter__(self) -> Self:
        self._percent_shown = 0
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=10, transient=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def show(self, story: Story, *, new_phase: bool) -> None:
        """Show the current state of the story."""
        if self._live:
            self._live.update(render(story))
            return
        elapsed = time.monotonic() - story.started
        if new_phase:
            message = story.status.get("message") or _MEANING.get(story.phase, "")
            self.console.print(f"  {elapsed:5.1f} s  {story.phase:<13} {message}", soft_wrap=True)
        elif story.percent >= self._percent_shown + 20:
            self._percent_shown = story.percent
            self.console.print(f"  {elapsed:5.1f} s  {story.phase:<13} {story.percent} %")


def render(story: Story) -> RenderableType:
    """The live view: the phases, a progress bar, the disks, and the guest's progress."""
    bar = Table.grid(padding=(0, 1))
    bar.add_row("   ", ProgressBar(total=100, completed=story.percent, width=50), f"{story.percent} %", _bytes(story))
    guest = Text(f"    guest: {story.guest}", style="cyan") if story.guest else Text("")
    message = Text(f"    {story.status.get('message', '')}", style="dim")
    return Group(_phases(story), Text(""), bar, _disks(story), guest, message)


def _phases(story: Story) -> Table:
    table = Table.grid(padding=(0, 1))
    phases = [*PHASES, *(["Failed"] if story.phase == "Failed" else [])]
    finished = condition(story.status, "Ready").get("status") in ("True", "False")
    for phase in phases:
        seconds = story.seconds_in(phase)
        running = phase == story.phase and not finished
        mark, style = (" ", "dim") if seconds is None else ("▶", "bold yellow") if running else ("✔", "green")
        if phase == "Failed":
            mark, style = "✘", "bold red"
        took = "" if seconds is None else f"{seconds:6.2f} s"
        table.add_row(f"  {mark}", Text(phase, style=style), Text(took), Text(_MEANING.get(phase, ""), style="dim"))
    return table


def _disks(story: Story) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    for column in ("   ", "disk", "format", "state", "copied", "merged", "digest"):
        table.add_column(column)
    for disk in story.status.get("disks", []):
        table.add_row(
            "",
            disk["target"],
            disk.get("format", ""),
            disk.get("state", ""),
            _mib(disk.get("copiedBytes", 0)),
            _mib(disk.get("mergedBytes", 0)),
            disk.get("digest", "")[:19],
        )
    return table


def _bytes(story: Story) -> str:
    progress = story.status.get("progress", {})
    if not progress.get("totalBytes"):
        return ""
    return f"{_mib(progress.get('copiedBytes', 0))} of {_mib(progress['totalBytes'])}"


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
