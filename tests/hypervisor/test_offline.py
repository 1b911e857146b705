"""commit.offline: the overlay of a guest that is off is merged home, and nothing that it ever wrote is lost."""

from __future__ import annotations

import subprocess

import pytest

from tests.backups import SLOW, BackupFactory, RunningBackup
from tests.domains import Domain, DomainFactory
from tests.storage import sha256sum
from vmbackup.api.status import Outcome

OFFLINE = {"offline": True}


def off_while_copying(guest: Domain, backup: BackupFactory, **commit: object) -> RunningBackup:
    """A backup whose guest has written to its overlay and was stopped; now the copy is completed."""
    for target in guest.bases:
        guest.write(target, 0x11, length="16M")
    running = backup(guest.name, commit=commit, copy={"bandwidth": SLOW})
    running.wait_for_copying()
    for target in guest.bases:
        guest.write(target, 0x22, "1M", "8M")
    guest.libvirtd.virsh("destroy", guest.name)
    running.edit("copy", bandwidth="10Gi")
    return running


def is_home(guest: Domain) -> bool:
    on_base = all(guest.persistent(target).source == base for target, base in guest.bases.items())
    return on_base and not list(guest.directory.glob("*.vmb-*"))


def holds(guest: Domain, target: str, pattern: int, where: str = "1M 8M") -> bool:
    """Whether the image of a guest that is off, with all that is below it, holds this pattern."""
    disk = guest.persistent(target)
    read = ["qemu-io", "-r", "-f", disk.format, "-c", f"read -P {pattern:#x} {where}", str(disk.source)]
    result = subprocess.run(read, capture_output=True, text=True, check=True)
    return "verification failed" not in result.stdout + result.stderr


@pytest.mark.parametrize(
    "disks",
    [{"vda": "raw"}, {"vda": "qcow2"}, {"vda": "chain", "vdb": "raw"}],
    ids=lambda disks: "+".join(disks.values()),
)
def test_a_guest_that_is_off_is_brought_home_without_being_started(
    domain: DomainFactory, backup: BackupFactory, disks: dict[str, str]
) -> None:
    guest = domain(disks)
    templates = list(guest.directory.glob("*-template*"))
    before = [sha256sum(template) for template in templates]
    running = off_while_copying(guest, backup, **OFFLINE)
    report = running.end()
    assert report.outcome is Outcome.SUCCEEDED, report
    assert is_home(guest)
    for target in disks:
        assert holds(guest, target, 0x22), "what was written after the snapshot is lost"
        assert holds(guest, target, 0x11, "0 1M")
        assert holds(guest, target, 0x11, "9M 7M")
    assert [sha256sum(template) for template in templates] == before, "a template was written"
    guest.libvirtd.virsh("start", guest.name, "--paused")
    assert all(guest.holds(target, 0x22, "1M", "8M") for target in disks)
