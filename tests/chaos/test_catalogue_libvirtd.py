"""libvirtd dies within its calls, or is stopped: scenarios of docs/protocol.md that are libvirt's own doing."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox.libvirtd import Libvirtd
from tests.chaos.conftest import Stage
from tests.chaos.proof import Witness
from tests.chaos.steps import comes_home, hurry, in_a_commit, in_a_copy
from tests.chaos.windows import (
    CaughtCall,
    dies_before_the_mirror,
    dies_having_pivoted,
    dies_having_switched,
    dies_with_a_mirror_of_no_kind,
)
from tests.support.backups import SLOW, BackupFactory, RunningBackup, spec_of
from tests.support.domains import naming, wait_until
from tests.support.tiers import in_chaos
from vmbackup.api.identity import BackupId
from vmbackup.api.status import Outcome, Phase
from vmbackup.hypervisor import connection
from vmbackup.hypervisor.hypervisor import Hypervisor
from vmbackup.reconcile.node import Node
from vmbackup.reconcile.steps.step import Ending

STANDSTILL_SECONDS = 60


def cold_restart(witness: Witness) -> None:
    """What the message of such a quarantine asks for."""
    witness.guest.shut_down()
    witness.guest.start()
    witness.guest.wait_for_agent()


def is_quarantined(running: RunningBackup, *words: str) -> None:
    """Wait until it is, with the guest running and told what to do."""
    report = running.wait_for(lambda report: report.reason == "Quarantined", "Quarantined")
    assert report.phase is Phase.FAILED
    assert all(word in report.message for word in words), report.message
    assert ("Quarantined", report.chain_message) in running.told.events


@pytest.mark.scenario(3)
@pytest.mark.vulnerability("V9")
@pytest.mark.usefixtures("short_barrier")
def test_switched_by_qemu_but_saved_by_no_one_the_guest_starts_on_its_overlay_and_comes_home(
    witness: Witness, backup: BackupFactory, libvirtd: Libvirtd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scenario 3, V9: killed in the snapshot, libvirtd comes back with every XML naming a base that is stale."""
    snapshot = CaughtCall(monkeypatch, witness.name, "taking the snapshot")
    running = backup(witness.name)
    snapshot.wait()
    dies_having_switched(libvirtd, witness.name, {disk.target: disk.overlay for disk in running.record.disks})
    snapshot.lose()
    overlay = running.record.disk("vda").overlay
    is_quarantined(running, f"disk vda: QEMU writes {overlay}", "shut the guest down and start it again")
    witness.prove(running, left=["vda", "vdb"])
    assert {witness.source("vda"), witness.source("vdb")} == set(witness.bases.values())
    cold_restart(witness)
    assert running.end().outcome is Outcome.SUCCEEDED
    assert "QuarantineLifted" in running.told.reasons
    witness.prove(running)


@pytest.mark.misfortune("libvirtd dies in a user's snapshot")
@pytest.mark.usefixtures("short_barrier")
def test_switched_in_a_snapshot_of_a_users_own_the_guest_comes_home_by_what_the_messages_advise(
    witness: Witness, backup: BackupFactory, libvirtd: Libvirtd, tmp_path: Path
) -> None:
    """libvirt 9.0 dies in a snapshot where a definition is changed meanwhile: no XML names what the guest writes."""
    running = in_a_copy(witness, backup)
    theirs = Path(witness.bases["vda"]).with_name(f"theirs-{uuid.uuid4()}.qcow2")
    dies_having_switched(libvirtd, witness.name, {"vda": str(theirs)})
    is_quarantined(
        running, f"disk vda: QEMU writes neither {witness.bases['vda']}", "set it in the domain's definition"
    )
    witness.guest.wait_for_more(2)

    assert str(theirs) in libvirtd.virsh("qemu-monitor-command", witness.name, "--hmp", "info block")
    file = tmp_path / "definition.xml"
    file.write_text(naming(libvirtd.virsh("dumpxml", witness.name, "--inactive"), "vda", theirs))
    libvirtd.virsh("define", str(file))
    cold_restart(witness)
    assert witness.written()["vda"] == str(theirs)
    hurry(running)
    running.wait_for(lambda report: "virsh blockcommit" in report.message, "what to do with their image")
    libvirtd.virsh("blockcommit", witness.name, "vda", "--active", "--shallow", "--pivot", "--wait")
    comes_home(witness, running)
    theirs.unlink()


@pytest.mark.vulnerability("V8")
@pytest.mark.usefixtures("short_barrier")
def test_pivoted_by_qemu_but_saved_by_no_one_the_guest_runs_on_until_its_restart(
    witness: Witness, backup: BackupFactory, libvirtd: Libvirtd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """V8: killed in the pivot, libvirtd believes for ever in a mirror that is ready, and names the overlay."""
    pivot = CaughtCall(monkeypatch, witness.name, "pivoting vda")
    running = backup(witness.name)
    pivot.wait()
    dies_having_pivoted(libvirtd, witness.name, "vda")
    pivot.lose()
    is_quarantined(running, f"disk vda: QEMU writes {witness.bases['vda']}", "shut the guest down and start it again")
    assert witness.written() == witness.bases | {"vdb": witness.source("vdb")}
    witness.guest.wait_for_more(2)
    cold_restart(witness)
    assert running.end().outcome is Outcome.SUCCEEDED
    witness.prove(running)


@pytest.mark.vulnerability("V10")
@pytest.mark.usefixtures("short_barrier")
def test_a_commit_whose_mirror_libvirt_does_not_know_is_pivoted_at_its_end(
    witness: Witness, backup: BackupFactory, libvirtd: Libvirtd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """V10: killed while it started the commit, libvirtd never shows it READY."""
    commit = CaughtCall(monkeypatch, witness.name, "starting the commit of vda", sent=True)
    running = backup(witness.name, commit={"bandwidth": "1Mi"})
    commit.wait()
    dies_before_the_mirror(libvirtd, witness.name, "vda")
    commit.lose()
    wait_until(lambda: running.record.call is None, "the answer was lost")
    running.edit("commit", bandwidth="10Gi")
    report = running.end()
    assert report.outcome is Outcome.SUCCEEDED, report
    assert all(disk.attempts == 1 for disk in report.disks), "it was the same job to the end"
    witness.prove(running)


@pytest.mark.misfortune("libvirt forgets a guest that runs")
@pytest.mark.parametrize("offline", [False, in_chaos(True)])
def test_a_guest_that_libvirt_has_forgotten_keeps_its_overlay_and_comes_home_once_a_human_has_ended_it(
    witness: Witness, backup: BackupFactory, libvirtd: Libvirtd, offline: bool
) -> None:
    """Found by the soak: killed as it saved a job, libvirt takes a domain for off whose QEMU runs on."""
    running = in_a_commit(witness, backup)
    running.edit("commit", offline=offline)
    dies_with_a_mirror_of_no_kind(libvirtd, witness.name)
    overlay = Path(running.record.disk("vda").overlay)
    advice = f"a process has {overlay} open (lsof)"
    running.wait_for(lambda report: advice in report.message, "advice")
    assert witness.name not in libvirtd.virsh("list", "--name").split()
    witness.guest.wait_for_more(2)
    assert overlay.exists()
    assert running.report.chain_clean is False
    assert libvirtd.kill_guests_that_libvirt_has_lost() == 1
    witness.guest.start()
    comes_home(witness, running)


@pytest.fixture
def wide_backup(
    node: Node, libvirtd: Libvirtd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[BackupFactory]:
    """Starts backups of which some may be held in a call while the others go on."""
    monkeypatch.setattr(connection, "_SLOTS", 10)
    wide = Hypervisor(libvirtd.uri, config_dir=libvirtd.config_dir)

    def start(domain: str, **spec: object) -> RunningBackup:
        key = BackupId("tests", domain, str(uuid.uuid4()))
        return RunningBackup(replace(node, hypervisor=wide), key, spec_of(domain, **spec), tmp_path / "store")

    yield start
    wide.close()


@pytest.mark.scenario(12)
@pytest.mark.vulnerability("V6", "V7")
@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_a_libvirtd_that_is_stopped_for_a_minute_loses_nothing_whatever_the_backups_are_doing(
    stage: Stage, wide_backup: BackupFactory, libvirtd: Libvirtd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """V6, V7, R4: the calls in flight are carried out when it goes on, long after everybody has given them up."""
    copying, committing, switching, deleted, suspended, pivoting = stage.witnesses(6, monkeypatch)
    calls = [
        CaughtCall(monkeypatch, witness.name, name)
        for witness, name in [
            (switching, "taking the snapshot"),
            (deleted, "taking the snapshot"),
            (suspended, "suspending"),
            (pivoting, "pivoting vda"),
        ]
    ]
    slow = {"copy": {"bandwidth": SLOW}}
    runs = {
        copying: wide_backup(copying.name, **slow),
        committing: wide_backup(committing.name, commit={"bandwidth": SLOW}, **slow),
    }
    runs[committing].wait_for_copying()
    committing.write_tail("vda", 0x5A)
    runs[committing].edit("copy", bandwidth="10Gi")
    runs |= {witness: wide_backup(witness.name) for witness in (switching, deleted, suspended, pivoting)}
    for call in calls:
        call.wait()
    runs[copying].wait_for_copying()
    runs[committing].wait_for(lambda report: any(disk.merged_bytes for disk in report.disks), "committing")

    libvirtd.stop_signal()
    try:
        for call in calls:
            call.send()
        runs[deleted].ask(deleted=True)
        runs[suspended].ask(deleted=True)
        time.sleep(STANDSTILL_SECONDS)
    finally:
        libvirtd.cont()
    runs[copying].edit("copy", bandwidth="10Gi")
    runs[committing].edit("commit", bandwidth="10Gi")

    for witness in (deleted, suspended):
        assert runs[witness].ending is Ending.RELEASED
        witness.prove()
    for witness in (copying, committing, switching, pivoting):
        assert runs[witness].end().outcome is Outcome.SUCCEEDED, runs[witness].report
        witness.prove(runs[witness])
    for witness in (switching, deleted, suspended, pivoting):
        assert "UnknownOutcome" in runs[witness].told.reasons
