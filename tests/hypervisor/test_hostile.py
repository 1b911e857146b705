"""Images that somebody has made to harm, on real domains: what libvirt's chain or a path leads to is not copied."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import uuid4

import pytest

from tests.support.backups import SLOW, BackupFactory, RunningBackup, spec_of
from tests.support.domains import Domain, DomainFactory, qemu_img
from vmbackup.api.identity import BackupId
from vmbackup.api.status import Outcome
from vmbackup.protocol.terms import Power
from vmbackup.reconcile.node import Node
from vmbackup.reconcile.steps.step import Ending

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


def test_a_disk_whose_path_climbs_out_of_the_image_roots_is_refused(
    rooted: Node, domain: DomainFactory, backup: BackupFactory, tmp_path: Path
) -> None:
    (tmp_path / "beside").mkdir()
    guest = domain(directory=rooted.image_roots[0] / ".." / "beside")
    assert "/images/../beside/" in guest.live().source
    assert_refused(backup(guest.name), guest, "ImageOutsideRoots", "/images/../beside/")


@pytest.mark.parametrize("climbs", ["{images}/../shadow", "../../shadow"], ids=["absolute", "relative"])
def test_a_backing_file_whose_path_climbs_out_of_the_image_roots_is_refused(
    rooted: Node, domain: DomainFactory, backup: BackupFactory, secret: Path, climbs: str
) -> None:
    guest = domain({"vda": "qcow2"}, directory=rooted.image_roots[0], start=False)
    backing = climbs.format(images=rooted.image_roots[0])
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", backing, "-F", "raw", guest.bases["vda"])
    guest.libvirtd.virsh("start", guest.name, "--paused")
    assert_refused(backup(guest.name), guest, "ImageOutsideRoots", "/../shadow is not in")
    assert secret.read_bytes().startswith(b"root:")


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
    spec = spec_of(guest.name)
    report = RunningBackup(node, BackupId("tests", "planted", uid), spec, tmp_path / "store").end()
    assert (report.outcome, report.reason) == (Outcome.REFUSED, "OverlayExists")
    assert guest.live().source == guest.persistent().source == guest.bases["vda"]
    assert secret.read_bytes().startswith(b"root:")
    assert planted.is_symlink()


@pytest.mark.parametrize("planted", ["a FIFO", "a link to a device"])
def test_what_takes_the_place_of_an_overlay_keeps_nobody_waiting_and_is_neither_merged_nor_deleted(
    domain: DomainFactory, backup: BackupFactory, planted: str
) -> None:
    guest = domain()
    guest.write("vda", 0x11, length="16M")
    running = backup(guest.name, copy={"bandwidth": SLOW}, commit={"offline": True})
    running.wait_for_copying()
    guest.write("vda", 0x22, "1M", "1M")
    guest.libvirtd.virsh("destroy", guest.name)
    overlay = Path(running.record.disks[0].overlay)
    overlay.rename(overlay.with_suffix(".aside"))
    os.mkfifo(overlay) if planted == "a FIFO" else overlay.symlink_to("/dev/zero")
    running.edit("copy", bandwidth="10Gi")
    report = running.wait_for(lambda report: bool(report.backup_complete), "copied")
    running.ask(stop=True)
    assert running.ending is Ending.INTERRUPTED
    assert report.chain_clean is False
    assert guest.persistent().source == str(overlay)
    assert os.path.lexists(overlay)
    with Path(guest.bases["vda"]).open("rb") as base:
        assert base.read(2 << 20) == b"\x11" * (2 << 20), "something was merged into the base"


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
    assert guest.guest.state()[0] is Power.PAUSED  # as it was before
    assert not any(b"secret" in file.read_bytes() for file in tmp_path.rglob("*.nvram"))


@pytest.mark.fault(10)
def test_a_guest_cannot_forbid_the_backup_of_another_by_what_it_writes_into_its_raw_disk(
    domain: DomainFactory, backup: BackupFactory
) -> None:
    victim = domain({"vda": "qcow2"}, size="16M")
    other = domain({"vda": "raw"}, start=False, size="16M")
    evil = other.directory / "evil.qcow2"
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", victim.bases["vda"], "-F", "qcow2", str(evil), "16M")
    Path(other.bases["vda"]).write_bytes(evil.read_bytes())
    assert backup(victim.name).end().outcome is Outcome.SUCCEEDED
