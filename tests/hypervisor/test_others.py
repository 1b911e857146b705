"""What users do to a guest in the middle of its backup by libvirt's own means is never taken for ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sandbox.libvirtd import Libvirtd
from tests.support.backups import BackupFactory
from tests.support.domains import Domain, DomainFactory, wait_until
from tests.support.kill_points import Driving, Moment, Task, When
from tests.support.survival import task_of
from vmbackup.api.status import Outcome
from vmbackup.hypervisor import chain
from vmbackup.protocol.terms import Mirror
from vmbackup.reconcile.state.journal import record_of

SLOW = "4Mi"
ON_OVERLAY = Moment(When.AFTER, "redefining", 2)  # after the snapshot, before the copy
COMMIT_BEGUN = Moment(When.AFTER, "journal vda.commit_begun")
OFFLINE: dict[str, Any] = {"commit": {"offline": True}}


def left_at(guest: Domain, moment: Moment, spec: dict[str, Any]) -> Task:
    """A backup whose driver was killed there; the task of the next one."""
    task = task_of(guest, spec, moment)
    assert Driving(task).killed()
    return task_of(guest, spec, uid=task.uid)


def commit_by_hand(guest: Domain, target: str, *more: str) -> None:
    guest.libvirtd.virsh("blockcommit", guest.name, target, "--active", *more)
    wait_until(lambda: guest.live(target).mirror is Mirror.READY, "the user's commit is ready")


def overlay_of(task: Task) -> Path:
    record = record_of(task.state_dir, task.uid)
    assert record is not None
    return Path(record.disks[0].overlay)


def test_nobody_commits_to_a_disk_that_waits_for_its_turn_to_be_copied(
    domain: DomainFactory, backup: BackupFactory, libvirtd: Libvirtd
) -> None:
    guest = domain({"vda": "raw", "vdb": "raw"})
    guest.write("vda", 0x11, length="16M")
    running = backup(guest.name, copy={"bandwidth": SLOW})
    running.wait_for_copying()
    with pytest.raises(RuntimeError, match="lock"):
        libvirtd.virsh("blockcommit", guest.name, "vdb", "--active")
    running.edit("copy", bandwidth="10Gi")
    assert running.end().outcome is Outcome.SUCCEEDED


def test_a_base_that_a_user_has_begun_to_commit_to_is_never_taken_for_the_moment_of_the_snapshot(
    domain: DomainFactory,
) -> None:
    guest = domain()
    task = left_at(guest, ON_OVERLAY, {})
    guest.write("vda", 0x22)
    commit_by_hand(guest, "vda")
    report, _, _ = Driving(task).end()
    assert report.outcome is Outcome.FAILED
    assert "somebody else's commit" in report.message
    assert report.chain_clean
    assert not list(guest.directory.glob("*.vmb-*"))
    assert guest.holds("vda", 0x22)


def test_a_commit_to_an_image_below_the_base_is_neither_pivoted_nor_ended(domain: DomainFactory) -> None:
    guest = domain({"vda": "chain"})
    task = left_at(guest, COMMIT_BEGUN, {})
    template = next(guest.directory.glob("*-template.qcow2"))
    commit_by_hand(guest, "vda", "--base", str(template))
    driving = Driving(task)
    assert not driving.ended(3)
    (disk,) = chain.disks(guest.guest.live_xml() or "")
    assert disk.mirror is Mirror.READY
    assert disk.mirror_to == str(template)
    guest.libvirtd.virsh("blockjob", guest.name, "vda", "--abort")
    report, _, _ = driving.end()
    assert report.chain_clean
    assert guest.live("vda").source == guest.bases["vda"]


def test_a_saved_state_keeps_the_overlay_that_it_names(domain: DomainFactory, libvirtd: Libvirtd) -> None:
    guest = domain(size="4M")
    task = left_at(guest, COMMIT_BEGUN, OFFLINE)
    guest.write("vda", 0x22)
    libvirtd.virsh("managedsave", guest.name)
    driving = Driving(task)
    assert not driving.ended(3)
    assert overlay_of(task).exists()
    libvirtd.virsh("start", guest.name)
    report, _, _ = driving.end()
    assert report.chain_clean
    assert not list(guest.directory.glob("*.vmb-*"))
    assert guest.holds("vda", 0x22)
