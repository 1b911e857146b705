"""Overlays on a small file system: a backup is refused, or its copy given up, before the guest has no room to write."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sandbox.libvirtd import Libvirtd
from tests.support.backups import SLOW, RunningBackup, spec_of
from tests.support.domains import Domain, DomainFactory
from tests.support.storage import mounted
from vmbackup.api.identity import BackupId
from vmbackup.api.status import Outcome, Phase
from vmbackup.hypervisor.hypervisor import Hypervisor
from vmbackup.protocol.terms import Power
from vmbackup.reconcile.admission.plan import Planner
from vmbackup.reconcile.admission.survey import survey
from vmbackup.reconcile.node import Node

MIB = 1 << 20
STEP = 2  # MiB that the guest writes at once


@pytest.fixture
def overlays(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 MiB for overlays."""
    with mounted(tmp_path / "overlays", "-t", "tmpfs", "-o", "size=96m", "tmpfs") as directory:
        yield directory


def start(node: Node, overlays: Path, guest: Domain, store: Path, **spec: Any) -> RunningBackup:
    key = BackupId("tests", "backup", str(uuid.uuid4()))
    return RunningBackup(replace(node, overlay_dir=overlays), key, spec_of(guest.name, **spec), store)


def test_a_copy_is_given_up_before_a_guest_that_writes_much_fills_its_overlays_file_system(
    domain: DomainFactory, node: Node, overlays: Path, tmp_path: Path, libvirtd: Libvirtd
) -> None:
    guest = domain(size="256M")
    libvirtd.virsh("resume", guest.name)
    guest.write("vda", 0x11, length="16M")
    running = start(node, overlays, guest, tmp_path / "store", copy={"bandwidth": SLOW})
    running.wait_for_copying()
    written = 0
    while running.report.phase is Phase.COPYING:
        guest.write("vda", 0x22, f"{written}M", f"{STEP}M")  # raises where the overlay cannot grow
        written += STEP
        assert guest.guest.state()[0] is not Power.IO_ERROR
    report = running.end()

    assert written > 40, "given up too early"
    assert (report.outcome, report.backup_reason) == (Outcome.FAILED, "OverlaySpaceLow")
    assert str(overlays) in report.backup_message
    assert "--overlay-dir" in report.backup_message
    assert "OverlaySpaceLow" in running.told.reasons
    assert report.chain_clean
    assert not list(overlays.iterdir())
    assert guest.guest.state()[0] is Power.RUNNING
    assert guest.live().source == guest.bases["vda"]
    assert guest.holds("vda", 0x22, "0", f"{written}M")


def test_a_backup_without_room_for_all_its_overlays_is_refused_and_check_says_the_same(
    domain: DomainFactory, node: Node, overlays: Path, tmp_path: Path, hypervisor: Hypervisor
) -> None:
    guest = domain({"vda": "raw", "vdb": "raw"}, size="1G")
    (overlays / "others").write_bytes(bytes(40 * MIB))
    report = start(node, overlays, guest, tmp_path / "store").end()
    assert (report.outcome, report.reason) == (Outcome.REFUSED, "NoRoomForOverlay")
    assert f"{overlays} has 56 MiB free; the overlays of vda, vdb need 64 MiB" in report.message
    assert guest.live().source == guest.bases["vda"]

    (found,) = survey(Planner(hypervisor, overlays), [guest.guest], [])
    assert [(refusal.reason, refusal.message) for refusal in found.refusals] == [(report.reason, report.message)]
