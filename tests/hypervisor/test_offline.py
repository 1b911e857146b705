"""commit.offline: the overlay of a guest that is off is merged home, and nothing that it ever wrote is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.backups import SLOW, BackupFactory, RunningBackup, spec_of
from tests.support.domains import Domain, DomainFactory, qemu_img, wait_until, what_is_wrong_with
from tests.support.storage import mounted, run, sha256sum
from vmbackup.api.identity import BackupId
from vmbackup.api.status import Outcome
from vmbackup.hypervisor import chain
from vmbackup.imaging.locks import has_writer, hold_reader_lock, is_locked
from vmbackup.protocol.record import Copy
from vmbackup.reconcile.node import Node
from vmbackup.reconcile.state.journal import Journal
from vmbackup.reconcile.steps.step import Ending

OFFLINE = {"offline": True}


def off_while_copying(guest: Domain, backup: BackupFactory, **commit: object) -> RunningBackup:
    """A backup whose guest has written to its overlay and was stopped; now the copy is being completed."""
    running = stopped_while_copying(guest, backup, **commit)
    running.edit("copy", bandwidth="10Gi")
    return running


def stopped_while_copying(guest: Domain, backup: BackupFactory, **commit: object) -> RunningBackup:
    for target in guest.bases:
        guest.write(target, 0x11, length="16M")
    running = backup(guest.name, commit=commit, copy={"bandwidth": SLOW})
    running.wait_for_copying()
    for target in guest.bases:
        guest.write(target, 0x22, "1M", "8M")
    guest.libvirtd.virsh("destroy", guest.name)
    return running


def is_home(guest: Domain) -> bool:
    on_base = all(guest.persistent(target).source == base for target, base in guest.bases.items())
    sound = not any(what_is_wrong_with(Path(base)) for base in guest.bases.values())
    return on_base and not list(guest.directory.glob("*.vmb-*")) and sound


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


def test_a_guest_cannot_start_while_it_is_merged_and_starts_with_everything_afterwards(
    domain: DomainFactory, backup: BackupFactory
) -> None:
    guest = domain()
    running = off_while_copying(guest, backup, bandwidth="4Mi", **OFFLINE)
    overlay = overlay_of(running)
    wait_until(lambda: has_writer(overlay), "merging")
    with pytest.raises(RuntimeError, match='Failed to get "write" lock'):
        guest.libvirtd.virsh("start", guest.name)
    assert "it cannot start until that is done" in running.report.message
    assert running.end().outcome is Outcome.SUCCEEDED
    assert is_home(guest)
    guest.libvirtd.virsh("start", guest.name, "--paused")
    assert guest.holds("vda", 0x22, "1M", "8M")


def test_a_base_that_somebody_reads_is_merged_into_when_they_have_done(
    domain: DomainFactory, backup: BackupFactory
) -> None:
    guest = domain()
    running = stopped_while_copying(guest, backup, **OFFLINE)
    with Path(guest.bases["vda"]).open("rb") as reader:
        hold_reader_lock(reader.fileno())
        running.edit("copy", bandwidth="10Gi")
        report = running.wait_for(lambda report: report.reason == "CommitRetrying", "tried again")
        assert guest.bases["vda"] in report.message
    assert running.end().outcome is Outcome.SUCCEEDED
    assert is_home(guest)
    assert holds(guest, "vda", 0x22)


def test_a_full_file_system_of_the_base_leaves_the_overlay_in_charge_until_there_is_room(
    domain: DomainFactory, node: Node, tmp_path: Path
) -> None:
    overlays = tmp_path / "overlays"
    overlays.mkdir()
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=20m", "tmpfs") as small:
        guest = domain(directory=small)
        spec = spec_of(guest.name)
        spec |= {"copy": {"bandwidth": SLOW}, "commit": OFFLINE | {"backoffLimit": 1}}
        guest.write("vda", 0x11, length="16M")
        key = BackupId("tests", "backup", str(uuid.uuid4()))
        running = RunningBackup(replace(node, overlay_dir=overlays), key, spec, tmp_path / "store")
        running.wait_for_copying()
        guest.write("vda", 0x22, "8M", "24M")
        guest.libvirtd.virsh("destroy", guest.name)
        running.edit("copy", bandwidth="10Gi")
        report = running.end()
        assert (report.reason, report.backup_complete, report.chain_clean) == ("CommitLimitReached", True, False)
        assert "No space left on device" in report.message
        assert guest.bases["vda"] in report.message
        assert guest.persistent().source == str(overlay_of(running))
        guest.libvirtd.virsh("start", guest.name, "--paused")
        assert guest.holds("vda", 0x22, "8M", "24M")
        guest.libvirtd.virsh("destroy", guest.name)

        run("mount", "-o", "remount,size=80m", str(small))
        again = RunningBackup(running.node, key, spec, tmp_path / "store", retry="1")
        assert again.end().outcome is Outcome.SUCCEEDED
        assert is_home(guest)
        assert not list(overlays.iterdir())
        assert holds(guest, "vda", 0x22, "8M 24M")
        assert holds(guest, "vda", 0x11, "0 8M")


def test_deleted_while_its_guest_is_off_it_goes_home_before_it_is_released(
    domain: DomainFactory, backup: BackupFactory
) -> None:
    guest = domain()
    running = off_while_copying(guest, backup, bandwidth="4Mi", **OFFLINE)
    wait_until(lambda: has_writer(overlay_of(running)), "merging")
    running.ask(deleted=True)
    assert running.ending is Ending.RELEASED
    assert is_home(guest)
    assert holds(guest, "vda", 0x22)
    assert not list(running.node.state_dir.glob("*.journal"))


def test_an_orphan_goes_home_while_its_guest_is_off(domain: DomainFactory, backup: BackupFactory) -> None:
    guest = domain()
    running = off_while_copying(guest, backup)
    running.wait_for(lambda report: report.reason == "DomainOff", "DomainOff")
    running.ask(deleted=True)
    assert running.ending is Ending.RELEASED
    assert running.record.orphan

    backup(guest.name, again=running, commit=OFFLINE).end()
    assert not running.record.orphan
    assert is_home(guest)
    assert holds(guest, "vda", 0x22)


def test_told_to_stop_it_ends_the_merge_and_the_next_run_merges_again(
    domain: DomainFactory, backup: BackupFactory
) -> None:
    guest = domain()
    running = off_while_copying(guest, backup, bandwidth=SLOW, **OFFLINE)
    overlay = overlay_of(running)
    wait_until(lambda: has_writer(overlay), "merging")
    running.ask(stop=True)
    assert running.ending is Ending.INTERRUPTED
    assert not is_locked(overlay)
    assert backup(guest.name, again=running, commit=OFFLINE).end().outcome is Outcome.SUCCEEDED
    assert is_home(guest)
    assert holds(guest, "vda", 0x22)


def overlay_of(running: RunningBackup) -> Path:
    return Path(running.record.disks[0].overlay)


@pytest.fixture
def compares_slowly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The image is large and its medium slow: qemu-img compares it until this file is there."""
    done, real = tmp_path / "compared", shutil.which("qemu-img")
    slow = tmp_path / "slow" / "qemu-img"
    slow.parent.mkdir()
    waits = f'if [ "$1" = compare ]; then while [ ! -e {done} ]; do sleep 0.05; done; fi'
    slow.write_text(f'#!/bin/sh\n{waits}\nexec {real} "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow.parent}:{os.environ['PATH']}")
    return done


def off_in_a_pivot(guest: Domain, backup: BackupFactory) -> RunningBackup:
    """QEMU has died in a pivot, and so has the run: P names the base, which holds all that the overlay does."""
    running = stopped_while_copying(guest, backup)
    running.ask(stop=True)
    assert running.ending is Ending.INTERRUPTED
    disk = running.record.disk("vda")
    qemu_img("commit", "-q", "-d", disk.overlay)
    guest.guest.define(chain.with_images(guest.guest.persistent_xml() or "", {"vda": disk.persistent_disk_xml}))
    pivoting = running.record.with_disk("vda", commit_begun=True, pivot_intended=True, settled=None)
    Journal.start(running.node.state_dir, replace(pivoting, copy=Copy.FAILED, copy_error="not needed here")).close()
    return running


def comparing(guest: Domain, backup: BackupFactory, died: RunningBackup) -> RunningBackup:
    running = backup(guest.name, again=died)
    running.wait_for(lambda report: "is being compared with its base" in report.message, "told")
    wait_until(lambda: is_locked(overlay_of(running)) and is_locked(Path(guest.bases["vda"])), "comparing")
    return running


def test_told_to_stop_it_ends_a_comparison_and_a_guest_can_start(
    domain: DomainFactory, backup: BackupFactory, compares_slowly: Path
) -> None:
    guest = domain()
    running = comparing(guest, backup, off_in_a_pivot(guest, backup))
    assert (running.report.reason, running.report.chain_clean) == ("Committing", False)
    running.ask(stop=True)
    assert running.ending is Ending.INTERRUPTED
    assert not is_locked(overlay_of(running))
    guest.libvirtd.virsh("start", guest.name, "--paused")
    assert guest.holds("vda", 0x22, "1M", "8M")


def test_a_backup_deleted_during_a_comparison_is_released_when_its_overlay_is_home(
    domain: DomainFactory, backup: BackupFactory, compares_slowly: Path
) -> None:
    guest = domain()
    running = comparing(guest, backup, off_in_a_pivot(guest, backup))
    running.ask(deleted=True)
    compares_slowly.touch()
    assert running.ending is Ending.RELEASED
    assert is_home(guest)
    assert holds(guest, "vda", 0x22)
