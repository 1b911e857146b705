"""What a sceptical reading of the reconciler found: each of these once lost time, room or a verdict."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox.libvirtd import Libvirtd
from tests.support.backups import SLOW, BackupFactory
from tests.support.domains import DomainFactory, wait_until
from vmbackup.api.status import Outcome, Phase
from vmbackup.hypervisor.hypervisor import Hypervisor
from vmbackup.imaging.locks import hold_reader_lock
from vmbackup.protocol.record import Snapshot
from vmbackup.protocol.terms import Power
from vmbackup.reconcile.node import Node
from vmbackup.reconcile.state.journal import Journal


def test_a_configuration_directory_that_is_not_libvirts_refuses_the_backup(
    domain: DomainFactory,
    backup: BackupFactory,
    hypervisor: Hypervisor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a pod that mounts the wrong one: each definition succeeds, and is never to be found on disk."""
    guest = domain()
    monkeypatch.setattr(hypervisor, "config_dir", tmp_path)
    report = backup(guest.name).end(seconds=30)
    assert (report.outcome, report.reason) == (Outcome.REFUSED, "ConfigNotDurable")


def test_a_transient_domain_that_is_defined_in_the_middle_of_its_backup_comes_home(
    domain: DomainFactory, backup: BackupFactory, libvirtd: Libvirtd, tmp_path: Path
) -> None:
    guest = domain(persistent=False)
    guest.write("vda", 0x11, length="8M")
    running = backup(guest.name, copy={"bandwidth": SLOW})
    running.wait_for_copying()
    xml = tmp_path / "live.xml"
    xml.write_text(libvirtd.virsh("dumpxml", guest.name))
    libvirtd.virsh("define", str(xml))
    running.edit("copy", bandwidth="10Gi")
    report = running.end()
    assert report.outcome is Outcome.SUCCEEDED, report
    assert guest.persistent().source == guest.bases["vda"]


def test_a_base_that_another_domain_names_by_a_relative_path_is_refused(
    domain: DomainFactory, backup: BackupFactory
) -> None:
    other, guest = domain({"vda": "qcow2"}, start=False), domain({"vda": "qcow2"})
    relative = f"../{guest.directory.name}/{Path(guest.bases['vda']).name}"
    over = ["-b", relative, "-F", "qcow2", other.bases["vda"]]
    subprocess.run(["qemu-img", "create", "-q", "-u", "-f", "qcow2", *over, "64M"], check=True)
    report = backup(guest.name).end()
    assert (report.outcome, report.reason) == (Outcome.REFUSED, "BaseInUse")


@pytest.mark.scenario(9)
def test_a_base_into_which_another_backup_has_begun_to_commit_is_never_copied(
    domain: DomainFactory, backup: BackupFactory, node: Node
) -> None:
    """The other one had adopted the overlay of this one, which did not run, and was stopped; the job has ended."""
    guest = domain()
    guest.write("vda", 0x11, length="8M")
    running = backup(guest.name, copy={"bandwidth": SLOW})
    running.wait_for_copying()
    running.ask(stop=True)
    running.end()
    adopted = replace(running.record.with_disk("vda", commit_begun=True), uid="another", snapshot=Snapshot.ADOPTED)
    Journal.start(node.state_dir, adopted).close()

    report = backup(guest.name, again=running).end()
    assert (report.phase, report.outcome, report.backup_complete) == (Phase.FAILED, Outcome.FAILED, False)
    assert "had begun before the copy was complete" in report.message
    assert guest.holds("vda", 0x11, length="8M")


def test_a_guest_that_stops_while_suspended_is_not_counted_as_suspended_for_ever(
    domain: DomainFactory, backup: BackupFactory, libvirtd: Libvirtd, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = domain()
    libvirtd.virsh("resume", guest.name)
    monkeypatch.setattr(type(guest.guest), "snapshot", lambda *_: libvirtd.virsh("destroy", guest.name))
    backup(guest.name).end()
    wait_until(lambda: guest.guest.state()[0] is Power.OFF, "off")
    samples = [sample for metric in node.metrics.registry.collect() for sample in metric.samples]
    assert not [sample for sample in samples if sample.name == "vmbackup_guest_suspended_seconds"]


def test_a_backup_that_succeeds_when_tried_again_counts_as_a_success(
    domain: DomainFactory, backup: BackupFactory, node: Node
) -> None:
    guest = domain()
    guest.write("vda", 0x11, length="8M")
    running = backup(guest.name, copy={"bandwidth": "8Mi"}, commit={"backoffLimit": 0})
    running.wait_for_phase(Phase.COPYING)
    with Path(guest.bases["vda"]).open("rb") as reader:
        hold_reader_lock(reader.fileno())  # as a reader that never ends: QEMU cannot write the base
        assert running.end().reason == "CommitLimitReached"
    again = backup(guest.name, again=running, retry="1")
    assert again.end().outcome is Outcome.SUCCEEDED
    registry = node.metrics.registry
    assert registry.get_sample_value("vmbackup_backups_total", {"result": "succeeded"}) == 1
    assert registry.get_sample_value("vmbackup_last_success_timestamp_seconds", {"domain": guest.name})
