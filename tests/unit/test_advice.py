"""What a human is told names the disk, the files that matter, and what to do next."""

from __future__ import annotations

import pytest

from vmbackup.protocol import advice
from vmbackup.protocol.record import DiskRecord, Record

DISK = DiskRecord("vda", base="/images/web.raw", overlay="/images/web.vmb-1.qcow2")
TOLD = {
    "overlay gone": (advice.overlay_gone(DISK), "put it back"),
    "images differ": (advice.images_differ(DISK), "virsh edit"),
    "overlay left, off": (advice.overlay_left_off(DISK), "do not start it"),
    "gone from here": (advice.gone_from_here(DISK), "define the domain again"),
    "overlay left, on": (advice.overlay_left_on(DISK), "move the overlay away"),
    "written elsewhere": (advice.written_elsewhere(DISK, DISK.overlay), "shut the guest down and start it again"),
    "written to a foreign image": (advice.written_to_foreign_image(DISK), "set it in the domain's definition"),
    "overlay in use": (advice.overlay_in_use(DISK), "lsof"),
    "lost by libvirt": (advice.lost_by_libvirt(DISK), "shut it down from within"),
    "job unknown": (advice.job_unknown(DISK), "shut the guest down and start it again"),
    "foreign image": (advice.foreign_image(DISK), "virsh blockcommit"),
    "base changed": (advice.base_changed(DISK), "Put the original back"),
    "written astray": (advice.written_astray(DISK, on_base=True), "virsh blockcopy"),
    "holds a snapshot": (advice.holds_snapshot(DISK), "virsh snapshot-delete"),
    "foreign definition": (advice.foreign_definition(DISK), "virsh edit"),
    "foreign job": (advice.foreign_job(DISK), "virsh blockjob"),
    "image changed": (advice.image_changed(DISK), "create a new VMBackup"),
    "no room": (advice.no_room([DISK]), "free space"),
    "disks apart": (advice.disks_apart([DISK]), "create a new VMBackup"),
    "commit begun": (advice.commit_begun(DISK), "create a new VMBackup"),
    "foreign commit": (advice.foreign_commit(DISK), "create a new VMBackup"),
    "commit failed": (advice.commit_failed(DISK, "no"), "lsof"),
}


@pytest.mark.parametrize(("told", "cure"), TOLD.values(), ids=TOLD.keys())
def test_it_names_disk_file_and_cure(told: str, cure: str) -> None:
    assert DISK.overlay in told or DISK.base in told
    assert cure in told


def test_who_is_to_name_an_image_is_told_how_the_chain_below_it_stays_whole() -> None:
    named = [told for told, cure in TOLD.values() if "virsh edit" in told or cure == "define the domain again"]
    assert len(named) == 6
    assert all("no <backingStore>" in told for told in named)


def test_every_advice_is_in_this_table() -> None:
    functions = [name for name, each in vars(advice).items() if getattr(each, "__module__", "") == advice.__name__]
    assert len(functions) == len(TOLD) + 5  # and those of the whole domain, below


def test_a_guest_that_stays_frozen_is_named_with_its_cure() -> None:
    assert "virsh domfsthaw web" in advice.stays_frozen("web")


def test_a_guest_that_is_off_is_to_be_started_unless_it_runs_elsewhere() -> None:
    assert advice.start(saved=False) == "start the guest: it is off on its overlay"
    assert "saved state" in advice.start(saved=True)
    assert "spec.nodeName" in advice.not_here(Record("uid", "default", "nightly", domain="web"))
    assert "virsh undefine" in advice.migrated(Record("uid", "default", "nightly", domain="web"))


def test_a_job_of_the_whole_domain_is_named_with_its_cure() -> None:
    assert "virsh domjobinfo web" in advice.migrating(Record("uid", "default", "nightly", domain="web"))
