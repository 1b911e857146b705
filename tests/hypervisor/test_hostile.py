"""Images that somebody has made to harm, on real domains: what libvirt's chain or a path leads to is not copied."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import uuid4

import pytest

from tests.backups import BackupFactory, RunningBackup
from tests.domains import Domain, DomainFactory, qemu_img
from vmbackup.api.status import Outcome
from vmbackup.hypervisor.guest import GuestState
from vmbackup.reconcile.backup import Node
from vmbackup.stores.base import BackupKey

MALLORY = 12345


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """What only root may read; as large as a disk, since libvirt and QEMU look at it too."""
    path = tmp_path / "shadow"
    path.write_bytes(b"root:$6$secret".ljust(64 << 20, b"\0"))
    return path


def assert_refused(running: RunningBackup, guest: Domain, reason: str, says: str) -> None:
    """It is refused, with nothing begun and nothing stored."""
    report = running.end()
    assert (report.outcome, report.reason) == (Outcome.REFUSED, reason)
    assert says in report.message
    assert guest.live().source == guest.persistent().source == guest.bases["vda"]
    assert not list(guest.directory.glob("*.vmb-*"))
    assert not list(running.store.glob("*/*"))


@pytest.fixture
def rooted(node: Node, domain: DomainFactory, tmp_path: Path) -> Node:
    """The node, whose images may be in one directory only."""
    roots = (tmp_path / "images",)
    roots[0].mkdir()
    object.__setattr__(node, "image_roots", roots)
    return node


def test_a_backing_file_outside_the_image_roots_is_refused_though_libvirt_has_followed_it(
    rooted: Node, domain: DomainFactory, backup: BackupFactory, secret: Path
) -> None:
    guest = domain({"vda": "qcow2"}, directory=rooted.image_roots[0], start=False)
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", str(secret), "-F", "raw", guest.bases["vda"])
    guest.libvirtd.virsh("start", guest.name, "--paused")
    assert [below.path for below in guest.live().chain] == [str(secret)]
    assert_refused(backup(guest.name), guest, "ImageOutsideRoots", str(secret))


def test_a_disk_outside_the_image_roots_is_refused_and_one_inside_is_not(
    rooted: Node, domain: DomainFactory, backup: BackupFactory
) -> None:
    outside = domain()
    assert_refused(backup(outside.name), outside, "ImageOutsideRoots", "--image-roots")
    assert backup(domain(directory=rooted.image_roots[0]).name).end().outcome is Outcome.SUCCEEDED


def test_a_link_out_of_the_image_roots_is_seen_through(
    rooted: Node, domain: DomainFactory, backup: BackupFactory, tmp_path: Path
) -> None:
    (rooted.image_roots[0] / "elsewhere").symlink_to(tmp_path)
    guest = domain(directory=rooted.image_roots[0] / "elsewhere")
    assert_refused(backup(guest.name), guest, "ImageOutsideRoots", "--image-roots")


@pytest.mark.parametrize("below", [False, True], ids=["base", "backing"])
def test_a_hard_link_in_the_image_roots_to_a_file_outside_is_refused(
    rooted: Node, domain: DomainFactory, backup: BackupFactory, secret: Path, below: bool
) -> None:
    guest = domain({"vda": "qcow2"} if below else None, directory=rooted.image_roots[0], start=False)
    if below:
        inside = rooted.image_roots[0] / "template"
        inside.hardlink_to(secret)
        qemu_img("rebase", "-u", "-f", "qcow2", "-b", str(inside), "-F", "raw", guest.bases["vda"])
    else:
        (rooted.image_roots[0].parent / "outside").hardlink_to(guest.bases["vda"])
    guest.libvirtd.virsh("start", guest.name, "--paused")
    assert_refused(backup(guest.name), guest, "ImageOutsideRoots", "hard links")


def test_a_disk_whose_directory_another_user_owns_cannot_be_made_to_lead_to_a_secret(
    domain: DomainFactory, backup: BackupFactory, secret: Path
) -> None:
    guest = domain()
    disk = Path(guest.bases["vda"])
    os.chown(guest.directory, MALLORY, MALLORY)
    disk.rename(disk.with_name("aside"))  # QEMU has it open, and writes on
    disk.symlink_to(secret)
    os.chown(disk, MALLORY, MALLORY, follow_symlinks=False)
    assert_refused(backup(guest.name), guest, "SymbolicLink", str(disk))


def test_a_link_that_waits_where_the_overlay_will_be_is_refused(
    node: Node, domain: DomainFactory, secret: Path, tmp_path: Path
) -> None:
    guest, uid = domain(), str(uuid4())
    planted = Path(guest.overlay(uid8=uid[:8]))
    planted.symlink_to(secret)
    spec = {"nodeName": "here", "domain": guest.name, "storeRef": {"name": "store"}}
    report = RunningBackup(node, BackupKey("tests", "planted", uid), spec, tmp_path / "store").end()
    assert (report.outcome, report.reason) == (Outcome.REFUSED, "OverlayExists")
    assert guest.live().source == guest.persistent().source == guest.bases["vda"]
    assert secret.read_bytes().startswith(b"root:")
    assert planted.is_symlink()


def test_uefi_variables_that_lead_to_a_secret_are_not_read_and_the_guest_stays_at_home(
    domain: DomainFactory, backup: BackupFactory, secret: Path, tmp_path: Path
) -> None:
    """The directory of the variables is QEMU's: who breaks out of a guest may put there what he likes."""
    firmware, variables = tmp_path / "code.fd", tmp_path / "vars.fd"
    firmware.write_bytes(bytes(256 << 10))
    variables.write_bytes(bytes(256 << 10))
    loader = f"<loader readonly='yes' type='pflash'>{firmware}</loader><nvram>{variables}</nvram>"
    guest = domain(os_xml=loader)
    variables.unlink()
    variables.symlink_to(secret)
    os.chown(variables, MALLORY, MALLORY, follow_symlinks=False)
    running = backup(guest.name)
    report = running.end()
    assert report.outcome in (Outcome.FAILED, Outcome.REFUSED)
    assert f"the UEFI variables {variables} cannot be kept (Too many levels of symbolic links)" in report.message
    assert guest.live().source == guest.persistent().source == guest.bases["vda"]
    assert guest.guest.state()[0] is GuestState.PAUSED  # as it was before
    assert not any(b"secret" in file.read_bytes() for file in tmp_path.rglob("*.nvram"))
