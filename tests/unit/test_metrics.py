"""What Prometheus sees, and what /healthz answers."""

from __future__ import annotations

import math
import threading
import time
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path
from shutil import disk_usage

import pytest
from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from vmbackup.api.status import DiskReport, DiskState, Outcome, Phase, Reason, Report, RetryReason
from vmbackup.telemetry.health import Check, HealthServer
from vmbackup.telemetry.metrics import Metrics

Sample = tuple[str, frozenset[tuple[str, str]]]


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def get(server: HealthServer, path: str) -> tuple[int, str]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{server.port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def scrape(metrics: Metrics) -> dict[Sample, float]:
    """All samples as Prometheus would read them."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(generate_latest(metrics.registry).decode())
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return scrape(metrics).get((name, frozenset(labels.items())))


def test_every_counter_starts_at_0_for_every_label_value(metrics: Metrics) -> None:
    counters = {sample: number for sample, number in scrape(metrics).items() if sample[0].endswith("_total")}
    ours = {sample: number for sample, number in counters.items() if sample[0].startswith("vmbackup_")}
    assert ours == {
        ("vmbackup_commit_merged_bytes_total", frozenset()): 0,
        ("vmbackup_copied_bytes_total", frozenset()): 0,
        **{("vmbackup_backups_total", frozenset({("result", result)})): 0 for result in Outcome},
        **{("vmbackup_commit_retries_total", frozenset({("reason", reason)})): 0 for reason in RetryReason},
    }


@pytest.fixture
def everything(metrics: Metrics, tmp_path: Path) -> Metrics:
    """All that can be so at a moment is."""
    metrics.overlay("web-01", "vda", tmp_path, since=0)
    metrics.stalled("web-01", "vda")
    metrics.suspended("web-01", since=0)
    metrics.succeeded("web-01", at=0, ended=0)
    metrics.failed("web-01", at=1)
    metrics.told("web-01", Report())
    metrics.told("web-02", Report(reason=Reason.QUARANTINED, outcome=Outcome.FAILED))
    return metrics


def test_the_table_in_docs_monitoring_is_what_there_is(everything: Metrics) -> None:
    def row(family: Metric) -> str:
        sample = next(each for each in family.samples if not each.name.endswith("_created"))
        labels = ",".join(label for label in sample.labels if label != "le")
        name = family.name if family.type == "histogram" else sample.name
        return f"| `{name}{{{labels}}}` | {family.type} | {family.documentation} |".replace("{}", "")

    rows = [row(family) for family in everything.registry.collect() if family.name.startswith("vmbackup_")]
    text = (Path(__file__).parent.parent.parent / "docs" / "monitoring.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("| `vmbackup_")] == rows, "\n".join(rows)


def test_the_names_are_those_that_outsiders_rely_on(everything: Metrics) -> None:
    metrics = everything
    shown = {(name, tuple(sorted(key for key, _ in labels))) for name, labels in scrape(metrics)}
    assert {sample for sample in shown if sample[0].startswith("vmbackup_")} == {
        *((f"vmbackup_commit_duration_seconds_{part}", ()) for part in ("count", "sum")),
        *((f"vmbackup_freeze_duration_seconds_{part}", ()) for part in ("count", "sum")),
        *((f"vmbackup_phase_duration_seconds_{part}", ("phase",)) for part in ("count", "sum")),
        ("vmbackup_commit_duration_seconds_bucket", ("le",)),
        ("vmbackup_freeze_duration_seconds_bucket", ("le",)),
        ("vmbackup_phase_duration_seconds_bucket", ("le", "phase")),
        ("vmbackup_commit_merged_bytes_total", ()),
        ("vmbackup_copied_bytes_total", ()),
        ("vmbackup_backups_total", ("result",)),
        ("vmbackup_commit_retries_total", ("reason",)),
        ("vmbackup_overlay_bytes", ("domain", "target")),
        ("vmbackup_overlay_free_bytes", ("domain", "target")),
        ("vmbackup_overlay_age_seconds", ("domain", "target")),
        ("vmbackup_last_success_timestamp_seconds", ("domain",)),
        ("vmbackup_last_failure_timestamp_seconds", ("domain",)),
        ("vmbackup_backup_state", ("domain", "phase", "reason")),
        ("vmbackup_backup_last_progress_timestamp_seconds", ("domain",)),
        ("vmbackup_backup_copied_bytes", ("domain",)),
        ("vmbackup_backup_total_bytes", ("domain",)),
        ("vmbackup_backup_merged_bytes", ("domain",)),
        ("vmbackup_quarantined", ("domain",)),
        ("vmbackup_commit_stalled", ("domain", "target")),
        ("vmbackup_guest_suspended_seconds", ("domain",)),
        ("vmbackup_guest_suspended_limit_seconds", ("domain",)),
        ("vmbackup_report_lag_seconds", ()),
        ("vmbackup_orphan_overlays", ()),
        ("vmbackup_policies", ()),
        ("vmbackup_build_info", ("version",)),
    }


def test_a_commit_is_counted_between_10_ms_and_hours(metrics: Metrics) -> None:
    metrics.committed(0.009, merged_bytes=5)
    metrics.committed(20_000, merged_bytes=7)
    assert value(metrics, "vmbackup_commit_duration_seconds_bucket", le="0.01") == 1
    assert value(metrics, "vmbackup_commit_duration_seconds_bucket", le="14400.0") == 1
    assert value(metrics, "vmbackup_commit_duration_seconds_bucket", le="28800.0") == 2
    assert value(metrics, "vmbackup_commit_merged_bytes_total") == 12


def test_how_many_policies_there_are_is_not_a_number_before_they_were_read(metrics: Metrics) -> None:
    assert math.isnan(value(metrics, "vmbackup_policies"))
    metrics.policies(0)
    assert value(metrics, "vmbackup_policies") == 0


def test_what_happened_is_counted(metrics: Metrics) -> None:
    metrics.copied(100)
    metrics.copied(11)
    metrics.finished(Outcome.FAILED)
    metrics.retried(RetryReason.PIVOT_FAILED)
    metrics.phase_left(Phase.COPYING, 2)
    metrics.frozen(0.5)
    metrics.orphans(3)
    samples = scrape(metrics)
    expected: dict[Sample, float] = {
        ("vmbackup_copied_bytes_total", frozenset()): 111,
        ("vmbackup_backups_total", frozenset({("result", "failed")})): 1,
        ("vmbackup_backups_total", frozenset({("result", "succeeded")})): 0,
        ("vmbackup_commit_retries_total", frozenset({("reason", "PivotFailed")})): 1,
        ("vmbackup_phase_duration_seconds_sum", frozenset({("phase", "Copying")})): 2,
        ("vmbackup_freeze_duration_seconds_sum", frozenset()): 0.5,
        ("vmbackup_orphan_overlays", frozenset()): 3,
    }
    assert {sample: samples[sample] for sample in expected} == expected


def test_the_size_and_age_of_an_overlay_are_those_of_the_scrape(metrics: Metrics, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.qcow2"
    overlay.write_bytes(b"")
    metrics.overlay("web-01", "vda", overlay, since=time.time() - 100)
    disk = {"domain": "web-01", "target": "vda"}
    assert value(metrics, "vmbackup_overlay_bytes", **disk) == 0
    overlay.write_bytes(bytes(range(256)) * 4096)
    assert value(metrics, "vmbackup_overlay_bytes", **disk) == overlay.stat().st_blocks * 512 > 0
    assert 0 < (value(metrics, "vmbackup_overlay_free_bytes", **disk) or 0) <= disk_usage(tmp_path).total
    assert 100 <= (value(metrics, "vmbackup_overlay_age_seconds", **disk) or 0) < 200


def test_a_disk_at_home_has_no_overlay_any_more(metrics: Metrics, tmp_path: Path) -> None:
    for target in ("vda", "vdb"):
        metrics.overlay("web-01", target, tmp_path, since=0)
    metrics.overlay_gone("web-01", "vda")
    metrics.overlay_gone("web-01", "never-there")
    shown = {labels for name, labels in scrape(metrics) if name == "vmbackup_overlay_age_seconds"}
    assert shown == {frozenset({("domain", "web-01"), ("target", "vdb")})}


def test_an_overlay_that_cannot_be_seen_does_not_break_a_scrape(metrics: Metrics, tmp_path: Path) -> None:
    metrics.overlay("web-01", "vda", tmp_path / "not-there", since=0)
    disk = {"domain": "web-01", "target": "vda"}
    assert value(metrics, "vmbackup_overlay_bytes", **disk) is None
    assert value(metrics, "vmbackup_overlay_free_bytes", **disk) is None
    assert value(metrics, "vmbackup_overlay_age_seconds", **disk) is not None


def test_a_late_commit_is_shown_until_it_has_converged_or_its_overlay_is_gone(metrics: Metrics) -> None:
    for end in (metrics.converged, metrics.overlay_gone):
        metrics.stalled("web-01", "vda")
        metrics.stalled("web-01", "vdb")
        assert value(metrics, "vmbackup_commit_stalled", domain="web-01", target="vda") == 1
        end("web-01", "vda")
        assert value(metrics, "vmbackup_commit_stalled", domain="web-01", target="vda") is None
        assert value(metrics, "vmbackup_commit_stalled", domain="web-01", target="vdb") == 1


def test_a_suspended_guest_is_shown_until_it_is_resumed(metrics: Metrics) -> None:
    metrics.suspended("web-01", since=time.time() - 100)
    assert 100 <= (value(metrics, "vmbackup_guest_suspended_seconds", domain="web-01") or 0) < 200
    metrics.resumed("web-01")
    assert value(metrics, "vmbackup_guest_suspended_seconds", domain="web-01") is None


def test_the_last_success_is_the_latest_in_whatever_order_they_are_told(metrics: Metrics) -> None:
    for at in (100, 300, 200):
        metrics.succeeded("web-01", at, ended=at)
    assert value(metrics, "vmbackup_last_success_timestamp_seconds", domain="web-01") == 300


def test_a_pause_that_was_asked_for_shows_its_limit(metrics: Metrics) -> None:
    metrics.suspended("web-01", since=0)
    assert value(metrics, "vmbackup_guest_suspended_limit_seconds", domain="web-01") == 0
    metrics.suspended("web-01", since=0, limit=30)
    assert value(metrics, "vmbackup_guest_suspended_limit_seconds", domain="web-01") == 30
    metrics.resumed("web-01")
    assert value(metrics, "vmbackup_guest_suspended_limit_seconds", domain="web-01") is None


def test_a_failure_is_shown_until_a_later_backup_of_the_domain_has_succeeded(metrics: Metrics) -> None:
    def shown() -> float | None:
        return value(metrics, "vmbackup_last_failure_timestamp_seconds", domain="web-01")

    metrics.succeeded("web-01", at=100, ended=150)
    metrics.failed("web-01", at=140)  # as told after a restart, in any order
    assert shown() is None
    metrics.failed("web-01", at=200)
    metrics.failed("web-01", at=180)
    metrics.succeeded("web-02", at=300, ended=300)
    assert shown() == 200
    metrics.succeeded("web-01", at=190, ended=250)  # one that had given up, was taken up again, and is home
    assert shown() is None


def test_of_a_domain_that_is_not_here_nothing_is_told(metrics: Metrics) -> None:
    for domain in ("stays", "goes"):
        metrics.succeeded(domain, at=100, ended=100)
        metrics.failed(domain, at=200)

    def shown() -> set[str]:
        return {dict(labels)["domain"] for name, labels in scrape(metrics) if name.startswith("vmbackup_last_")}

    assert shown() == {"stays", "goes"}
    metrics.domains(["stays"])
    assert shown() == {"stays"}
    metrics.succeeded("goes", at=150, ended=150)
    assert shown() == {"stays"}
    metrics.told("comes", Report())  # since the last look
    metrics.succeeded("comes", at=300, ended=300)
    assert shown() == {"stays", "comes"}
    metrics.domains(["stays", "goes"])
    assert shown() == {"stays", "goes"}


def test_a_running_backup_shows_what_it_does_and_how_far_it_is(metrics: Metrics) -> None:
    disks = tuple(
        DiskReport(target, DiskState.COPYING, copied_bytes=10, total_bytes=100, merged_bytes=1)
        for target in ("vda", "vdb")
    )
    metrics.told("web-01", Report(Phase.PENDING, Reason.PENDING, start_time=5))
    assert value(metrics, "vmbackup_backup_last_progress_timestamp_seconds", domain="web-01") == 5
    metrics.told("web-01", Report(Phase.COPYING, Reason.COPYING, start_time=5, last_progress_time=7, disks=disks))
    states = {labels for name, labels in scrape(metrics) if name == "vmbackup_backup_state"}
    assert states == {frozenset({("domain", "web-01"), ("phase", "Copying"), ("reason", "Copying")})}
    shown = ("last_progress_timestamp_seconds", "copied_bytes", "total_bytes", "merged_bytes")
    assert [value(metrics, f"vmbackup_backup_{name}", domain="web-01") for name in shown] == [7, 20, 200, 2]


@pytest.mark.parametrize("ended", [True, False])
def test_a_backup_that_nobody_runs_any_more_shows_nothing(metrics: Metrics, ended: bool) -> None:
    metrics.told("web-01", Report(Phase.COPYING, Reason.COPYING))
    if ended:
        metrics.told("web-01", Report(Phase.PIVOTED, Reason.SUCCEEDED, outcome=Outcome.SUCCEEDED))
    else:
        metrics.idle("web-01")
    assert not [name for name, labels in scrape(metrics) if name.startswith("vmbackup_backup_") and labels]


def test_a_quarantine_is_shown_until_it_is_lifted_or_its_backup_is_gone(metrics: Metrics) -> None:
    for end in (lambda: metrics.told("web-01", Report()), lambda: metrics.released("web-01")):
        metrics.told("web-01", Report(Phase.FAILED, Reason.QUARANTINED, outcome=Outcome.FAILED))
        metrics.idle("web-01")
        assert value(metrics, "vmbackup_quarantined", domain="web-01") == 1
        end()
        assert value(metrics, "vmbackup_quarantined", domain="web-01") is None


def test_the_lag_is_that_of_the_status_that_waits_longest(metrics: Metrics) -> None:
    assert value(metrics, "vmbackup_report_lag_seconds") == 0
    now = time.time()
    metrics.unreported("uid-1", now - 100)
    metrics.unreported("uid-2", now - 500)
    assert 500 <= (value(metrics, "vmbackup_report_lag_seconds") or 0) < 600
    metrics.unreported("uid-2", None)
    assert 100 <= (value(metrics, "vmbackup_report_lag_seconds") or 0) < 200
    metrics.unreported("uid-1", None)
    assert value(metrics, "vmbackup_report_lag_seconds") == 0


# The server


def served(checks: dict[str, Check], limit: float = 5.0) -> HealthServer:
    return HealthServer(Metrics().registry, checks, host="127.0.0.1", port=0, limit=limit)


def test_it_is_healthy_when_no_check_finds_anything_wrong() -> None:
    with served({"libvirt": lambda: "", "watch": lambda: ""}) as server:
        assert get(server, "/healthz") == (200, "ok\n")


def test_it_says_what_is_wrong_and_only_that() -> None:
    def broken() -> str:
        raise ConnectionError("gone")

    with served({"libvirt": lambda: "no answer since 10:00", "watch": lambda: "", "journal": broken}) as server:
        status, text = get(server, "/healthz")
    assert status == 503
    assert text == "libvirt: no answer since 10:00\njournal: ConnectionError: gone\n"


def test_only_what_a_restart_mends_restarts_it() -> None:
    wrong = {"libvirt": "no answer since 10:00", "event loop": ""}
    checks = {name: partial(wrong.__getitem__, name) for name in wrong}
    with HealthServer(Metrics().registry, checks, host="127.0.0.1", port=0, restart_mends=["event loop"]) as server:
        assert get(server, "/healthz")[0] == 503
        assert get(server, "/livez") == (200, "ok\n")
        wrong["event loop"] = "stuck"
        assert get(server, "/livez") == (503, "event loop: stuck\n")


def test_a_check_that_hangs_is_a_failure_is_not_started_twice_and_delays_nobody() -> None:
    calls: list[int] = []
    release = threading.Event()

    def stuck() -> str:
        calls.append(1)
        release.wait(30)
        return ""

    with served({"stuck": stuck, "fine": lambda: ""}, limit=0.2) as server:
        begun = time.monotonic()
        assert [get(server, "/healthz") for _ in range(2)] == [(503, "stuck: no answer in time\n")] * 2
        assert time.monotonic() - begun < 5
        assert len(calls) == 1
        assert get(server, "/metrics")[0] == 200
        release.set()
        deadline = time.monotonic() + 5
        while get(server, "/healthz")[0] != 200:
            assert time.monotonic() < deadline


def test_prometheus_can_scrape_it() -> None:
    with served({}) as server:
        status, text = get(server, "/metrics")
    assert status == 200
    assert "\nvmbackup_orphan_overlays 0.0\n" in text


def test_there_is_nothing_else() -> None:
    with served({}) as server:
        assert get(server, "/") == (404, "available: /metrics, /healthz, /livez\n")


def test_the_port_is_free_again_afterwards() -> None:
    with served({}) as server:
        port = server.port
    with HealthServer(Metrics().registry, {}, host="127.0.0.1", port=port) as again:
        assert get(again, "/healthz")[0] == 200
