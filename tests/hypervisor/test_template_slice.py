"""Fault 4 of 0.1.0: a template that is a part of a file is refused, and its copy is never called a backup."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sandbox.libvirtd import DiskSpec
from tests.support.backups import BackupFactory
from tests.support.domains import DomainFactory, qemu_img
from vmbackup.api.status import DiskState, Outcome


@pytest.mark.fault(4)
def test_a_disk_over_a_part_of_a_file_is_not_backed_up_and_that_is_said(
    domain: DomainFactory, backup: BackupFactory, tmp_path: Path
):
    template, disk = tmp_path / "t.raw", tmp_path / "a.qcow2"
    template.write_bytes(bytes(32 << 20))
    part = {
        "driver": "raw",
        "offset": 16 << 20,
        "size": 16 << 20,
        "file": {"driver": "file", "filename": str(template)},
    }
    qemu_img("create", "-q", "-f", "qcow2", "-b", f"json:{json.dumps(part)}", "-F", "raw", str(disk))
    guest = domain(more_disks=(DiskSpec("vdb", disk, "qcow2"),))

    named = backup(guest.name, disks=["vdb"]).end()
    assert named.outcome is Outcome.REFUSED
    assert f"has the backing image {template} with <slices>" in named.message

    report = backup(guest.name).end()
    assert report.outcome is Outcome.SUCCEEDED
    left_out = next(each for each in report.disks if each.target == "vdb")
    assert left_out.state is DiskState.SKIPPED
    assert f"has the backing image {template} with <slices>" in left_out.message
