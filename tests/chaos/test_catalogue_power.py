"""The power fails at any moment of a backup, or soon after it: nothing that a guest has flushed is lost."""

from __future__ import annotations

import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.guest import Guest as WritingGuest
from sandbox.guest import make_disk as make_ext4
from sandbox.oracle import prove
from tests.chaos.power import SLOW, Machine, PoweredGuest, committing, copying, machine, wait_for_record
from tests.support.kill_points import Driving, Moment, Task, When
from tests.support.tiers import in_chaos
from vmbackup.api.status import Outcome, Report

SAMPLE = [
    Moment(When.AFTER, "taking the snapshot"),  # QEMU writes the overlay, and no file says so for certain: V1
    in_chaos(Moment(When.DURING, "taking the snapshot")),
    in_chaos(Moment(When.AFTER, "resuming")),  # and the guest writes it
    Moment(When.BEFORE, "pivoting vda"),  # V5
    in_chaos(Moment(When.AFTER, "pivoting vda")),
    Moment(When.AFTER, "resuming", 2),  # the guest writes base: V3
    Moment(When.AFTER, "remove an overlay", 2),  # V4
]


@pytest.fixture(scope="module")
def powered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with machine(tmp_path_factory.mktemp("machine")) as made:
        yield made


@pytest.fixture(scope="module")
def guests() -> list[PoweredGuest]:
    return []


@pytest.fixture
def guest(powered: Machine, guests: list[PoweredGuest], tmp_path: Path) -> PoweredGuest:
    """The same for all tests, unless one has spoilt it."""
    if not guests or any(guests[-1].not_at_home()):
        guests.append(PoweredGuest(powered, tmp_path, f"powered-{len(guests)}"))
    return guests[-1]


@pytest.mark.vulnerability("V1", "V5")
@pytest.mark.parametrize("moment", SAMPLE, ids=str)
def test_a_power_cut_within_a_backup_loses_nothing(guest: PoweredGuest, moment: Moment) -> None:
    report = carried_on_after_a_cut(guest, at(guest, moment))
    assert report.outcome is Outcome.SUCCEEDED, report


def test_a_power_cut_in_the_middle_of_a_copy_loses_nothing(guest: PoweredGuest) -> None:
    driving = Driving(guest.task(uid(), copy=SLOW))
    wait_for_record(driving, copying)
    guest.write(3)
    report = carried_on_after_a_cut(guest, driving)
    assert report.outcome is Outcome.SUCCEEDED, report


def test_a_power_cut_in_the_middle_of_a_commit_loses_nothing(guest: PoweredGuest) -> None:
    driving = Driving(guest.task(uid(), copy={"bandwidth": "4Mi"}, commit=SLOW))
    wait_for_record(driving, copying)
    guest.fill(0x22)
    guest.write(3)
    wait_for_record(driving, committing)
    guest.write(3)
    report = carried_on_after_a_cut(guest, driving)
    assert report.outcome is Outcome.SUCCEEDED, report


@pytest.mark.vulnerability("V3", "V4")
@pytest.mark.parametrize("seconds", [0, in_chaos(3)])
def test_a_power_cut_after_a_backup_loses_nothing(guest: PoweredGuest, seconds: float) -> None:
    task = guest.task(uid())
    Driving(task).end()
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        guest.write()
        time.sleep(0.1)
    guest.machine.cut()
    guest.machine.power_on()
    guest.start()
    report = carried_on(guest, task.uid)
    assert report.outcome is Outcome.SUCCEEDED, report


def test_the_plain_procedure_loses_the_guest_in_the_same_cut(powered: Machine, tmp_path: Path) -> None:
    """Else nothing would be proven by the tests above."""
    guest = PoweredGuest(powered, tmp_path, "plain")
    virsh = powered.libvirtd.virsh
    specs = [f"--diskspec={target},file={base}.plain.qcow2" for target, base in guest.bases.items()]
    virsh("snapshot-create-as", guest.name, "plain", "--disk-only", "--atomic", "--no-metadata", *specs)
    for target, base in guest.bases.items():
        guest.write()
        virsh("blockcommit", guest.name, target, "--active", "--base", base, "--pivot", "--wait")
    for base in guest.bases.values():
        Path(f"{base}.plain.qcow2").unlink()
    guest.write(3)
    powered.cut()
    powered.power_on()
    with pytest.raises((RuntimeError, AssertionError), match=r"plain\.qcow2|back in time"):
        guest.start()
    virsh("undefine", guest.name)


def test_a_linux_guest_goes_on_behind_its_last_record_after_a_power_cut(powered: Machine, tmp_path: Path) -> None:
    disks = [make_ext4(target, powered.images / f"linux-{target}.raw", size_mib=32) for target in ("vda", "vdb")]
    guest = WritingGuest(powered.libvirtd.virsh, "linux", tmp_path, disks)
    guest.define()
    guest.start()
    guest.wait_for(3)
    powered.sync()
    libvirtd, directory = powered.libvirtd, powered.state / "linux"
    directory.mkdir()
    task = Task(libvirtd.uri, libvirtd.config_dir, directory, guest.name, (), uid(), boot=powered.boot)
    report, _, _ = Driving(task).end()
    assert report.outcome is Outcome.SUCCEEDED, report
    guest.wait_for_more(3)
    powered.cut()
    powered.power_on()
    guest.start()
    guest.wait_for_more(3)
    guest.destroy()
    guest.assert_only_rising()
    for disk in disks:
        prove(Path(disk.path), acknowledged_at_least=guest.acknowledged(disk.target))
    libvirtd.virsh("undefine", guest.name)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_a_power_cut_at_any_moment_of_a_backup_loses_nothing(powered: Machine, tmp_path: Path) -> None:
    guest = PoweredGuest(powered, tmp_path, "any-moment")
    _, moments, _ = Driving(guest.task(uid())).end()
    ends: Counter[str] = Counter()
    for moment in moments:
        driving = Driving(guest.task(uid(), moment))
        if not driving.wait_until_held():  # when a job is READY, and so the order of some steps, differs
            ends["did not come by"] += 1
            continue
        if moment.when is When.DURING:
            driving.let_go()
        report = carried_on_after_a_cut(guest, driving)
        ends[str(report.outcome)] += 1
        shutil.rmtree(driving.task.directory / "store")  # else the store is full after a few
        assert report.outcome is Outcome.SUCCEEDED, f"{moment}: {report}"
    print(f"{len(moments)} moments: {dict(ends)}")
    assert ends["did not come by"] <= len(moments) // 10


def uid() -> str:
    return str(uuid.uuid4())


def at(guest: PoweredGuest, moment: Moment) -> Driving:
    """A backup that is held at this moment."""
    driving = Driving(guest.task(uid(), moment))
    assert driving.wait_until_held(), f"{moment} did not come by"
    if moment.when is When.DURING:
        driving.let_go()
    return driving


def carried_on_after_a_cut(guest: PoweredGuest, driving: Driving) -> Report:
    """Cut the power; the guest starts from what is left, and only then the agent. Its last report."""
    guest.machine.cut(driving)
    guest.machine.power_on()
    guest.start()
    return carried_on(guest, driving.task.uid)


def carried_on(guest: PoweredGuest, backup: str) -> Report:
    """Let another agent carry on this backup to its end."""
    task = guest.task(backup)
    report, _, reasons = Driving(task).end()
    wrong = list(guest.wrong(task, report))
    assert not wrong, f"{'; '.join(wrong)}; {report}, {reasons}"
    return report
