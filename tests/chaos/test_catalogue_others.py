"""Others use the same disks: jobs, overlays, readers, a second agent; and the clock jumps."""

from __future__ import annotations

import subprocess
import time
import uuid
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from sandbox.libvirtd import Libvirtd
from tests.chaos.proof import Witness
from tests.chaos.steps import comes_home, hurry, in_a_commit, in_a_copy
from tests.chaos.windows import CaughtCall
from tests.support.backups import BackupFactory
from tests.support.domains import wait_until
from tests.support.kill_points import Driving, Interruption, Moment, Task, When
from tests.support.tiers import in_chaos
from vmbackup.api.status import DiskState, Outcome, Report
from vmbackup.errors import TransientError
from vmbackup.hypervisor.guest import Guest
from vmbackup.imaging.locks import hold_reader_lock


def mirror_elsewhere(witness: Witness, target: str, to: Path) -> None:
    """A block job of somebody else, which ends only when it is aborted."""
    arguments = ["--path", target, "--dest", str(to), "--format", "qcow2", "--transient-job"]
    witness.libvirtd.virsh("blockcopy", witness.name, *arguments)


def is_all_that_is_left(report: Report, target: str, reason: str) -> bool:
    """Every other disk is home, and this one is not, for this reason."""
    away = [disk.target for disk in report.disks if disk.state is not DiskState.HOME]
    return away == [target] and report.reason == reason


def end_mirror(witness: Witness, target: str) -> None:
    witness.libvirtd.virsh("blockjob", witness.name, target, "--abort")


def test_a_block_job_of_somebody_else_is_waited_for_and_never_ended(
    witness: Witness, backup: BackupFactory, tmp_path: Path
) -> None:
    """Scenario 18, before the backup: on one of its disks."""
    mirror_elsewhere(witness, "vdb", tmp_path / "mirror.qcow2")
    running = backup(witness.name)
    report = running.wait_for(lambda report: report.reason == "WaitingForOthers", "WaitingForOthers")
    assert "disk vdb: another block job is running" in report.message
    assert "virsh blockjob" in report.message
    assert not witness.overlays()
    end_mirror(witness, "vdb")
    comes_home(witness, running)


def test_a_block_job_that_somebody_starts_in_the_middle_only_delays_the_way_home(
    witness: Witness, backup: BackupFactory, tmp_path: Path
) -> None:
    """Scenario 18, during the copy: on the overlay."""
    running = in_a_copy(witness, backup)
    mirror_elsewhere(witness, "vdb", tmp_path / "mirror.qcow2")
    hurry(running)
    report = running.wait_for(lambda report: is_all_that_is_left(report, "vdb", "WaitingForOthers"), "vdb alone")
    assert "disk vdb: another block job is running" in report.message
    assert report.backup_complete
    witness.prove(running, left=["vdb"])
    end_mirror(witness, "vdb")
    comes_home(witness, running)


def test_a_job_of_the_whole_domain_is_waited_for(witness: Witness, backup: BackupFactory, tmp_path: Path) -> None:
    """Scenario 21: as during a migration, of which this is the kind that stays where it is."""
    pull = tmp_path / "pull.xml"
    pull.write_text(
        f"<domainbackup mode='pull'><server transport='unix' socket='{tmp_path}/nbd'/><disks><disk name='vda' "
        "backup='no'/><disk name='vdb' type='file'>"
        f"<scratch file='{tmp_path}/scratch.qcow2'/></disk></disks></domainbackup>"
    )
    witness.libvirtd.virsh("backup-begin", witness.name, str(pull))
    running = backup(witness.name)
    report = running.wait_for(lambda report: report.reason == "WaitingForOthers", "WaitingForOthers")
    assert "migrated" in report.message
    witness.libvirtd.virsh("domjobabort", witness.name)
    comes_home(witness, running)


@pytest.mark.scenario(18)
def test_an_overlay_that_somebody_puts_on_top_of_ours_is_not_touched_until_they_remove_it(
    witness: Witness, backup: BackupFactory, libvirtd: Libvirtd
) -> None:
    """Scenario 18: the guest writes their image, ours is below it."""
    running = in_a_copy(witness, backup)
    theirs = {target: Path(base).parent / f"theirs-{uuid.uuid4()}.qcow2" for target, base in witness.bases.items()}
    specs = [word for target, path in theirs.items() for word in ("--diskspec", f"{target},file={path}")]
    libvirtd.virsh("snapshot-create-as", witness.name, "theirs", "--disk-only", "--no-metadata", *specs)
    hurry(running)
    report = running.wait_for(lambda report: report.reason == "Quarantined", "Quarantined")
    overlay = running.record.disk("vda").overlay
    for words in ("disk vda", overlay, "virsh blockcommit"):
        assert words in report.message
    assert witness.written() == {target: str(path) for target, path in theirs.items()}
    witness.guest.wait_for_more(2)
    for target in theirs:
        options = ["--active", "--shallow", "--pivot", "--wait"]
        libvirtd.virsh("blockcommit", witness.name, target, *options)
    comes_home(witness, running)
    for path in theirs.values():
        path.unlink()


@contextmanager
def read_by_qemu_img(image: str, image_format: str, to: Path) -> Generator[None]:
    """Somebody copies the image, slowly, with QEMU's lock: nobody may write it."""
    with subprocess.Popen(["qemu-img", "convert", "-r", "64K", "-f", image_format, "-O", "raw", image, to]) as reader:
        try:
            wait_until(to.exists, "it reads")
            yield
        finally:
            reader.kill()


def test_a_reader_of_the_base_delays_the_commit_which_is_tried_again_until_it_goes(
    witness: Witness, backup: BackupFactory, tmp_path: Path
) -> None:
    running = in_a_copy(witness, backup)
    running.edit("commit", backoffLimit=100)
    with read_by_qemu_img(witness.bases["vda"], "raw", tmp_path / "theirs"):
        hurry(running)
        report = running.wait_for(lambda report: is_all_that_is_left(report, "vda", "CommitRetrying"), "vda alone")
        assert "disk vda" in report.message
        assert "lock" in report.message
        assert witness.bases["vda"] in report.message
        witness.prove(running, left=["vda"])
    comes_home(witness, running)
    assert "CommitRetrying" in running.told.reasons


def test_a_reader_of_the_overlay_delays_only_its_removal(
    witness: Witness, backup: BackupFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    pivot = CaughtCall(monkeypatch, witness.name, "pivoting vda", sent=True)
    running = backup(witness.name)
    pivot.wait()
    overlay = Path(running.record.disk("vda").overlay)
    with overlay.open("rb") as reader:
        hold_reader_lock(reader.fileno())
        pivot.send()
        report = running.wait_for(lambda report: report.reason == "Quarantined", "Quarantined")
        for words in ("disk vda", str(overlay), "lsof"):
            assert words in report.message
        assert overlay.exists()
    comes_home(witness, running)


@pytest.mark.scenario(22)
def test_two_agents_of_one_node_by_mistake_take_turns_at_a_domain(
    witness: Witness, libvirtd: Libvirtd, tmp_path: Path
) -> None:
    """Scenario 22, across processes: each has its own state; the domain's lock is one for all."""

    def task(moment: Moment | None = None) -> Task:
        return Task(
            uri=libvirtd.uri,
            config_dir=libvirtd.config_dir,
            directory=tmp_path,
            domain=witness.name,
            targets=(),
            uid=str(uuid.uuid4()),
            moment=moment,
            interruption=Interruption.HOLD,
        )

    first = Driving(task(Moment(When.AFTER, "taking the snapshot", 1)))
    assert first.wait_until_held()
    overlays = witness.overlays()
    second = Driving(task())
    assert not second.ended(3), "the second did not wait for the first"
    assert witness.overlays() == overlays
    first.let_go()
    for driving in (first, second):
        report, _, _ = driving.end()
        assert report.outcome is Outcome.SUCCEEDED, report
    witness.prove()


@pytest.mark.misfortune("the clock jumps")
@pytest.mark.parametrize("jump", [10 * 365 * 86400.0, in_chaos(-10 * 365 * 86400.0)], ids=["forward", "back"])
def test_a_clock_that_jumps_by_ten_years_changes_nothing(
    witness: Witness, backup: BackupFactory, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """Deadlines and pauses are counted in CLOCK_BOOTTIME, which nobody sets."""
    running = in_a_copy(witness, backup)
    wall = time.time
    monkeypatch.setattr(time, "time", lambda: wall() + jump)
    time.sleep(1.5)  # it looks once a second
    comes_home(witness, running)
    assert not {"CopyDeadlineExceeded", "CommitDeadlineExceeded"} & set(running.told.reasons)
    assert all(0 <= (disk.commit_seconds or 0) < 60 for disk in running.report.disks)


@pytest.mark.scenario(4)
def test_a_definition_that_a_user_puts_back_to_the_base_under_a_running_guest_is_put_right_at_once(
    witness: Witness, backup: BackupFactory, tmp_path: Path
) -> None:
    """Scenario 4: on, L=O, P=B. A power cut now would boot an old image."""
    virsh, definition = witness.libvirtd.virsh, tmp_path / "before.xml"
    definition.write_text(virsh("dumpxml", "--inactive", "--security-info", witness.name))
    running = in_a_copy(witness, backup)
    overlays = {target: witness.source(target) for target in witness.bases}
    virsh("define", str(definition))
    for target, overlay in overlays.items():
        wait_until(partial(_names, witness, target, overlay), f"the definition names the overlay of {target}", 10)
    comes_home(witness, running)


def _names(witness: Witness, target: str, image: str) -> bool:
    return witness.source(target, inactive=True) == image


@pytest.mark.scenario(5)
def test_a_snapshot_that_was_taken_though_its_call_says_it_failed_is_this_backups_own(
    witness: Witness, backup: BackupFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scenario 5: as where libvirt cannot thaw, or save, after the switch. Another snapshot would stack overlays."""
    snapshot, taken = Guest.snapshot, list[str]()

    def fails_afterwards(guest: Guest, overlays: Mapping[str, str], others: Sequence[str]) -> None:
        snapshot(guest, overlays, others)
        taken.extend(overlays)
        raise TransientError("it was switched, and could not be saved", reason="OperationFailed")

    monkeypatch.setattr(Guest, "snapshot", fails_afterwards)
    running = backup(witness.name)
    report = running.end()
    assert sorted(taken) == sorted(witness.bases), "one snapshot of each disk"
    assert report.chain_clean, report
    witness.prove(running)


@pytest.mark.scenario(11)
def test_a_commit_that_somebody_aborts_is_made_again(witness: Witness, backup: BackupFactory) -> None:
    """Scenario 11: the job has vanished, and L=O."""
    running = in_a_commit(witness, backup)
    end_mirror(witness, "vda")
    running.wait_for(lambda report: "CommitRetrying" in running.told.reasons, "it is told")
    comes_home(witness, running)
    assert any("ended before it was complete" in message for _, message in running.told.events)
