"""What is known of a backup becomes its status. What Flux and Argo CD make of it: tests/gitops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.support.moments import CODES, MOMENTS, ON_OVERLAY, RUNNING, Moment
from vmbackup.api.resource import condition, is_finished, with_generation
from vmbackup.api.status import DiskReport, DiskState, Outcome, Phase, Reason, Report
from vmbackup.cluster.status import is_significant, render

NOW = 1_750_000_000.0


def rendered(report: Report, **options: Any) -> dict[str, Any]:
    return render(report, **({"generation": 3, "previous": {}, "now": NOW} | options))


@pytest.mark.parametrize("moment", MOMENTS, ids=str)
def test_a_moment_has_its_conditions(moment: Moment) -> None:
    status = rendered(moment.report)
    expected = {
        "Ready": moment.ready,
        "BackupComplete": moment.backup_complete,
        "ChainClean": moment.chain_clean,
        "Reconciling": moment.reconciling,
        "Stalled": moment.stalled,
    }
    for kind, words in expected.items():
        code, _, reason = words.partition(" ")
        known = condition(status, kind)
        assert known["status"] == CODES[code], kind
        assert not reason or known["reason"] == reason, kind
    assert status["phase"] == moment.report.phase


@pytest.mark.parametrize("moment", MOMENTS, ids=str)
def test_ready_is_unknown_exactly_while_it_runs(moment: Moment) -> None:
    assert is_finished(rendered(moment.report)) == (moment.verdict != "InProgress")


@pytest.mark.parametrize("moment", MOMENTS, ids=str)
def test_no_moment_is_both_reconciling_and_stalled_and_every_condition_can_be_stored(moment: Moment) -> None:
    status = rendered(moment.report)
    assert {condition(status, kind)["status"] for kind in ("Reconciling", "Stalled")} != {"True"}
    for known in status["conditions"]:
        assert known["reason"]
        assert known["reason"].isalnum()
        assert known["observedGeneration"] == 3


def test_a_change_after_the_end_is_noted_in_every_condition() -> None:
    status = rendered(replace(RUNNING, phase=Phase.PIVOTED, outcome=Outcome.SUCCEEDED, backup_complete=True))
    noted = with_generation(status, 4)
    assert noted["observedGeneration"] == 4
    assert [known["observedGeneration"] for known in noted["conditions"]] == [4] * 5


def test_the_time_of_a_condition_is_that_of_its_last_change_of_status() -> None:
    copying = rendered(replace(ON_OVERLAY, phase=Phase.COPYING, reason=Reason.COPYING))
    home = rendered(
        replace(RUNNING, phase=Phase.PIVOTED, reason=Reason.SHIPPING), previous=copying, now=NOW + 60, generation=4
    )
    assert condition(home, "Ready")["reason"] == "Shipping"
    assert condition(home, "Ready")["lastTransitionTime"] == "2025-06-15T15:06:40Z"
    assert condition(home, "ChainClean")["lastTransitionTime"] == "2025-06-15T15:07:40Z"


def test_the_default_of_1970_is_replaced_at_the_first_look() -> None:
    ready = {"type": "Ready", "status": "Unknown", "lastTransitionTime": "1970-01-01T00:00:00Z"}
    default = {"observedGeneration": -1, "conditions": [ready]}
    queued = rendered(replace(RUNNING, reason=Reason.QUEUED), previous=default)
    assert condition(queued, "Ready")["lastTransitionTime"] == "2025-06-15T15:06:40Z"


def test_what_is_not_known_is_not_there() -> None:
    assert set(rendered(Report())) == {"observedGeneration", "phase", "message", "conditions"}


def test_what_is_known_is_there() -> None:
    report = Report(
        message="Copying vda.",
        domain_uuid="5a9c4a3e-3d55-4c39-bd2c-5d9c6b1b51a1",
        quiesced=False,
        snapshot_time=NOW + 1.9,
        start_time=NOW,
        completion_time=NOW + 3,
        last_progress_time=NOW + 2,
        last_handled_retry="2",
        location="/store/default/web.1",
    )
    assert rendered(report) | {"conditions": []} == {
        "observedGeneration": 3,
        "phase": "Pending",
        "message": "Copying vda.",
        "conditions": [],
        "domainUUID": "5a9c4a3e-3d55-4c39-bd2c-5d9c6b1b51a1",
        "quiesced": False,
        "snapshotTime": "2025-06-15T15:06:41Z",
        "startTime": "2025-06-15T15:06:40Z",
        "completionTime": "2025-06-15T15:06:43Z",
        "lastProgressTime": "2025-06-15T15:06:42Z",
        "lastHandledRetry": "2",
        "location": "/store/default/web.1",
    }


VDA = DiskReport(
    "vda",
    DiskState.HOME,
    format="raw",
    base="/images/vda.raw",
    overlay="/images/vda.vmb.qcow2",
    copied_bytes=500,
    total_bytes=1000,
    digest="sha256:00",
    merged_bytes=7,
    commit_seconds=0.12345,
    attempts=2,
    last_error="job failed",
)
SDA = DiskReport("sda", DiskState.SKIPPED, message="a CD-ROM drive")


def test_a_disk_is_shown_with_what_is_known_of_it() -> None:
    assert rendered(Report(disks=(VDA, SDA)))["disks"] == [
        {
            "target": "vda",
            "state": "Home",
            "format": "raw",
            "base": "/images/vda.raw",
            "overlay": "/images/vda.vmb.qcow2",
            "copiedBytes": 500,
            "totalBytes": 1000,
            "digest": "sha256:00",
            "mergedBytes": 7,
            "commitSeconds": 0.123,
            "attempts": 2,
            "lastError": "job failed",
        },
        {"target": "sda", "state": "Skipped", "message": "a CD-ROM drive"},
    ]


def test_progress_is_that_of_all_disks_together() -> None:
    vdb = replace(VDA, target="vdb", copied_bytes=0, merged_bytes=3)
    assert rendered(Report(disks=(VDA, vdb, SDA)))["progress"] == {
        "percent": 25,
        "summary": "25%",
        "copiedBytes": 500,
        "totalBytes": 2000,
        "mergedBytes": 10,
    }


@pytest.mark.parametrize(
    ("outcome", "backup_complete", "copied", "total", "percent"),
    [
        (None, None, 0, 0, 0),
        (None, None, 0, 1000, 0),
        (None, None, 999, 1000, 99),
        (None, None, 1000, 1000, 99),  # not verified yet
        (None, True, 1000, 1000, 99),  # not home yet
        (None, True, 0, 0, 99),  # an empty disk
        (Outcome.SUCCEEDED, True, 1000, 1000, 100),
        (Outcome.SUCCEEDED, True, 0, 0, 100),
        (Outcome.FAILED, False, 400, 1000, 40),
    ],
)
def test_nothing_is_at_100_percent_before_all_is_done(
    outcome: Outcome | None, backup_complete: bool | None, copied: int, total: int, percent: int
) -> None:
    disk = replace(VDA, copied_bytes=copied, total_bytes=total)
    report = Report(outcome=outcome, backup_complete=backup_complete, disks=(disk,))
    assert rendered(report)["progress"]["percent"] == percent


def test_a_long_message_is_cut_to_what_can_be_stored() -> None:
    status = rendered(Report(message="x" * 100_000, backup_message="y" * 100_000))
    assert all(len(known["message"]) <= 2000 for known in status["conditions"])
    assert len(status["message"]) == 2000
    assert status["message"].endswith("…")


@pytest.mark.parametrize(
    ("change", "significant"),
    [
        ({"message": "Copying vda, 3 GiB/s."}, False),
        ({"last_progress_time": NOW}, False),
        ({"disks": (VDA,)}, False),
        ({"phase": Phase.COMMITTING}, True),
        ({"reason": Reason.COMMIT_RETRYING}, True),
        ({"backup_complete": True}, True),
        ({"outcome": Outcome.FAILED}, True),
        ({"last_handled_retry": "2"}, True),
    ],
)
def test_only_what_matters_is_reported_at_once(change: dict[str, Any], significant: bool) -> None:
    before = rendered(ON_OVERLAY)
    assert is_significant(before, rendered(replace(ON_OVERLAY, **change), previous=before)) is significant
