"""Every moment of a backup reaches the right verdict with kubectl wait, Flux (kstatus) and Argo CD."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest

from vmbackup.api.status import DiskReport, DiskState, Outcome, Phase, Reason, Report
from vmbackup.report.status import condition, is_finished, is_significant, render, with_generation

NOW = 1_750_000_000.0


def kstatus(body: Mapping[str, Any]) -> str:
    """The generic rule of cli-utils, pkg/kstatus/status/generic.go, in its order."""
    metadata, status = body["metadata"], body.get("status", {})
    if "deletionTimestamp" in metadata:
        return "Terminating"
    if status.get("observedGeneration", metadata["generation"]) != metadata["generation"]:
        return "InProgress"
    conditions = status.get("conditions", [])
    for known in conditions:
        if known["type"] == "Reconciling" and known["status"] == "True":
            return "InProgress"
        if known["type"] == "Stalled" and known["status"] == "True":
            return "Failed"
    for known in conditions:
        if known["type"] == "Ready":
            return "Current" if known["status"] == "True" else "InProgress"
    return "Current"


def argo_cd(status: Mapping[str, Any]) -> str:
    """The health check that ESO's Lua has, and ours will have."""
    ready = condition(status, "Ready").get("status")
    return {"True": "Healthy", "False": "Degraded"}.get(ready or "", "Progressing")


@dataclass(frozen=True)
class Moment:
    """A row of the table: what is known, and what is to be seen of it. T, F, U: True, False, Unknown."""

    name: str
    report: Report
    ready: str
    backup_complete: str
    chain_clean: str
    reconciling: str
    stalled: str
    verdict: str

    def __str__(self) -> str:
        return self.name


RUNNING = Report(backup_complete=None, chain_clean=True)
ON_OVERLAY = replace(RUNNING, chain_clean=False, chain_reason=Reason.OVERLAY_ACTIVE)
FAILED = replace(RUNNING, phase=Phase.FAILED, outcome=Outcome.FAILED)
COPY_FAILED = {"backup_complete": False, "backup_reason": Reason.COPY_FAILED}

MOMENTS = [
    Moment(
        "queued",
        replace(RUNNING, reason=Reason.QUEUED),
        *("Unknown Queued", "U", "T", "T", "F", "InProgress"),
    ),
    Moment(
        "refused",
        replace(FAILED, reason="DomainNotRunning", outcome=Outcome.REFUSED, backup_complete=False, chain_clean=True),
        *("False DomainNotRunning", "F DomainNotRunning", "T", "F", "T", "Failed"),
    ),
    Moment(
        "refused, the chain not looked at",
        replace(FAILED, reason="StoreNotFound", outcome=Outcome.REFUSED, backup_complete=False, chain_clean=None),
        *("False StoreNotFound", "F StoreNotFound", "U", "F", "T", "Failed"),
    ),
    Moment(
        "adopting another's overlay",
        replace(ON_OVERLAY, reason=Reason.ADOPTING_OVERLAY),
        *("Unknown AdoptingOverlay", "U", "F OverlayActive", "T", "F", "InProgress"),
    ),
    Moment(
        "snapshot",
        replace(ON_OVERLAY, phase=Phase.SNAPSHOTTING, reason=Reason.SNAPSHOTTING),
        *("Unknown Snapshotting", "U", "F OverlayActive", "T", "F", "InProgress"),
    ),
    Moment(
        "copy",
        replace(ON_OVERLAY, phase=Phase.COPYING, reason=Reason.COPYING),
        *("Unknown Copying", "U", "F OverlayActive", "T", "F", "InProgress"),
    ),
    Moment(
        "copy failed",
        replace(ON_OVERLAY, phase=Phase.COMMITTING, reason=Reason.BRINGING_CHAIN_HOME, **COPY_FAILED),
        *("Unknown BringingChainHome", "F CopyFailed", "F OverlayActive", "T", "F", "InProgress"),
    ),
    Moment(
        "copy failed, chain home",
        replace(FAILED, reason=Reason.COPY_FAILED, **COPY_FAILED),
        *("False CopyFailed", "F CopyFailed", "T", "F", "T", "Failed"),
    ),
    Moment(
        "commit retry",
        replace(
            ON_OVERLAY,
            phase=Phase.COMMITTING,
            reason=Reason.COMMIT_RETRYING,
            backup_complete=True,
            chain_reason=Reason.COMMIT_FAILED,
        ),
        *("Unknown CommitRetrying", "T Stored", "F CommitFailed", "T", "F", "InProgress"),
    ),
    Moment(
        "shipping",
        replace(RUNNING, phase=Phase.PIVOTED, reason=Reason.SHIPPING),
        *("Unknown Shipping", "U", "T ChainHome", "T", "F", "InProgress"),
    ),
    Moment(
        "done",
        replace(RUNNING, phase=Phase.PIVOTED, outcome=Outcome.SUCCEEDED, backup_complete=True),
        *("True Succeeded", "T Stored", "T ChainHome", "F", "F", "Current"),
    ),
    Moment(
        "guest off on its overlay",
        replace(ON_OVERLAY, phase=Phase.COMMITTING, reason=Reason.DOMAIN_OFF, backup_complete=True),
        *("Unknown DomainOff", "T Stored", "F OverlayActive", "T", "F", "InProgress"),
    ),
    Moment(
        "gave up, the copy complete",
        replace(
            FAILED,
            reason=Reason.COMMIT_LIMIT_REACHED,
            backup_complete=True,
            chain_clean=False,
            chain_reason=Reason.COMMIT_FAILED,
        ),
        *("False CommitLimitReached", "T Stored", "F CommitFailed", "F", "T", "Failed"),
    ),
    Moment(
        "gave up, the copy failed",
        replace(FAILED, reason=Reason.COMMIT_LIMIT_REACHED, chain_clean=False, **COPY_FAILED),
        *("False CommitLimitReached", "F CopyFailed", "F OverlayActive", "F", "T", "Failed"),
    ),
    Moment(
        "quarantine",
        replace(FAILED, reason=Reason.QUARANTINED, chain_clean=False, chain_reason=Reason.QUARANTINED),
        *("False Quarantined", "U", "F Quarantined", "F", "T", "Failed"),
    ),
    Moment(
        "shipping failed",
        replace(FAILED, reason=Reason.SHIPPING_FAILED, backup_complete=False),
        *("False ShippingFailed", "F ShippingFailed", "T ChainHome", "F", "T", "Failed"),
    ),
]


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
        short, _, reason = words.partition(" ")
        known = condition(status, kind)
        assert known["status"] == {"T": "True", "F": "False", "U": "Unknown"}.get(short, short), kind
        assert not reason or known["reason"] == reason, kind
    assert status["phase"] == moment.report.phase


@pytest.mark.parametrize("moment", MOMENTS, ids=str)
def test_a_moment_reaches_the_right_verdict(moment: Moment) -> None:
    status = rendered(moment.report)
    assert kstatus({"metadata": {"generation": 3}, "status": status}) == moment.verdict
    assert argo_cd(status) == {"InProgress": "Progressing", "Failed": "Degraded", "Current": "Healthy"}[moment.verdict]
    assert is_finished(status) == (moment.verdict != "InProgress")


@pytest.mark.parametrize("moment", MOMENTS, ids=str)
def test_no_moment_is_both_reconciling_and_stalled_and_every_condition_can_be_stored(moment: Moment) -> None:
    status = rendered(moment.report)
    assert {condition(status, kind)["status"] for kind in ("Reconciling", "Stalled")} != {"True"}
    for known in status["conditions"]:
        assert known["reason"]
        assert known["reason"].isalnum()
        assert known["observedGeneration"] == 3


def test_a_change_that_no_agent_has_seen_is_in_progress_to_kstatus() -> None:
    status = rendered(replace(RUNNING, phase=Phase.PIVOTED, outcome=Outcome.SUCCEEDED, backup_complete=True))
    edited = {"metadata": {"generation": 4}, "status": status}
    assert kstatus(edited) == "InProgress"
    assert kstatus({**edited, "status": with_generation(status, 4)}) == "Current"
    assert [known["observedGeneration"] for known in with_generation(status, 4)["conditions"]] == [4] * 5


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
