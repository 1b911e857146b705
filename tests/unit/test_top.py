"""`vmbackup top`: what it shows of what agents say, and what it calls trouble."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from rich.console import Console

from sandbox.certificates import Authority
from vmbackup import cli
from vmbackup.api.status import DiskReport, DiskState, Outcome, Phase, Reason, Report
from vmbackup.commands import flags
from vmbackup.commands.amounts import size, span
from vmbackup.commands.top import Look, read, render, troubles
from vmbackup.telemetry.health import HealthServer
from vmbackup.telemetry.metrics import Metrics
from vmbackup.telemetry.server import Certificate

VMBACKUP = Path(sys.executable).with_name("vmbackup")
NOW = time.time()
Tell = Callable[[Metrics], None]


def look(*told: Tell, at: float | None = None) -> Look:
    """What is read of an agent that was told this."""
    metrics = Metrics()
    for tell in told:
        tell(metrics)
    return read(generate_latest(metrics.registry).decode(), "node-a:9777", time.time() if at is None else at)


def shown(*looks: Look, before: tuple[Look, ...] = ()) -> str:
    console = Console(width=200, record=True, file=StringIO())
    console.print(render(looks, before))
    return console.export_text()


def copying(copied: int, total: int = 1000 << 20) -> Tell:
    disk = DiskReport("vda", DiskState.COPYING, copied_bytes=copied, total_bytes=total)
    return lambda metrics: metrics.told(
        "web-01", Report(Phase.COPYING, Reason.COPYING, last_progress_time=time.time(), disks=(disk,))
    )


def overlay(tmp_path: Path, age: float) -> Tell:
    return lambda metrics: metrics.overlay("web-01", "vda", tmp_path, time.time() - age)


def test_a_running_backup_is_shown_with_its_progress_rate_and_overlay(tmp_path: Path) -> None:
    before = look(copying(100 << 20), at=100)
    after = look(copying(250 << 20), overlay(tmp_path, 65), at=102)
    text = shown(after, before=(before,))
    line = next(line for line in text.splitlines() if "web-01" in line)
    assert line.split()[:5] == ["node-a:9777", "web-01", "Copying", "25%", "75.0"]
    assert "75.0 MiB/s" in line
    assert "1m 5s" in line
    assert "vmbackup 0" in text


def test_a_commit_shows_what_it_has_merged_and_its_reason() -> None:
    disk = DiskReport("vda", DiskState.COMMITTING, copied_bytes=5, total_bytes=5, merged_bytes=3 << 20)
    report = Report(Phase.COMMITTING, Reason.COMMIT_RETRYING, last_progress_time=NOW, disks=(disk,))
    line = shown(look(lambda metrics: metrics.told("web-01", report)))
    assert "Committing CommitRetrying" in line
    assert "3.0 MiB merged" in line


def test_a_guest_at_rest_shows_its_last_backup_and_no_trouble() -> None:
    now = look(lambda metrics: metrics.succeeded("web-01", time.time() - 7260, time.time()))
    assert "2h 1m ago" in shown(now)
    assert troubles(now.guests["web-01"], now.at) == []


def quarantined(metrics: Metrics) -> None:
    metrics.told("web-01", Report(Phase.FAILED, Reason.QUARANTINED, outcome=Outcome.FAILED))


def hanging(reason: Reason) -> Tell:
    return lambda metrics: metrics.told(
        "web-01", Report(Phase.COMMITTING, reason, last_progress_time=time.time() - 1900)
    )


@pytest.mark.parametrize(
    ("tell", "trouble"),
    [
        (lambda metrics: metrics.suspended("web-01", time.time() - 30), ["SUSPENDED for 30s"]),
        (lambda metrics: metrics.suspended("web-01", time.time() - 30, limit=60), []),
        (quarantined, ["QUARANTINED"]),
        (lambda metrics: metrics.stalled("web-01", "vda"), ["COMMIT NOT CONVERGING"]),
        (hanging(Reason.COMMITTING), ["NO PROGRESS for 31m 40s"]),
        (hanging(Reason.DOMAIN_OFF), []),
        (hanging(Reason.DOMAIN_MIGRATED), []),
        (lambda metrics: metrics.failed("web-01", time.time() - 60), ["FAILED 1m 0s ago"]),
        (lambda metrics: metrics.succeeded("web-01", time.time() - 37 * 3600, 0), ["NO RECENT BACKUP"]),
    ],
)
def test_trouble_is_what_an_alert_would_say(tell: Tell, trouble: list[str]) -> None:
    now = look(tell)
    assert troubles(now.guests["web-01"], now.at) == trouble


def test_an_overlay_is_left_when_it_is_old_or_nobody_works_on_it(tmp_path: Path) -> None:
    def found(*told: Tell) -> list[str]:
        now = look(*told)
        return [words for words in troubles(now.guests["web-01"], now.at) if words != "OVERLAY SPACE LOW"]

    assert found(overlay(tmp_path, 700)) == ["LEFT ON OVERLAY"]
    assert found(overlay(tmp_path, 500)) == []
    assert found(overlay(tmp_path, 700), copying(1)) == []
    assert found(overlay(tmp_path, 22000), copying(1)) == ["LEFT ON OVERLAY"]


def test_little_room_for_an_overlay_is_trouble(tmp_path: Path) -> None:
    now = look(overlay(tmp_path, 5))
    guest = now.guests["web-01"]
    for free, trouble in ((511 << 20, ["OVERLAY SPACE LOW"]), (513 << 20, [])):
        guest.samples["vmbackup_overlay_free_bytes"] = free
        assert troubles(guest, now.at) == trouble


def test_guests_in_trouble_come_first_then_those_that_are_backed_up() -> None:
    text = shown(
        look(
            lambda metrics: metrics.succeeded("a-resting", time.time(), time.time()),
            copying(1),
            lambda metrics: metrics.failed("z-failed", time.time()),
        )
    )
    assert text.index("z-failed") < text.index("web-01") < text.index("a-resting")


def test_agents_show_orphans_a_late_status_and_why_they_do_not_answer() -> None:
    late = look(lambda metrics: metrics.orphans(2), lambda metrics: metrics.unreported("uid", time.time() - 400))
    text = shown(late, Look("node-b:9777", 0, error="Connection refused"))
    assert "2 orphan overlays" in text
    assert "status not written for 6m 40s" in text
    assert "node-b:9777  does not answer: Connection refused" in text


@pytest.fixture
def served() -> Iterator[tuple[Metrics, str]]:
    metrics = Metrics()
    with HealthServer(metrics.registry, {}, host="127.0.0.1", port=0) as server:
        yield metrics, f"http://127.0.0.1:{server.port}/metrics"


def test_once_it_ends_with_what_scripts_want_to_know(
    served: tuple[Metrics, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics, url = served
    nobody = "http://127.0.0.1:1/metrics"
    assert cli.main(["top", "--once", "--url", url]) == 0
    assert cli.main(["top", "--once", "--url", url, "--url", nobody]) == 1
    assert "127.0.0.1:1  does not answer" in capsys.readouterr().out
    metrics.failed("web-01", time.time() - 5)
    assert cli.main(["top", "--url", url]) == 1  # no terminal: as with --once
    assert "FAILED 5s ago" in capsys.readouterr().out
    assert cli.main(["top", "--once", "--url", nobody]) == 2
    capsys.readouterr()
    monkeypatch.setenv("VMBACKUP_URL", f"{url}, {nobody}")
    assert cli.main(["top", "--once"]) == 1
    assert "127.0.0.1:1  does not answer" in capsys.readouterr().out
    assert cli.main(["top", "--once", "--url", nobody]) == 2  # a flag takes precedence


@pytest.mark.parametrize(
    ("tell", "code"),
    [
        (lambda metrics: metrics.unreported("uid", time.time() - 290), 0),
        (lambda metrics: metrics.unreported("uid", time.time() - 310), 1),
        (lambda metrics: metrics.orphans(1), 1),
    ],
)
def test_what_an_agent_needs_a_look_for_is_told_to_scripts_too(
    served: tuple[Metrics, str], tell: Tell, code: int
) -> None:
    metrics, url = served
    tell(metrics)
    assert cli.main(["top", "--once", "--url", url]) == code


def test_in_the_pod_of_an_agent_it_needs_no_flag(served: tuple[Metrics, str], monkeypatch: pytest.MonkeyPatch) -> None:
    port = served[1].partition("127.0.0.1:")[2].partition("/")[0]
    monkeypatch.setenv("VMBACKUP_METRICS_HOST", "127.0.0.2")
    monkeypatch.setenv("VMBACKUP_METRICS_PORT", port)
    assert flags.own_metrics() == f"http://127.0.0.2:{port}/metrics"
    monkeypatch.setenv("VMBACKUP_METRICS_HOST", "fd00::1")
    monkeypatch.setenv("VMBACKUP_METRICS_TLS_CERT", "/etc/vmbackup/tls.crt")
    assert flags.own_metrics() == f"https://[fd00::1]:{port}/metrics"
    monkeypatch.delenv("VMBACKUP_METRICS_HOST")
    monkeypatch.delenv("VMBACKUP_METRICS_TLS_CERT")
    assert flags.own_metrics() == served[1]


def test_in_a_pod_that_serves_by_tls_it_trusts_the_certificate_of_that_agent_and_no_other(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.issue("own", user="own", addresses=["DNS:vmbackup-agent.vmbackup-system.svc"])
    other, _ = authority.issue("other", user="other", addresses=["IP:::1"])
    with HealthServer(Metrics().registry, {}, host="::1", port=0, tls=Certificate(certificate, key)) as server:
        own = f"[::1]:{server.port}"
        assert f"{own}  vmbackup " in top_in_the_pod(server, certificate)
        assert "certificate verify failed" in top_in_the_pod(server, other)
        elsewhere = f"https://[0:0:0:0:0:0:0:1]:{server.port}/metrics"
        assert "certificate verify failed" in top_in_the_pod(server, certificate, f"--url={elsewhere}")


def top_in_the_pod(server: HealthServer, certificate: Path, *arguments: str) -> str:
    """What it says with the environment of an agent that serves there with this certificate."""
    environment = os.environ | {
        "VMBACKUP_METRICS_HOST": "::1",
        "VMBACKUP_METRICS_PORT": str(server.port),
        "VMBACKUP_METRICS_TLS_CERT": str(certificate),
    }
    command = [VMBACKUP, "top", "--once", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout


def test_a_page_that_is_not_there_is_no_answer(served: tuple[Metrics, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", "--once", "--url", served[1].replace("/metrics", "/nowhere")]) == 2
    assert "does not answer: Not Found" in capsys.readouterr().out


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (61, "1m 1s"), (7320, "2h 2m"), (93600, "1d 2h")])
def test_a_time_is_told_in_its_two_largest_units(seconds: float, text: str) -> None:
    assert span(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (5 << 50, "5120.0 TiB")]
)
def test_a_size_is_told_in_the_unit_that_suits_it(count: float, text: str) -> None:
    assert size(count) == text
