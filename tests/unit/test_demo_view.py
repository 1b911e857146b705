"""What the demo shows of a backup."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from sandbox.demo.view import Story, View, render


def status(phase: str, *, ready: str = "Unknown", percent: int = 0, message: str = "") -> dict[str, Any]:
    return {
        "phase": phase,
        "message": message,
        "conditions": [{"type": "Ready", "status": ready}],
        "progress": {"percent": percent, "copiedBytes": percent << 20, "totalBytes": 100 << 20},
        "disks": [{"target": "vda", "format": "raw", "state": "Copying", "copiedBytes": percent << 20}],
    }


def shown_on_a_terminal(story: Story) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    console.print(render(story))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_phase_is_new_once() -> None:
    story = Story("web-01-1")
    assert [story.take(status(phase)) for phase in ("Pending", "Copying", "Copying", "Pivoted")] == [
        True, True, False, True,
    ]  # fmt: skip


def test_the_terminal_view_has_the_phases_the_progress_and_the_disks() -> None:
    story = Story("web-01-1")
    story.take(status("Pending"))
    story.take(status("Copying", percent=40, message="Copying vda"))
    story.guest = "record 17 acknowledged"
    shown = shown_on_a_terminal(story)
    assert "✔ Pending" in shown
    assert "▶ Copying" in shown
    assert "40 % 40.0 MiB of 100.0 MiB" in shown
    assert "vda   raw     Copying  40.0 MiB" in shown
    assert "record 17 acknowledged" in shown
    assert "Copying vda" in shown


@pytest.mark.parametrize(
    ("phase", "ready", "mark"), [("Pivoted", "True", "✔ Pivoted"), ("Failed", "False", "✘ Failed")]
)
def test_the_end_is_marked(phase: str, ready: str, mark: str) -> None:
    story = Story("web-01-1")
    story.take(status("Pending"))
    story.take(status(phase, ready=ready))
    assert mark in shown_on_a_terminal(story)


def test_elsewhere_each_phase_and_every_20_percent_is_a_line() -> None:
    console = Console(file=io.StringIO(), width=120)
    story, view = Story("web-01-1"), View(console)
    with view:
        for new in (status("Pending", message="Waiting"), status("Copying", message="Copying vda")):
            view.show(story, new_phase=story.take(new))
        for percent in range(1, 100):
            view.show(story, new_phase=story.take(status("Copying", percent=percent)))
    assert isinstance(console.file, io.StringIO)
    lines = [line.split(" s  ")[1] for line in console.file.getvalue().splitlines()]
    assert lines == [
        "Pending       Waiting",
        "Copying       Copying vda",
        *(f"Copying       {percent} %" for percent in (20, 40, 60, 80)),
    ]
