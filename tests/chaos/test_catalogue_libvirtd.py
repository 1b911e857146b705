"""libvirtd dies within its calls, or stands still: scenarios of FACTS and PROTOCOL that are libvirt's own doing."""

from __future__ import annotations

from functools import partial

import pytest

from sandbox.libvirtd import Libvirtd
from tests.backups import BackupFactory, RunningBackup
from tests.chaos.proof import Witness
from tests.chaos.windows import LostCall, dies_before_the_mirror, dies_having_pivoted, dies_having_switched
from tests.domains import wait_until
from vmbackup.api.status import Outcome, Phase
from vmbackup.hypervisor.guest import Guest
from vmbackup.reconcile import clock


@pytest.fixture
def no_call_outlives_libvirtd(monkeypatch: pytest.MonkeyPatch) -> None:
    """A libvirtd that is dead carries out nothing any more: PROTOCOL R4's 31 s are not waited for."""
    monkeypatch.setattr(clock, "BARRIER_SECONDS", 1.0)


def cold_restart(witness: Witness) -> None:
    """What the message of such a quarantine asks for."""
    witness.guest.shut_down()
    witness.guest.start()
    witness.guest.wait_for_agent()


def is_quarantined(running: RunningBackup, message: str) -> None:
    """Wait until it is, with the guest running and told what to do."""
    report = running.wait_for(lambda report: report.reason == "Quarantined", "Quarantined")
    assert report.phase is Phase.FAILED
    assert message in report.message
    assert ("Quarantined", report.chain_message) in running.told.events


@pytest.mark.usefixtures("no_call_outlives_libvirtd")
def test_switched_by_qemu_but_saved_by_no_one_the_guest_starts_on_its_overlay_and_comes_home(
    witness: Witness, backup: BackupFactory, libvirtd: Libvirtd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scenario 3, V9: killed in the snapshot, libvirtd comes back with every XML naming a base that is stale."""
    snapshot = LostCall(monkeypatch, "snapshot")
    running = backup(witness.name)
    snapshot.wait()
    dies_having_switched(libvirtd, witness.name, {disk.target: disk.overlay for disk in running.record.disks})
    snapshot.lose()
    is_quarantined(running, "shut the guest down and start it again")
    witness.prove(running, left=["vda", "vdb"])
    assert {witness.source("vda"), witness.source("vdb")} == set(witness.bases.values())
    cold_restart(witness)
    assert running.end().outcome is Outcome.SUCCEEDED
    assert "QuarantineLifted" in running.told.reasons
    witness.prove(running)


@pytest.mark.usefixtures("no_call_outlives_libvirtd")
def test_pivoted_by_qemu_but_saved_by_no_one_the_guest_runs_on_until_its_restart(
    witness: Witness, backup: BackupFactory, libvirtd: Libvirtd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """V8: killed in the pivot, libvirtd believes for ever in a mirror that is ready, and names the overlay."""
    pivot = LostCall(monkeypatch, "pivot")
    running = backup(witness.name)
    pivot.wait()
    dies_having_pivoted(libvirtd, witness.name, "vda")
    pivot.lose()
    is_quarantined(running, "shut the guest down and start it again")
    assert witness.written() == witness.bases | {"vdb": witness.source("vdb")}
    witness.guest.wait_for_more(2)
    cold_restart(witness)
    assert running.end().outcome is Outcome.SUCCEEDED
    witness.prove(running)


@pytest.mark.usefixtures("no_call_outlives_libvirtd")
def test_a_commit_whose_mirror_libvirt_does_not_know_is_pivoted_at_its_end(
    witness: Witness, backup: BackupFactory, libvirtd: Libvirtd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """V10: killed while it started the commit, libvirtd never shows it READY."""
    commit = LostCall(monkeypatch, "commit", partial(Guest.commit, bandwidth=1 << 20))
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
