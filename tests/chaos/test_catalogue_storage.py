"""File systems that are full, gone or read-only, images that somebody changes, journals that are lost: what then."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from sandbox.libvirtd import Libvirtd
from tests.chaos.proof import Witness
from tests.support.backups import SLOW, BackupFactory, RunningBackup, spec_of
from tests.support.domains import Domain, DomainFactory, wait_until, what_is_wrong_with
from tests.support.fixtures_hypervisor import connected
from tests.support.kill_points import Driving, Interruption, Moment, Task, When
from tests.support.proof import sources_on_disk
from tests.support.storage import mounted, run
from tests.support.tiers import in_chaos
from vmbackup.api.identity import BackupId
from vmbackup.api.status import Outcome, Phase
from vmbackup.errors import PermanentError
from vmbackup.hypervisor.guest import Guest
from vmbackup.hypervisor.hypervisor import Hypervisor
from vmbackup.protocol.terms import Power
from vmbackup.reconcile.node import Node
from vmbackup.stores.directory.store import DirectoryStore


@pytest.fixture(scope="module")
def libvirtd() -> Iterator[Libvirtd]:
    """One whose configuration lies on a small file system of its own."""
    directory = Path(tempfile.mkdtemp(prefix="vmb-"))
    with mounted(directory / "libvirt", "-t", "tmpfs", "-o", "size=4m", "tmpfs"), Libvirtd(directory) as running:
        yield running
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def hypervisor(libvirtd: Libvirtd) -> Iterator[Hypervisor]:
    with connected(libvirtd) as hypervisor:
        yield hypervisor


@pytest.fixture
def overlays(tmp_path: Path) -> Iterator[Path]:
    """Where overlays go: a small file system, apart from the images."""
    with mounted(tmp_path / "overlays", "-t", "tmpfs", "-o", "size=192m", "tmpfs") as root:
        yield root


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """Where journals are: a small file system."""
    with mounted(tmp_path / "small-state", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as root:
        yield root


@pytest.fixture
def node(node: Node, overlays: Path, state: Path) -> Node:
    return replace(node, overlay_dir=overlays, state_dir=state)


def fill(directory: Path) -> None:
    """Fill a file system to the last byte, at one go."""
    with suppress(OSError), (directory / "filler").open("ab", buffering=0) as filler:
        while filler.write(bytes(1 << 20)):
            pass
    with suppress(OSError), (directory / "filler").open("ab", buffering=0) as filler:
        while filler.write(bytes(1024)):
            pass


def free(directory: Path) -> None:
    (directory / "filler").unlink()


def afterwards(patch: pytest.MonkeyPatch, method: str, then: Callable[[], object]) -> None:
    """Once a call of libvirt was carried out, and before anybody knows, this happens."""
    call = getattr(Guest, method)

    @wraps(call)
    def called(*arguments: Any) -> None:
        call(*arguments)
        then()

    patch.setattr(Guest, method, called)


def at_home(guest: Domain, overlays: Path, *patterns: int) -> None:
    """Prove that the guest runs on its own images, by every XML, and has what was written at 0 M, 1 M, …"""
    saved = sources_on_disk(guest.libvirtd, guest.name)
    for target, base in guest.bases.items():
        assert [guest.live(target).source, guest.persistent(target).source, saved[target]] == [base] * 3
        assert not what_is_wrong_with(Path(base))
    assert guest.guest.state()[0] is Power.RUNNING
    assert not list(overlays.glob("*.vmb-*"))
    for number, pattern in enumerate(patterns):
        assert guest.holds("vda", pattern, offset=f"{number}M")


@pytest.fixture
def guest(domain: DomainFactory, libvirtd: Libvirtd) -> Domain:
    made = domain()
    libvirtd.virsh("resume", made.name)
    made.write("vda", 0x11)
    return made


def in_mid_copy(guest: Domain, backup: BackupFactory, **spec: Any) -> RunningBackup:
    guest.write("vda", 0x33, offset="8M", length="8M")
    running = backup(guest.name, copy={"bandwidth": SLOW}, **spec)
    running.wait_for_copying()
    guest.write("vda", 0x22, offset="1M")
    return running


def in_mid_commit(guest: Domain, backup: BackupFactory) -> RunningBackup:
    running = in_mid_copy(guest, backup, commit={"bandwidth": SLOW})
    guest.write("vda", 0x44, offset="32M", length="16M")
    running.edit("copy", bandwidth="10Gi")
    running.wait_for_phase(Phase.COMMITTING)
    wait_until(lambda: guest.guest.block_job("vda") is not None, "the commit job")
    return running


# -- file systems that are full


@pytest.mark.scenario(10)
def test_a_full_file_system_of_the_overlays_ends_the_copy_and_the_paused_guest_is_brought_home(
    witness: Witness, backup: BackupFactory, overlays: Path
) -> None:
    """Scenario 10, faster than the watermark."""
    running = backup(witness.name, copy={"bandwidth": SLOW})
    running.wait_for_copying()
    fill(overlays)
    report = running.end()
    assert (report.outcome, report.backup_complete, report.chain_clean) == (Outcome.FAILED, False, True)
    assert str(overlays) in report.message
    assert "free space" in report.message
    witness.prove(running)


def test_a_guest_that_is_paused_for_want_of_room_in_the_middle_of_its_commit_is_resumed_once_home(
    witness: Witness, backup: BackupFactory, overlays: Path
) -> None:
    running = backup(witness.name, copy={"bandwidth": "32Mi"}, commit={"bandwidth": SLOW})
    running.wait_for_copying()
    witness.write_tail("vda", 0x44, mebibytes=32)
    running.wait_for_phase(Phase.COMMITTING)
    fill(overlays)
    wait_until(lambda: "I/O error" in witness.libvirtd.virsh("domstate", "--reason", witness.name), "paused", 30)
    running.edit("commit", bandwidth="10Gi")
    assert running.end().outcome is Outcome.SUCCEEDED
    witness.prove(running)


@pytest.mark.misfortune("the base's file system is full")
def test_a_full_file_system_of_the_base_keeps_the_guest_on_its_overlay_until_there_is_room(
    domain: DomainFactory, backup: BackupFactory, overlays: Path, libvirtd: Libvirtd, tmp_path: Path
) -> None:
    with mounted(tmp_path / "bases", "-t", "tmpfs", "-o", "size=48m", "tmpfs") as bases:
        guest = domain(directory=bases)
        libvirtd.virsh("resume", guest.name)
        guest.write("vda", 0x11)
        running = in_mid_copy(guest, backup)
        guest.write("vda", 0x44, offset="24M", length="16M")
        fill(bases)
        running.edit("copy", bandwidth="10Gi")
        wait_until(lambda: "CommitRetrying" in running.told.reasons, "the commit fails")
        message = dict(running.told.events)["CommitRetrying"]
        assert f"could not be merged into {guest.bases['vda']}" in message
        assert "is full" in message
        assert guest.guest.state()[0] is Power.RUNNING
        free(bases)
        assert running.end().outcome is Outcome.SUCCEEDED
        at_home(guest, overlays, 0x11, 0x22)
        assert guest.holds("vda", 0x44, offset="24M", length="16M")
        libvirtd.kill_guest(guest.name)


def test_a_full_file_system_of_the_configuration_refuses_the_backup_before_it_touches_the_guest(
    guest: Domain, backup: BackupFactory, overlays: Path, libvirtd: Libvirtd, monkeypatch: pytest.MonkeyPatch
) -> None:
    touched: list[str] = []
    afterwards(monkeypatch, "suspend", lambda: touched.append("suspended"))
    fill(libvirtd.config_dir)
    try:
        report = backup(guest.name).end()
    finally:
        free(libvirtd.config_dir)
    assert (report.outcome, report.reason) == (Outcome.REFUSED, "ConfigNotDurable")
    assert "No space left on device" in report.message
    assert not touched
    at_home(guest, overlays, 0x11)


@pytest.mark.misfortune("the configuration's is full")
@pytest.mark.parametrize("switch", ["snapshot", in_chaos("pivot")])
def test_a_configuration_that_cannot_be_saved_after_a_switch_never_keeps_the_guest_suspended(
    guest: Domain, backup: BackupFactory, overlays: Path, libvirtd: Libvirtd, switch: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        afterwards(patch, switch, lambda: fill(libvirtd.config_dir))
        running = backup(guest.name)
        try:
            wait_until(lambda: "ConfigNotDurable" in running.told.reasons, "it is told", 30)
            wait_until(lambda: guest.guest.state()[0] is Power.RUNNING, "the guest runs")
            assert list(overlays.glob("*.vmb-*")), "an overlay goes on a settled definition only"
            assert "do not power-cycle the guest" in dict(running.told.events)["ConfigNotDurable"]
            guest.write("vda", 0x22, offset="1M")
        finally:
            free(libvirtd.config_dir)
    assert running.end().outcome is Outcome.SUCCEEDED
    at_home(guest, overlays, 0x11, 0x22)


def test_a_full_state_directory_fails_the_backup_before_it_touches_the_guest(
    guest: Domain, backup: BackupFactory, overlays: Path, state: Path
) -> None:
    fill(state)
    running = backup(guest.name)
    with pytest.raises(PermanentError, match=rf"{state}/.*free space there, or choose another --state-dir"):
        running.raise_its_error()
    at_home(guest, overlays, 0x11)


@pytest.mark.usefixtures("short_barrier")
@pytest.mark.parametrize("window", [1, in_chaos(2)], ids=["snapshot", "pivot"])
def test_a_state_directory_that_fills_up_in_a_switch_never_keeps_the_guest_suspended(
    guest: Domain, backup: BackupFactory, overlays: Path, state: Path, window: int
) -> None:
    suspended: list[None] = []

    def fill_in_time() -> None:
        suspended.append(None)
        if len(suspended) == window:
            fill(state)

    with pytest.MonkeyPatch.context() as patch:
        afterwards(patch, "suspend", fill_in_time)
        running = backup(guest.name)
        with pytest.raises(PermanentError, match="free space there"):
            running.raise_its_error()
    assert guest.guest.state()[0] is Power.RUNNING
    assert guest.persistent().source == guest.live().source
    guest.write("vda", 0x22, offset="1M")
    free(state)
    assert backup(guest.name, again=running).end().outcome is Outcome.SUCCEEDED
    at_home(guest, overlays, 0x11, 0x22)


@pytest.mark.usefixtures("short_barrier")
def test_a_suspended_guest_is_resumed_by_the_next_run_though_the_state_directory_is_full(
    guest: Domain, node: Node, overlays: Path, state: Path
) -> None:
    key = BackupId("tests", "backup", "0d3f5a7c-5d56-4b0a-9a43-6a4e3b1f0c11")
    (guest.directory / f"state-{key.uid[:8]}").symlink_to(state)
    task = Task(
        guest.libvirtd.uri,
        guest.libvirtd.config_dir,
        guest.directory,
        guest.name,
        (),
        key.uid,
        moment=Moment(When.AFTER, "suspending"),
        interruption=Interruption.HOLD,
    )
    driving = Driving(task)
    assert driving.wait_until_held()
    driving.kill()
    assert guest.guest.state()[0] is Power.PAUSED
    fill(state)
    spec = spec_of(guest.name)
    with pytest.raises(PermanentError, match="free space there"):
        RunningBackup(node, key, spec, guest.directory / "store").raise_its_error()
    assert guest.guest.state()[0] is Power.RUNNING
    free(state)
    assert RunningBackup(node, key, spec, guest.directory / "store").end().outcome is Outcome.SUCCEEDED
    at_home(guest, overlays, 0x11)


# -- the store


@contextmanager
def read_only_at_will(folder: Path) -> Generator[tuple[Path, Callable[[], object]]]:
    """A file system that goes read-only as one does of which the kernel finds that it is damaged."""
    image = folder / "ext4.img"
    with image.open("wb") as file:
        file.truncate(128 << 20)
    run("mkfs.ext4", "-q", "-F", str(image))
    with mounted(folder / "ext4", "-o", "loop,errors=remount-ro", str(image)) as root:
        device = Path(run("findmnt", "-n", "-o", "SOURCE", str(root)).strip()).name
        yield root, lambda: Path(f"/sys/fs/ext4/{device}/trigger_fs_error").write_text("by a test")


@pytest.mark.misfortune("the store is read-only")
@pytest.mark.parametrize("when", ["in mid-copy", in_chaos("when it is published")])
def test_a_store_that_goes_read_only_fails_the_backup_and_the_guest_comes_home(
    guest: Domain, backup: BackupFactory, overlays: Path, tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with read_only_at_will(tmp_path) as (root, break_it):
        if when == "in mid-copy":
            running = in_mid_copy(guest, backup, store=root / "store")
            break_it()
            running.edit("copy", bandwidth="10Gi")
        else:
            publish = DirectoryStore.publish

            def published(*arguments: Any) -> Any:
                break_it()
                return publish(*arguments)

            monkeypatch.setattr(DirectoryStore, "publish", published)
            running = backup(guest.name, store=root / "store")
        report = running.end()
        assert (report.outcome, report.backup_complete) == (Outcome.FAILED, False)
        assert str(root) in report.message
        assert not list(root.rglob("manifest.json"))
    at_home(guest, overlays, 0x11)


def test_a_store_that_is_removed_in_mid_copy_fails_the_backup_and_the_guest_comes_home(
    guest: Domain, backup: BackupFactory, overlays: Path, tmp_path: Path
) -> None:
    running = in_mid_copy(guest, backup)
    shutil.rmtree(running.store)
    running.edit("copy", bandwidth="10Gi")
    report = running.end()
    assert (report.outcome, report.backup_complete) == (Outcome.FAILED, False)
    assert str(tmp_path / "store") in report.message
    at_home(guest, overlays, 0x11, 0x22)


# -- images that somebody changes under us


def replace_base(base: Path) -> Callable[[], object]:
    kept = base.rename(base.with_name("kept"))
    base.write_bytes(kept.read_bytes())
    return lambda: kept.replace(base)


def cut_off_base(base: Path) -> Callable[[], object]:
    kept = base.read_bytes()
    os.truncate(base, 4 << 20)
    return lambda: base.write_bytes(kept)


def remove_base(base: Path) -> Callable[[], object]:
    kept = base.rename(base.with_name("kept"))
    return lambda: kept.rename(base)


@pytest.mark.misfortune("an image is replaced or truncated")
@pytest.mark.parametrize("harm", [replace_base, *map(in_chaos, [cut_off_base, remove_base])])
def test_nothing_is_merged_into_a_base_that_is_another_file_now_until_the_original_is_back(
    guest: Domain, backup: BackupFactory, overlays: Path, harm: Callable[[Path], Callable[[], object]]
) -> None:
    running = in_mid_copy(guest, backup)
    base = guest.bases["vda"]
    mend = harm(Path(base))
    report = running.wait_for(lambda report: report.reason == "Quarantined", "Quarantined")
    assert f"disk vda: {base} was replaced, removed or truncated" in report.message
    assert "Put the original back" in report.message
    (overlay,) = overlays.glob("*.vmb-*")
    assert (guest.live().source, guest.persistent().source) == (str(overlay), str(overlay))
    assert guest.guest.state()[0] is Power.RUNNING
    assert guest.guest.block_job("vda") is None
    guest.write("vda", 0x44, offset="2M")
    mend()
    running.edit("copy", bandwidth="10Gi")
    assert running.end().outcome is Outcome.SUCCEEDED
    at_home(guest, overlays, 0x11, 0x22, 0x44)


def remove_overlay(overlay: Path) -> None:
    overlay.unlink()


def replace_overlay(overlay: Path) -> None:
    kept = overlay.rename(overlay.with_name("kept"))
    overlay.write_bytes(kept.read_bytes())
    kept.unlink()


def put_another_file_in_its_place(overlay: Path) -> None:
    overlay.unlink()
    overlay.write_bytes(bytes(1 << 20))


@pytest.mark.misfortune("an overlay is removed or replaced")
@pytest.mark.parametrize("harm", [remove_overlay, *map(in_chaos, [replace_overlay, put_another_file_in_its_place])])
def test_an_overlay_that_somebody_removes_or_replaces_under_the_guest_is_still_merged(
    guest: Domain, backup: BackupFactory, overlays: Path, harm: Callable[[Path], None]
) -> None:
    """QEMU has the one it opened until it ends: so the sooner that is merged the better."""
    running = in_mid_copy(guest, backup)
    (overlay,) = overlays.glob("*.vmb-*")
    harm(overlay)
    guest.write("vda", 0x44, offset="2M")
    running.edit("copy", bandwidth="10Gi")
    assert running.end().outcome is Outcome.SUCCEEDED
    at_home(guest, overlays, 0x11, 0x22, 0x44)


def test_a_base_that_cannot_be_written_any_more_keeps_the_guest_on_its_overlay_until_it_can(
    guest: Domain, backup: BackupFactory, overlays: Path
) -> None:
    running = in_mid_copy(guest, backup)
    base = guest.bases["vda"]
    run("chattr", "+i", base)  # what no right of root overcomes
    try:
        running.edit("copy", bandwidth="10Gi")
        wait_until(lambda: "CommitRetrying" in running.told.reasons, "the commit fails")
    finally:
        run("chattr", "-i", base)
    message = dict(running.told.events)["CommitRetrying"]
    assert base in message
    assert "Operation not permitted" in message
    assert running.end().outcome is Outcome.SUCCEEDED
    at_home(guest, overlays, 0x11, 0x22)


# -- journals that are lost


def lose(state: Path) -> None:
    for path in state.iterdir():
        path.unlink()


def garble(state: Path) -> None:
    for path in state.iterdir():
        path.write_bytes(os.urandom(3000) + b"\n\0\0\0")


@pytest.mark.vulnerability("V13")
@pytest.mark.parametrize("harm", [lose, in_chaos(garble)])
def test_without_its_journal_a_backup_brings_home_what_it_left_and_takes_another_snapshot(
    guest: Domain, backup: BackupFactory, overlays: Path, state: Path, harm: Callable[[Path], None]
) -> None:
    """V13: what it had begun to copy is not the moment of its snapshot any more."""
    running = in_mid_copy(guest, backup)
    running.ask(stop=True)
    running.end()
    harm(state)
    guest.write("vda", 0x44, offset="2M")
    again = backup(guest.name, again=running)
    report = again.end()
    assert report.outcome is Outcome.SUCCEEDED, report
    assert "AdoptingOverlay" in again.told.reasons
    assert ("JournalGarbled" in again.told.reasons) is (harm is garble)
    copy = again.folder / "vda.raw"
    for offset, pattern in (("1M", 0x22), ("2M", 0x44)):
        assert "read 1048576" in qemu_io(copy, f"read -P {pattern:#x} {offset} 1M")
    at_home(guest, overlays, 0x11, 0x22, 0x44)


@pytest.mark.parametrize("harm", [lose, in_chaos(garble)])
def test_without_its_journal_a_backup_that_is_stored_brings_home_what_it_left_and_stays_as_it_was(
    guest: Domain, backup: BackupFactory, overlays: Path, state: Path, harm: Callable[[Path], None]
) -> None:
    running = in_mid_commit(guest, backup)
    running.ask(stop=True)
    running.end()
    harm(state)
    again = backup(guest.name, again=running)
    report = again.end()
    assert (report.outcome, report.reason, report.chain_clean) == (Outcome.REFUSED, "AlreadyStored", True)
    assert str(running.folder) in report.message
    copy = running.folder / "vda.raw"
    assert "read 1048576" in qemu_io(copy, "read -P 0x11 0 1M")
    assert "read 1048576" in qemu_io(copy, "read -P 0 1M 1M"), "copied after its snapshot"
    at_home(guest, overlays, 0x11, 0x22)


def qemu_io(image: Path, command: str) -> str:
    return run("qemu-io", "-r", "-f", "raw", "-c", command, str(image))


@pytest.mark.parametrize("where", [in_mid_copy, in_chaos(in_mid_commit)])
def test_a_running_backup_rewrites_a_journal_that_somebody_removes(
    guest: Domain,
    backup: BackupFactory,
    overlays: Path,
    state: Path,
    where: Callable[[Domain, BackupFactory], RunningBackup],
) -> None:
    running = where(guest, backup)
    lose(state)
    running.edit("copy", bandwidth="10Gi")
    running.edit("commit", bandwidth="10Gi")
    assert running.end().outcome is Outcome.SUCCEEDED
    assert running.record.finished
    at_home(guest, overlays, 0x11, 0x22)
