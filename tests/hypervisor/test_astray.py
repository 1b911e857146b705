"""Fault 51 of 0.1.0: QEMU opens base by its name three times; the name may lead to another file at that moment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.backups import BackupFactory
from tests.support.domains import DomainFactory
from vmbackup.api.status import Outcome
from vmbackup.hypervisor.guest import Guest
from vmbackup.reconcile.leftovers.reader import read_leftovers


def while_the_name_leads_elsewhere(base: Path, call: Callable[..., Any]) -> Callable[..., Any]:
    """The call, during which another tool has put a copy in the place of base, as rsync and mv do."""

    def swapped(*arguments: Any, **options: Any) -> Any:
        original = base.rename(base.with_name("original"))
        base.write_bytes(original.read_bytes())
        try:
            return call(*arguments, **options)
        finally:
            original.replace(base)

    return swapped


@pytest.mark.fault(51)
@pytest.mark.parametrize("call", ["snapshot", "commit", "pivot"])
def test_a_guest_whose_qemu_has_another_file_than_base_open_is_never_called_home(
    domain: DomainFactory, backup: BackupFactory, monkeypatch: pytest.MonkeyPatch, call: str
):
    guest = domain({"vda": "raw"}, size="8M")
    guest.libvirtd.virsh("resume", guest.name)
    base = Path(guest.bases["vda"])
    guest.write("vda", 0x11)
    monkeypatch.setattr(Guest, call, while_the_name_leads_elsewhere(base, getattr(Guest, call)))
    running = backup(guest.name)
    report = running.wait_for(lambda report: report.reason == "Quarantined", "Quarantined")
    assert "QEMU does not write the file" in report.message
    assert report.chain_clean is False
    (overlay,) = guest.directory.glob("*.vmb-*")

    guest.write("vda", 0x22, offset="2M")  # what the guest writes now is only where QEMU writes it
    new = guest.directory / "saved.raw"  # as the message advises
    if call == "pivot":
        guest.libvirtd.virsh(
            "blockcopy", guest.name, "vda", str(new), "--format", "raw", "--wait", "--pivot", "--transient-job"
        )
        assert guest.holds("vda", 0x22, offset="2M")
        overlay.rename(overlay.with_name("moved-away"))
        assert running.end().outcome is not None


def test_a_backup_of_an_undisturbed_guest_sees_qemus_locks_on_the_very_file(
    domain: DomainFactory, backup: BackupFactory
):
    guest = domain({"vda": "raw", "vdb": "qcow2"}, size="8M")
    running = backup(guest.name)
    assert running.end().outcome is Outcome.SUCCEEDED
    assert all(disk.base_locked for disk in running.record.disks)


@pytest.mark.fault(51)
def test_a_disk_that_a_lost_backup_left_on_its_overlay_has_an_identity_again(domain: DomainFactory):
    guest = domain({"vda": "raw"}, size="8M")
    guest.snapshot("vda")
    (disk,) = read_leftovers(guest.guest).disks([])
    assert disk.base_locked
    assert disk.base_inode == Path(guest.bases["vda"]).stat().st_ino
