"""Fault 5 of 0.1.0: a user's internal snapshot that is taken during a backup is never deleted with the overlay."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.backups import SLOW, BackupFactory
from tests.support.domains import DomainFactory, qemu_img
from vmbackup.api.status import Outcome


@pytest.mark.fault(5)
def test_an_overlay_that_holds_a_snapshot_is_kept_and_said_until_the_snapshot_is_deleted(
    domain: DomainFactory, backup: BackupFactory
):
    guest = domain({"vda": "qcow2", "vdb": "qcow2"}, size="48M")
    for target in guest.bases:
        guest.write(target, 0x11, length="24M")
    running = backup(guest.name, copy={"bandwidth": SLOW})
    running.wait_for_copying()
    guest.libvirtd.virsh("snapshot-create-as", guest.name, "mine")
    running.edit("copy", bandwidth="10Gi")
    report = running.wait_for(lambda report: report.reason == "WaitingForOthers", "WaitingForOthers")
    assert report.backup_complete is True
    assert "holds a snapshot that was taken during the backup" in report.message
    assert "WaitingForOthers" in running.told.reasons
    overlay = Path(guest.live("vda").source or "")
    assert "mine" in qemu_img("snapshot", "-U", "-l", str(overlay))

    guest.libvirtd.virsh("snapshot-delete", guest.name, "mine")
    assert running.end().outcome is Outcome.SUCCEEDED
    assert not overlay.exists()
    assert guest.live("vda").source == guest.bases["vda"]
    assert guest.holds("vda", 0x11)
