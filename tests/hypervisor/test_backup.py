"""The main job on real libvirt and QEMU: what is copied is the moment of the snapshot, and nothing later is lost."""

from __future__ import annotations

import json
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from sandbox.guest import Guest as WritingGuest
from sandbox.libvirtd import Libvirtd
from sandbox.oracle import Bounds, prove, prove_snapshot
from tests.support.backups import SLOW, BackupFactory, RunningBackup, Told, make_backup, spec_of
from tests.support.domains import Domain, DomainFactory, wait_until
from tests.support.proof import copies, damaged, wrong_digests
from tests.support.stopwatch import Stopwatch
from tests.support.storage import mounted, sha256sum
from vmbackup.api.backup import BackupSpec
from vmbackup.api.status import Outcome, Phase
from vmbackup.imaging.locks import hold_reader_lock
from vmbackup.protocol.terms import Power
from vmbackup.reconcile.request import Request
from vmbackup.reconcile.steps.step import Ending


def no_overlay_is_left(domain: Domain) -> bool:
    on_base = all(domain.live(target).source == base for target, base in domain.bases.items())
    return on_base and not list(domain.directory.glob("*.vmb-*"))


@pytest.mark.parametrize("policy", [pytest.param("Guarded", marks=pytest.mark.check), "Live"])
def test_a_guest_that_keeps_writing_is_backed_up_as_of_its_snapshot_and_loses_nothing(
    writer: WritingGuest, backup: BackupFactory, tmp_path: Path, libvirtd: Libvirtd, policy: str
) -> None:
    images_before = libvirtd.virsh("domblklist", "writer")
    before = {target: writer.acknowledged(target) for target in writer.disks}
    running = backup("writer", switchPolicy=policy)
    report = running.end()

    assert report.outcome is Outcome.SUCCEEDED, report
    assert report.quiesced
    assert report.chain_clean
    assert libvirtd.virsh("domblklist", "writer") == images_before
    writer.wait_for_more(5)
    writer.destroy()
    writer.assert_only_rising()
    stored = copies(running.folder)
    assert not list(wrong_digests(running.folder))
    assert not list(damaged(stored.values()))
    for target, copy in zip(sorted(stored), prove_snapshot(stored, Bounds(before)), strict=True):
        home = prove(Path(writer.disks[target].path), acknowledged_at_least=writer.acknowledged(target))
        assert copy.last < home.last


@pytest.mark.scenario(1)
@pytest.mark.parametrize(
    "disks",
    [{"vda": "raw"}, {"vda": "qcow2"}, {"vda": "raw", "vdb": "qcow2"}, {"vda": "chain", "vdb": "raw"}],
    ids=lambda disks: "+".join(disks.values()),
)
@pytest.mark.parametrize("persistent", [True, False], ids=["persistent", "transient"])
def test_every_kind_of_disk_goes_to_the_store_and_comes_home(
    domain: DomainFactory, backup: BackupFactory, disks: dict[str, str], persistent: bool
) -> None:
    guest = domain(disks, persistent=persistent)
    for target in disks:
        guest.write(target, 0x11)
    running = backup(guest.name, copy={"bandwidth": "8Mi"})
    running.wait_for_phase(Phase.COPYING)
    for target in disks:
        guest.write(target, 0x22)
    report = running.end()

    assert report.outcome is Outcome.SUCCEEDED, report
    assert no_overlay_is_left(guest)
    for target in disks:
        assert guest.holds(target, 0x22), "a write after the snapshot is lost"
        copy = running.folder / f"{target}.{'raw' if disks[target] == 'raw' else 'qcow2'}"
        assert image_holds(copy, 0x11), "the copy is not of the moment of the snapshot"
        if persistent:
            assert guest.persistent(target).source == guest.bases[target]


@pytest.mark.scenario(19)
def test_a_template_is_recorded_once_and_the_folder_restores_anywhere(
    domain: DomainFactory, backup: BackupFactory, tmp_path: Path
) -> None:
    guest = domain({"vda": "chain"})
    guest.write("vda", 0x33)
    running = backup(guest.name)
    running.end()

    elsewhere = tmp_path / "elsewhere"
    subprocess.run(["cp", "-r", running.folder, elsewhere], check=True)
    disk = json.loads((elsewhere / "manifest.json").read_text())["disks"][0]
    assert (elsewhere / disk["backing"]).exists()
    subprocess.run(["qemu-img", "check", "-q", elsewhere / disk["file"]], check=True)
    assert image_holds(elsewhere / disk["file"], 0x33)


def test_the_uefi_variables_are_those_of_the_snapshot(
    domain: DomainFactory, backup: BackupFactory, tmp_path: Path
) -> None:
    firmware, variables = tmp_path / "code.fd", tmp_path / "vars.fd"
    firmware.write_bytes(bytes(64 << 10))
    variables.write_bytes(b"before".ljust(64 << 10))
    loader = f"<loader readonly='yes' type='pflash'>{firmware}</loader><nvram>{variables}</nvram>"
    guest = domain(os_xml=loader)
    guest.write("vda", 0x11, length="8M")
    running = backup(guest.name, copy={"bandwidth": SLOW})
    running.wait_for_copying()
    variables.write_bytes(b"after".ljust(64 << 10))
    running.edit("copy", bandwidth="10Gi")
    assert running.end().outcome is Outcome.SUCCEEDED
    assert (running.folder / "nvram.fd").read_bytes().startswith(b"before")


def test_a_guest_that_its_user_had_paused_is_never_resumed(domain: DomainFactory, backup: BackupFactory) -> None:
    guest = domain()
    assert backup(guest.name).end().outcome is Outcome.SUCCEEDED
    assert guest.guest.state()[0] is Power.PAUSED


def test_a_running_guest_runs_again_after_each_switch(
    domain: DomainFactory, backup: BackupFactory, libvirtd: Libvirtd
) -> None:
    guest = domain()
    libvirtd.virsh("resume", guest.name)
    assert backup(guest.name).end().outcome is Outcome.SUCCEEDED
    assert guest.guest.state()[0] is Power.RUNNING


@pytest.mark.parametrize(
    ("quiesce", "outcome", "reason"),
    [("Try", Outcome.SUCCEEDED, "Succeeded"), ("Require", Outcome.REFUSED, "QuiesceFailed")],
)
def test_without_a_guest_agent_only_a_required_quiesce_fails(
    domain: DomainFactory, backup: BackupFactory, libvirtd: Libvirtd, quiesce: str, outcome: Outcome, reason: str
) -> None:
    guest = domain()
    libvirtd.virsh("resume", guest.name)
    report = backup(guest.name, snapshot={"quiesce": quiesce}).end()
    assert (report.outcome, report.reason, report.quiesced) == (outcome, reason, False)
    assert no_overlay_is_left(guest)


@pytest.mark.scenario(8)
@pytest.mark.misfortune("the store is full")
def test_a_full_store_fails_the_backup_and_the_guest_still_comes_home(
    domain: DomainFactory, backup: BackupFactory, tmp_path: Path
) -> None:
    guest = domain()
    guest.write("vda", 0x33, length="16M")
    with mounted(tmp_path / "tight", "-t", "tmpfs", "-o", "size=96m", "tmpfs") as tight:
        running = backup(guest.name, store=tight / "store", copy={"bandwidth": "4Mi"})
        running.wait_for_copying()
        guest.write("vda", 0x44)
        with suppress(OSError):
            (tight / "other").write_bytes(bytes(96 << 20))
        report = running.end()
    assert (report.phase, report.outcome, report.reason) == (Phase.FAILED, Outcome.FAILED, "CopyFailed")
    assert report.backup_complete is False
    assert "free space" in report.message
    assert no_overlay_is_left(guest)
    assert guest.holds("vda", 0x44)


def test_a_copy_that_passes_its_deadline_fails_and_the_chain_comes_home(
    domain: DomainFactory, backup: BackupFactory
) -> None:
    guest = domain()
    guest.write("vda", 0x55, length="32M")
    report = backup(guest.name, copy={"bandwidth": SLOW, "deadlineSeconds": 1}).end()
    assert (report.outcome, report.reason) == (Outcome.FAILED, "CopyDeadlineExceeded")
    assert no_overlay_is_left(guest)


def test_a_changed_bandwidth_takes_effect_in_the_middle_of_a_copy(domain: DomainFactory, backup: BackupFactory) -> None:
    guest = domain()
    guest.write("vda", 0x66, length="48M")
    running = backup(guest.name, copy={"bandwidth": SLOW})
    running.wait_for_copying()
    running.edit("copy", bandwidth="10Gi")
    assert running.end(seconds=20).outcome is Outcome.SUCCEEDED


def test_a_changed_bandwidth_takes_effect_in_the_middle_of_a_commit(
    domain: DomainFactory, backup: BackupFactory
) -> None:
    guest = domain()
    running = slow_commit(guest, backup)
    running.edit("commit", bandwidth="10Gi")
    assert running.end(seconds=20).outcome is Outcome.SUCCEEDED


def slow_commit(guest: Domain, backup: BackupFactory, megabytes: int = 48) -> RunningBackup:
    """A backup in the middle of a commit that would take long."""
    guest.write("vda", 0x77, length="1M")
    running = backup(guest.name, copy={"bandwidth": SLOW}, commit={"bandwidth": SLOW})
    running.wait_for_phase(Phase.COPYING)
    guest.write("vda", 0x78, length=f"{megabytes}M")
    running.edit("copy", bandwidth="10Gi")
    running.wait_for_phase(Phase.COMMITTING)
    wait_until(lambda: guest.guest.block_job("vda") is not None, "the commit job")
    return running


def test_a_failing_commit_is_tried_again_then_given_up_with_nothing_deleted_and_comes_home_on_request(
    domain: DomainFactory, backup: BackupFactory
) -> None:
    guest = domain()
    guest.write("vda", 0x11, length="8M")
    running = backup(guest.name, copy={"bandwidth": "4Mi"}, commit={"backoffLimit": 2})
    running.wait_for_phase(Phase.COPYING)
    guest.write("vda", 0x22)
    with Path(guest.bases["vda"]).open("rb") as reader:
        hold_reader_lock(reader.fileno())  # as a reader that never ends: QEMU cannot write the base
        report = running.end()
        assert (report.phase, report.reason) == (Phase.FAILED, "CommitLimitReached")
        assert report.backup_complete
        assert report.chain_clean is False
        assert "lock" in report.message
        assert running.told.reasons.count("CommitRetrying") == 3
        assert guest.live().source == running.record.disks[0].overlay
        assert guest.holds("vda", 0x22)

    again = backup(guest.name, again=running, retry="1")
    report = again.end()
    assert report.outcome is Outcome.SUCCEEDED, report
    assert report.last_handled_retry == "1"
    assert no_overlay_is_left(guest)
    assert guest.holds("vda", 0x22)


def test_a_backup_brings_home_what_an_earlier_one_left_before_it_takes_its_snapshot(
    domain: DomainFactory, backup: BackupFactory
) -> None:
    guest = domain()
    guest.write("vda", 0x11, length="8M")
    first = backup(guest.name, copy={"bandwidth": "4Mi"}, commit={"backoffLimit": 0})
    first.wait_for_phase(Phase.COPYING)
    guest.write("vda", 0x22)
    with Path(guest.bases["vda"]).open("rb") as reader:
        hold_reader_lock(reader.fileno())
        assert first.end().reason == "CommitLimitReached"

    second = backup(guest.name)
    report = second.end()
    assert report.outcome is Outcome.SUCCEEDED, report
    assert "AdoptingOverlay" in second.told.reasons
    assert image_holds(second.folder / "vda.raw", 0x22), "copied from before the overlay came home"
    assert no_overlay_is_left(guest)
    assert not first.record.gave_up


def test_a_deleted_backup_brings_the_chain_home_before_it_is_released(
    domain: DomainFactory, backup: BackupFactory
) -> None:
    guest = domain()
    guest.write("vda", 0x11, length="16M")
    running = backup(guest.name, copy={"bandwidth": SLOW})
    running.wait_for_copying()
    guest.write("vda", 0x22)
    running.ask(deleted=True)
    assert running.ending is Ending.RELEASED
    assert no_overlay_is_left(guest)
    assert guest.holds("vda", 0x22)
    assert not list(running.node.state_dir.glob("*.journal"))
    assert not list(running.store.rglob("*.raw"))


@pytest.mark.scenario(24)
def test_a_backup_deleted_in_the_middle_of_its_commit_comes_home_first(
    domain: DomainFactory, backup: BackupFactory
) -> None:
    guest = domain()
    running = slow_commit(guest, backup)
    running.ask(deleted=True)
    running.edit("commit", bandwidth="10Gi")
    assert running.ending is Ending.RELEASED
    assert no_overlay_is_left(guest)
    assert guest.holds("vda", 0x78, length="48M")


def test_a_guest_that_is_off_on_its_overlay_waits_and_comes_home_at_its_next_start(
    domain: DomainFactory, backup: BackupFactory, libvirtd: Libvirtd
) -> None:
    guest = domain()
    running = slow_commit(guest, backup)
    libvirtd.virsh("destroy", guest.name)
    report = running.wait_for(lambda report: report.reason == "DomainOff", "DomainOff")
    assert report.chain_clean is False
    libvirtd.virsh("start", guest.name, "--paused")
    running.edit("commit", bandwidth="10Gi")
    assert running.end().outcome is Outcome.SUCCEEDED
    assert no_overlay_is_left(guest)
    assert guest.holds("vda", 0x78, length="48M")


def test_an_overlay_whose_backup_is_deleted_while_the_guest_is_off_goes_home_with_the_next(
    domain: DomainFactory, backup: BackupFactory, libvirtd: Libvirtd
) -> None:
    """It is recorded as an orphan."""
    guest = domain()
    running = slow_commit(guest, backup)
    libvirtd.virsh("destroy", guest.name)
    running.wait_for(lambda report: report.reason == "DomainOff", "DomainOff")
    running.ask(deleted=True)
    assert running.ending is Ending.RELEASED
    assert running.record.orphan
    assert Path(running.record.disks[0].overlay).exists()

    libvirtd.virsh("start", guest.name, "--paused")
    assert backup(guest.name).end().outcome is Outcome.SUCCEEDED
    assert no_overlay_is_left(guest)
    assert guest.holds("vda", 0x78, length="48M")
    assert not [record for record in running.node.records() if record.orphan]


def test_libvirtd_killed_in_the_middle_of_a_commit_changes_nothing(
    domain: DomainFactory, backup: BackupFactory, libvirtd: Libvirtd
) -> None:
    guest = domain()
    running = slow_commit(guest, backup)
    libvirtd.kill()
    libvirtd.start()
    running.edit("commit", bandwidth="10Gi")
    assert running.end().outcome is Outcome.SUCCEEDED
    assert no_overlay_is_left(guest)
    assert guest.holds("vda", 0x78, length="48M")


def test_two_backups_of_one_domain_go_one_after_the_other(domain: DomainFactory, backup: BackupFactory) -> None:
    guest = domain()
    guest.write("vda", 0x11, length="16M")
    first = backup(guest.name, copy={"bandwidth": SLOW})
    first.wait_for_copying()
    second = backup(guest.name)
    second.wait_for(lambda report: report.reason == "Queued", "Queued")
    first.edit("copy", bandwidth="10Gi")
    assert first.end().outcome is Outcome.SUCCEEDED
    assert second.end().outcome is Outcome.SUCCEEDED


def test_a_stopped_backup_is_carried_on_by_the_next_run(domain: DomainFactory, backup: BackupFactory) -> None:
    guest = domain()
    running = slow_commit(guest, backup)
    running.ask(stop=True)
    assert running.ending is Ending.INTERRUPTED
    again = backup(guest.name, again=running)
    assert again.end().outcome is Outcome.SUCCEEDED
    assert no_overlay_is_left(guest)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"disks": ["vdz"]}, "DiskNotFound"),
        ({"domain": "nobody"}, "DomainNotFound"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_touched(
    domain: DomainFactory, backup: BackupFactory, spec: dict[str, object], reason: str
) -> None:
    guest = domain()
    report = backup(**{"domain": guest.name, **spec}).end()
    assert (report.phase, report.outcome, report.reason) == (Phase.FAILED, Outcome.REFUSED, reason)
    assert no_overlay_is_left(guest)


def test_a_domain_that_is_off_is_refused(domain: DomainFactory, backup: BackupFactory) -> None:
    guest = domain(start=False)
    report = backup(guest.name).end()
    assert (report.outcome, report.reason) == (Outcome.REFUSED, "DomainNotRunning")


def test_an_image_that_is_not_at_its_path_any_more_fails_the_backup_before_anything_is_touched(
    domain: DomainFactory, backup: BackupFactory
) -> None:
    guest = domain()
    base = Path(guest.bases["vda"])
    base.rename(base.with_name("moved away"))  # QEMU has it open, and writes on
    report = backup(guest.name).end()
    assert (report.phase, report.outcome) == (Phase.FAILED, Outcome.REFUSED)
    assert guest.bases["vda"] in report.message
    assert no_overlay_is_left(guest)


@pytest.mark.scenario(20)
def test_a_base_that_another_domain_builds_on_is_refused(domain: DomainFactory, backup: BackupFactory) -> None:
    """Though that domain is off: it would start on a template that has changed under it."""
    other, guest = domain({"vda": "qcow2"}, start=False), domain({"vda": "qcow2"})
    over = ["-b", guest.bases["vda"], "-F", "qcow2", other.bases["vda"]]
    subprocess.run(["qemu-img", "create", "-q", "-u", "-f", "qcow2", *over, "64M"], check=True)
    report = backup(guest.name).end()
    assert (report.outcome, report.reason) == (Outcome.REFUSED, "BaseInUse")
    assert other.name in report.message


def test_with_a_store_that_can_clone_the_guest_is_on_its_overlay_for_less_than_half_a_second(
    domain: DomainFactory, backup: BackupFactory, xfs: Path, libvirtd: Libvirtd
) -> None:
    guest = domain(directory=xfs, size="200M")
    libvirtd.virsh("resume", guest.name)
    guest.write("vda", 0x11, length="64M")
    watch = Stopwatch()
    running = backup(guest.name, store=xfs / "store")
    report = running.end()
    assert report.outcome is Outcome.SUCCEEDED, report
    assert sha256sum(running.folder / "vda.raw") == report.disks[0].digest
    window = running.overlay_seconds()
    print(f"on the overlay for {window * 1000:.0f} ms")
    assert watch.allows(window, 0.5), watch


def image_holds(image: Path, pattern: int) -> bool:
    """Whether the first MiB of an image is this pattern."""
    read = subprocess.run(["qemu-io", "-r", "-c", f"read -P {pattern:#x} 0 1M", image], capture_output=True, text=True)
    return read.returncode == 0 and "verification failed" not in read.stdout


def test_deleting_a_failed_backup_removes_what_its_store_has_kept_because_it_was_away(
    domain: DomainFactory, backup: BackupFactory
) -> None:
    guest = domain()
    guest.write("vda", 0x11, length="16M")
    failed = backup(guest.name, copy={"bandwidth": SLOW, "deadlineSeconds": 1})
    assert failed.end().reason == "CopyDeadlineExceeded"
    kept = failed.store / failed.key.namespace / f".{failed.key.name}.{failed.key.uid}.partial"
    kept.mkdir()

    request = Request(BackupSpec.parse(spec_of(guest.name)), deleted=True)
    deleted = make_backup(failed.node, failed.key, lambda: request, failed.store, Told())
    assert deleted.run() is Ending.RELEASED
    assert not kept.exists()
