"""What `vmbackup run` prints of a backup, and how it ends."""

from __future__ import annotations

import signal
import threading
from typing import Any, cast

import pytest

from tests.support import manifests
from vmbackup.api.backup import BackupSpec
from vmbackup.api.status import DiskReport, DiskState, Outcome, Phase, Reason, Report
from vmbackup.api.store import StoreSpec
from vmbackup.commands.running import session, verdict
from vmbackup.commands.running.backup_file import BackupFile
from vmbackup.commands.running.screen import Screen
from vmbackup.protocol.record import Record, Snapshot
from vmbackup.reconcile.node import Node
from vmbackup.reconcile.steps.step import Ending

STORE = StoreSpec.parse({"directory": {"path": "/srv/store"}})
FILE = BackupFile("default", "b", "", BackupSpec.parse(manifests.backup("b")["spec"]), STORE)


class Lines:
    """A screen that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, word: str, message: str, *, style: str = "") -> None:
        self.lines.append(f"{word} {message}")

    def report(self, report: Report) -> None:
        """Nothing is kept of it."""


def run(monkeypatch: pytest.MonkeyPatch, *told: Report | tuple[str, str]) -> tuple[int, list[str]]:
    """The exit code and the lines of a run whose backup reports this: reports, and warnings."""

    class Told:
        def __init__(self, *_: object, reporter: session.Session, **__: object) -> None:
            self._reporter = reporter

        def run(self) -> Ending:
            for each in told:
                if isinstance(each, Report):
                    self._reporter.report(each)
                else:
                    self._reporter.event(*each, warning=True)
            return Ending.FINISHED

    monkeypatch.setattr(session, "Backup", Told)
    monkeypatch.setattr(session, "_SIGNALS", cast("tuple[signal.Signals, ...]", ()))
    screen: Any = Lines()
    code = session.Session(cast("Node", None), FILE, None, cast("Screen", screen), retry=False).run()
    return code, screen.lines[1:]


REFUSED = Report(Phase.FAILED, "DomainNotRunning", "domain web-01 is off", outcome=Outcome.REFUSED, chain_clean=True)


def test_a_refusal_is_printed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    code, lines = run(monkeypatch, Report(), ("DomainNotRunning", "domain web-01 is off"), REFUSED)
    assert code == verdict.REFUSED
    assert lines == ["Refused DomainNotRunning: domain web-01 is off"]


def test_a_warning_before_the_snapshot_that_is_no_refusal_is_printed_in_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warnings = ("GuestHeld", "resuming it"), ("OverlaySpaceLow", "copy given up")
    copying = Report(Phase.COPYING, Reason.COPYING)
    code, lines = run(monkeypatch, Report(), warnings[0], copying, warnings[1], REFUSED)
    assert code == verdict.REFUSED
    assert lines[:2] == ["GuestHeld resuming it", "OverlaySpaceLow copy given up"]


def test_a_warning_that_nothing_follows_waits_for_no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a second `vmbackup run`, which waits for the first."""
    shown = threading.Event()
    monkeypatch.setattr(Lines, "line", lambda _self, word, _message, style="": shown.set() if word == "Held" else None)
    monkeypatch.setattr(session, "Backup", lambda *_args, **_options: None)
    running = session.Session(cast("Node", None), FILE, None, cast("Screen", Lines()), retry=False)
    running.event("Held", "another process runs it", warning=True)
    assert shown.wait(60)


def test_a_refusal_whose_event_comes_after_its_report_is_printed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    garbled = ("JournalGarbled", "kept as x")
    _, lines = run(monkeypatch, Report(), garbled, REFUSED, ("DomainNotRunning", "domain web-01 is off"))
    assert lines == ["JournalGarbled kept as x", "Refused DomainNotRunning: domain web-01 is off"]


def test_a_copy_is_told_with_its_size_in_units_and_its_digest() -> None:
    disks = DiskReport("vda", DiskState.HOME, format="raw", total_bytes=64 << 20, digest="sha256:ab")
    skipped = DiskReport("sda", DiskState.SKIPPED)
    end = verdict.ended(Report(message="stored", outcome=Outcome.SUCCEEDED, disks=(disks, skipped)))
    assert end.exit_code == verdict.READY
    assert [(line.word, line.message) for line in end.lines] == [
        ("Ready", "stored"),
        ("vda", "raw, 64.0 MiB, sha256:ab"),
    ]


def test_a_guest_that_is_left_on_its_overlay_is_told_with_the_cure_of_the_command_line() -> None:
    annotation = "vda: locked; fix that, then set the annotation vmbackup.dev/retry to a new value"
    last = Report(message=annotation, outcome=Outcome.FAILED, chain_clean=False, chain_message="vda: locked")
    end = verdict.ended(last)
    assert end.exit_code == verdict.ON_OVERLAY
    assert end.lines[0].message.endswith("vda: locked; fix the cause, then run again with --retry")


@pytest.mark.parametrize(
    ("record", "unknown", "code"),
    [
        (None, False, verdict.REFUSED),
        (None, True, verdict.ON_OVERLAY),
        (Record("u", "n", "b"), False, verdict.REFUSED),
        (Record("u", "n", "b", snapshot=Snapshot.DONE), False, verdict.ON_OVERLAY),
    ],
)
def test_what_cannot_be_run_says_whether_the_guest_may_be_on_its_overlay(
    record: Record | None, unknown: bool, code: int
) -> None:
    exit_code, line = verdict.broken("why", record, unknown=unknown)
    assert exit_code == code
    assert ("nothing was touched" in line) == (code == verdict.REFUSED)
