"""The guest stops, restarts, dies or is redefined in the middle of its backup."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sandbox.libvirtd import Libvirtd
from tests.chaos.proof import Witness, assert_told
from tests.chaos.steps import comes_home, hurry, in_a_commit, in_a_copy
from tests.chaos.windows import CaughtCall
from tests.support.backups import BackupFactory, RunningBackup
from tests.support.domains import wait_until
from tests.support.tiers import in_chaos
from vmbackup.api.status import Outcome, Phase
from vmbackup.hypervisor import chain

BOTH = ["vda", "vdb"]


def power_off_from_inside(witness: Witness) -> None:
    witness.guest.shut_down()


def pull_the_plug(witness: Witness) -> None:
    witness.guest.destroy()


def reboot_from_inside(witness: Witness) -> None:
    witness.libvirtd.virsh("reboot", witness.name, "--mode", "agent")


def press_reset(witness: Witness) -> None:
    witness.libvirtd.virsh("reset", witness.name)


@pytest.mark.scenario(13)
@pytest.mark.misfortune("power-off, destroy")
@pytest.mark.parametrize(
    ("begun", "stop"),
    [
        (in_a_copy, power_off_from_inside),
        (in_a_commit, pull_the_plug),
        in_chaos(in_a_copy, pull_the_plug),
        in_chaos(in_a_commit, power_off_from_inside),
    ],
)
def test_a_guest_that_stops_waits_on_its_overlay_and_comes_home_when_it_starts(
    witness: Witness, backup: BackupFactory, begun: Callable[..., RunningBackup], stop: Callable[[Witness], None]
) -> None:
    """Scenario 13: the overlay is what counts; the copy of the frozen base goes on without the guest."""
    running = begun(witness, backup)
    stop(witness)
    running.edit("copy", bandwidth="10Gi")
    report = running.wait_for(lambda report: report.reason == "DomainOff" and bool(report.backup_complete), "DomainOff")
    for target in BOTH:
        assert f"disk {target}: {running.record.disk(target).overlay}" in report.message
    assert "when it starts" in report.message
    witness.prove(running, left=BOTH)
    witness.guest.start()
    comes_home(witness, running)


@pytest.mark.misfortune("reboot, reset")
@pytest.mark.parametrize(
    ("begun", "again"),
    [
        (in_a_copy, press_reset),
        (in_a_commit, reboot_from_inside),
        in_chaos(in_a_copy, reboot_from_inside),
        in_chaos(in_a_commit, press_reset),
    ],
)
def test_a_guest_that_boots_again_boots_from_its_overlay_and_still_comes_home(
    witness: Witness, backup: BackupFactory, begun: Callable[..., RunningBackup], again: Callable[[Witness], None]
) -> None:
    boots = len(witness.guest.starts("vda"))
    running = begun(witness, backup)
    assert witness.written()["vda"] == running.record.disk("vda").overlay
    again(witness)
    wait_until(lambda: len(witness.guest.starts("vda")) > boots, "it boots again", seconds=60)
    comes_home(witness, running)


@pytest.mark.scenario(14)
@pytest.mark.vulnerability("V11")
@pytest.mark.usefixtures("short_barrier")
def test_qemu_dies_in_the_pivot_and_the_guest_starts_on_what_holds_everything(
    witness: Witness, backup: BackupFactory, libvirtd: Libvirtd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """V11: off, P=B, O left behind, a pivot intended: O is done with. The other disk is still on its overlay."""
    pivot = CaughtCall(monkeypatch, witness.name, "pivoting vda", sent=True)
    running = backup(witness.name)
    pivot.wait()
    libvirtd.kill_guest(witness.name)
    pivot.lose()
    running.wait_for(lambda report: report.reason == "DomainOff", "DomainOff")
    gone = Path(running.record.disk("vda").overlay)
    running.wait_for(lambda _: not gone.exists(), "the overlay that is done with goes")
    witness.prove(running, left=["vdb"])
    witness.guest.start()
    comes_home(witness, running)


@pytest.mark.scenario(2)
@pytest.mark.vulnerability("V12")
@pytest.mark.usefixtures("short_barrier")
def test_everything_dies_between_the_definitions_of_two_disks_and_the_backup_fails_but_nothing_is_lost(
    witness: Witness, backup: BackupFactory, libvirtd: Libvirtd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """V12: vda starts on its overlay, vdb on its base, whose empty overlay goes."""
    snapshot = CaughtCall(monkeypatch, witness.name, "taking the snapshot", sent=True)
    running = backup(witness.name)
    snapshot.wait()
    libvirtd.kill()
    libvirtd.kill_guest(witness.name)
    definition = libvirtd.config_dir / f"{witness.name}.xml"
    base = running.record.disk("vdb").persistent_disk_xml
    definition.write_text(chain.with_images(definition.read_text(), {"vdb": base}))
    libvirtd.start()
    snapshot.lose()
    running.wait_for(lambda report: report.backup_complete is False, "the backup has failed")
    witness.prove(running, left=["vda"])
    witness.guest.start()
    comes_home(witness, running, Outcome.FAILED)
    assert f"vdb ({witness.bases['vdb']})" in running.report.message


@pytest.mark.scenario(17)
@pytest.mark.misfortune("undefine")
def test_a_guest_that_is_undefined_in_the_middle_comes_home_before_it_stops(
    witness: Witness, backup: BackupFactory, libvirtd: Libvirtd
) -> None:
    """Scenario 17: now it is transient, and only its live definition counts.

    libvirt 9.0 itself writes the file of the definition again at the pivot, though the domain stays transient.
    """
    running = in_a_commit(witness, backup)
    libvirtd.virsh("undefine", witness.name)
    hurry(running)
    assert running.end().outcome is Outcome.SUCCEEDED, running.report
    assert "Persistent:     no" in libvirtd.virsh("dominfo", witness.name), "it was defined again by us"
    witness.guest.define()
    witness.prove(running)


@pytest.mark.scenario(16)
def test_what_a_user_changes_in_the_definition_meanwhile_stays_changed(
    witness: Witness, backup: BackupFactory, libvirtd: Libvirtd, tmp_path: Path
) -> None:
    """Scenario 16: only the images of our disks are ours; here memory, a note and another option of the same disk."""
    running = in_a_copy(witness, backup)
    xml = libvirtd.virsh("dumpxml", witness.name, "--inactive")
    assert "<currentMemory unit='KiB'>131072</currentMemory>" in xml
    changed = xml.replace("<currentMemory unit='KiB'>131072<", "<currentMemory unit='KiB'>130048<")
    changed = changed.replace("</name>", "</name><description>mine</description>", 1)
    definition = tmp_path / "changed.xml"
    definition.write_text(
        changed.replace("<target dev='vdb' bus='virtio'/>", "<target dev='vdb' bus='virtio'/><serial>x</serial>")
    )
    libvirtd.virsh("define", str(definition))
    comes_home(witness, running)
    after = libvirtd.virsh("dumpxml", witness.name, "--inactive")
    assert "<currentMemory unit='KiB'>130048</currentMemory>" in after
    assert "<description>mine</description>" in after


@pytest.mark.scenario(15)
def test_a_user_who_puts_the_definition_back_to_base_while_the_guest_is_off_is_warned_before_it_starts(
    witness: Witness, backup: BackupFactory
) -> None:
    """Scenario 15: the guest would start without its newest writes. Nothing is touched; put right, it comes home."""
    running = in_a_commit(witness, backup)
    xml = witness.libvirtd.virsh("dumpxml", witness.name, "--inactive")
    witness.guest.destroy()
    running.wait_for(lambda report: report.reason == "DomainOff", "DomainOff")
    witness.guest.define()
    report = running.wait_for(lambda report: report.reason == "Quarantined", "Quarantined")
    assert report.phase is Phase.FAILED
    for words in ("disk vda", witness.bases["vda"], running.record.disk("vda").overlay, "do not start it"):
        assert words in report.message
    for target in BOTH:
        overlay = Path(running.record.disk(target).overlay)
        registry = running.node.metrics.registry
        assert_told(witness.name, target, overlay, report, running.told.events, registry)
    put_right = witness.guest.console_log.with_suffix(".again.xml")
    put_right.write_text(xml)
    witness.libvirtd.virsh("define", str(put_right))
    witness.guest.start()
    comes_home(witness, running)
    assert "QuarantineLifted" in running.told.reasons
