"""A guest that a backup holds still runs again, whatever fails; and another backup of it begins only then."""

from __future__ import annotations

import errno
import os
import pty
import subprocess
import sys
import termios
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from io import FileIO
from pathlib import Path

import pytest
import yaml

from sandbox.libvirtd import Libvirtd
from tests.support import manifests
from tests.support.backups import BackupFactory, RunningBackup, Told, spec_of
from tests.support.domains import Domain, DomainFactory, GuestFactory, wait_until
from tests.support.kill_points import Driving, Moment, When
from tests.support.stopwatch import Stopwatch
from tests.support.survival import SUSPENDED, SUSPENDED_SECONDS, SUSPENDED_SECONDS_IN_DOUBT, task_of
from vmbackup.api.backup import BackupSpec
from vmbackup.api.identity import BackupId
from vmbackup.api.status import Outcome, Phase, Reason
from vmbackup.errors import PermanentError, RefusedError, TransientError
from vmbackup.hypervisor import guest as guests_of_libvirt
from vmbackup.hypervisor.hypervisor import Hypervisor
from vmbackup.protocol.record import Call, Freeze, Record, Snapshot
from vmbackup.protocol.terms import Power
from vmbackup.reconcile import rescue
from vmbackup.reconcile.backup import Backup, release_guest_of
from vmbackup.reconcile.node import Node
from vmbackup.reconcile.request import Request
from vmbackup.reconcile.rescue import release_guests
from vmbackup.reconcile.state.clock import boot_id, boottime
from vmbackup.reconcile.state.journal import Journal, record_of
from vmbackup.reconcile.steps.step import Ending
from vmbackup.telemetry.metrics import Metrics

SNAPSHOT_UNDER_WAY = Moment(When.DURING, "taking the snapshot")


@pytest.fixture
def guest(guests: GuestFactory) -> Domain:
    return guests(1)[0]


def left_at(guest: Domain, hypervisor: Hypervisor, moment: Moment) -> tuple[Node, Record]:
    """The node of a backup whose driver was killed there, and what its journal says."""
    task = task_of(guest, {}, moment)
    assert Driving(task).killed()
    record = record_of(task.state_dir, task.uid)
    assert record is not None
    return Node(hypervisor, task.state_dir, Metrics(), lock_dir=task.directory / "locks"), record


def runs(guest: Domain) -> bool:
    return guest.guest.state()[0] is Power.RUNNING


def another(node: Node, guest: Domain) -> RunningBackup:
    """Another backup of the same guest."""
    spec = spec_of(guest.name)
    return RunningBackup(node, BackupId("tests", "another", str(uuid.uuid4())), spec, guest.directory / "store")


def is_home(guest: Domain) -> bool:
    homes = [guest.live(target).source == base for target, base in guest.bases.items()]
    return all(homes) and not list(guest.directory.glob("*.vmb-*"))


def test_whose_journal_holds_what_this_version_cannot_read(guest: Domain, hypervisor: Hypervisor) -> None:
    """As after a roll-back of the agent."""
    node, record = left_at(guest, hypervisor, SUSPENDED)
    assert record.holds_guest
    Journal.start(node.state_dir, replace(record, spec={"fieldOfALaterVersion": 1})).close()
    release_guests(node)
    assert runs(guest)


def test_when_another_backup_of_it_is_started(guest: Domain, hypervisor: Hypervisor) -> None:
    node, _ = left_at(guest, hypervisor, SUSPENDED)
    assert not runs(guest)
    running = another(node, guest)
    watch = Stopwatch()
    wait_until(lambda: runs(guest), "the guest runs", 60)
    assert watch.within(SUSPENDED_SECONDS), watch
    assert running.end().outcome is Outcome.SUCCEEDED
    assert is_home(guest)


def test_a_backup_waits_for_the_call_that_another_one_has_left_unanswered(
    guest: Domain, hypervisor: Hypervisor
) -> None:
    """Else it would take its own snapshot beside that one, and stack overlays."""
    node, record = left_at(guest, hypervisor, SNAPSHOT_UNDER_WAY)
    assert record.call is not None
    called = record.call.boottime
    running = another(node, guest)
    running.wait_for(lambda report: report.reason == Reason.WAITING_FOR_CALLS or report.chain_clean is False, "waiting")
    wait_until(lambda: runs(guest), "the guest runs", SUSPENDED_SECONDS_IN_DOUBT)
    assert boottime() - called > 30
    assert running.end().outcome is Outcome.SUCCEEDED
    assert is_home(guest)


def test_nothing_is_sent_while_a_call_may_be_in_flight(
    domain: DomainFactory, backup: BackupFactory, node: Node
) -> None:
    """The answer of any other call would be taken for that of the one which is waited for (PROTOCOL R4)."""
    guest = domain()
    running = backup(guest.name, commit={"bandwidth": "1Mi"}, copy={"bandwidth": "16Mi"})
    running.wait_for_phase(Phase.COPYING)
    guest.write("vda", 0x22, length="32M")
    wait_until(lambda: guest.guest.block_job("vda") is not None, "the commit", 60)
    running.ask(stop=True)
    running.end()
    unanswered = Call("pivot", boot_id(), boottime())
    Journal.start(node.state_dir, replace(running.record, call=unanswered)).close()
    faster = backup(guest.name, again=running, commit={"bandwidth": "2Mi"})
    faster.wait_for(lambda report: report.reason == Reason.WAITING_FOR_CALLS, "waiting for the call")
    looks = len(faster.told.timeline)
    wait_until(lambda: len(faster.told.timeline) > looks + 2, "it has looked again")
    assert faster.record.call == unanswered
    job = guest.guest.block_job("vda")
    assert job is not None
    assert job.bandwidth == 1 << 20


def test_the_bandwidth_of_somebody_elses_job_is_not_changed(
    domain: DomainFactory, backup: BackupFactory, libvirtd: Libvirtd
) -> None:
    guest = domain({"vda": "chain"})
    guest.write("vda", 0x11, length="32M")
    libvirtd.virsh("blockcommit", guest.name, "vda", "--active", "--bandwidth", "1")
    running = backup(guest.name)
    running.wait_for(lambda report: report.reason == Reason.WAITING_FOR_OTHERS, "waiting for the job")
    looks = len(running.told.timeline)
    wait_until(lambda: len(running.told.timeline) > looks + 2, "it has looked again")
    job = guest.guest.block_job("vda")
    assert job is not None
    assert job.bandwidth == 1 << 20


@pytest.fixture
def failing_config(guest: Domain, hypervisor: Hypervisor, monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """While there is anything in this set, and the guest is suspended, nothing of libvirt's configuration is durable.

    No file system fails on demand in a libvirtd that all tests share, so that fault is not a real one.
    """
    fsync, failing = os.fsync, set[str]()

    def fails(file: int) -> None:
        where = Path(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}").readlink()
        if failing and where.is_relative_to(hypervisor.config_dir) and not runs(guest):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(file)

    monkeypatch.setattr(guests_of_libvirt.os, "fsync", fails)
    yield failing
    failing.clear()


@pytest.mark.chaos
def test_though_the_file_system_of_libvirts_configuration_fails_in_the_middle_of_a_switch(
    guest: Domain, backup: BackupFactory, failing_config: set[str]
) -> None:
    failing_config.add("now")
    running = backup(guest.name)
    wait_until(lambda: "ConfigNotDurable" in running.told.reasons, "it is told", 60)
    watch = Stopwatch()
    wait_until(lambda: runs(guest), "the guest runs", 60)
    assert watch.within(SUSPENDED_SECONDS), watch
    assert running.record.snapshot is Snapshot.DONE
    failing_config.clear()
    assert running.end().outcome is Outcome.SUCCEEDED
    assert is_home(guest)


def test_though_its_terminal_is_stopped(domain: DomainFactory, libvirtd: Libvirtd, tmp_path: Path) -> None:
    """Ctrl-S: a thread that writes to it blocks; once that was the thread that had suspended the guest."""
    guest = domain()
    libvirtd.virsh("resume", guest.name)
    file = tmp_path / "backup.yaml"
    made = manifests.backup("nightly", domain=guest.name, nodeName=manifests.DROP)
    file.write_text(yaml.safe_dump_all([made, manifests.store("local", directory={"path": str(tmp_path / "store")})]))
    command = [str(Path(sys.executable).with_name("vmbackup")), "run", f"--file={file}", "--log-level=debug"]
    command += [f"--libvirt-uri={libvirtd.uri}", f"--libvirt-config-dir={libvirtd.config_dir}"]
    command += [f"--state-dir={tmp_path / 'state'}"]
    master, terminal = pty.openpty()
    with (
        os.fdopen(master, "rb", buffering=0) as shown,
        os.fdopen(terminal, "wb", buffering=0) as screen,
        subprocess.Popen(command, stdin=screen, stdout=screen, stderr=screen) as process,
        killed(process),
    ):
        while b"Backup" not in shown.read(4096):
            pass
        termios.tcflow(screen, termios.TCOOFF)
        wait_until(lambda: bool(list(tmp_path.glob("store/*/*/manifest.json"))), "the backup is stored", 60)
        wait_until(lambda: is_home(guest) and runs(guest), "the guest is home")
        assert process.poll() is None, "it has not been stopped: the test shows nothing"
        termios.tcflow(screen, termios.TCOON)
        threading.Thread(target=read_all, args=(shown,), daemon=True).start()
        assert process.wait(60) == 0


def read_all(terminal: FileIO) -> None:
    with suppress(OSError):  # that is how its end is told
        terminal.readall()


@contextmanager
def killed(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Whatever fails, it ends."""
    try:
        yield
    finally:
        process.kill()


@pytest.mark.fault(15)
def test_whose_backup_is_over(guest: Domain, hypervisor: Hypervisor) -> None:
    """A record that says finished is not believed before its guest runs."""
    node, record = left_at(guest, hypervisor, SUSPENDED)
    Journal.start(node.state_dir, replace(record, finished=True)).close()
    release_guests(node)
    assert runs(guest)


@pytest.mark.fault(14)
def test_whose_journal_cannot_be_read_for_a_moment(
    guest: Domain, hypervisor: Hypervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, record = left_at(guest, hypervisor, SUSPENDED)
    unreadable = [PermanentError("too many open files", reason="JournalUnreadable")] * 2
    released: list[Record] = []

    def record_of_later(directory: Path, uid: str) -> Record | None:
        if unreadable:
            raise unreadable.pop()
        return record_of(directory, uid)

    def fails_once(node: Node, record: Record) -> Ending:
        released.append(record)
        if len(released) == 1:
            raise TransientError("libvirtd is away for a moment")
        return release_guest_of(node, record)

    monkeypatch.setattr(rescue, "record_of", record_of_later)
    monkeypatch.setattr(rescue, "release_guest_of", fails_once)
    release_guests(node)
    assert (len(released), runs(guest)) == (2, True)
    assert record.holds_guest


@pytest.mark.fault(13)
def test_which_is_frozen_and_whose_backup_is_refused_after_a_crash(
    guest: Domain, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy was withdrawn meanwhile: what the run before has frozen is thawed first."""
    thawed: list[str] = []
    monkeypatch.setattr(guests_of_libvirt.Guest, "thaw", lambda self, _timeout: thawed.append(self.name))
    frozen = Record(str(uuid.uuid4()), "tests", "frozen", domain_uuid=guest.guest.uuid, freeze=Freeze.FROZEN)
    Journal.start(node.state_dir, replace(frozen, boot_id=boot_id())).close()

    def forbid(_guest: object) -> None:
        raise RefusedError("no policy allows it", reason="NotAllowedByPolicy")

    told = Told()
    backup = Backup(
        node,
        frozen.identity,
        request=lambda: Request(BackupSpec.parse(spec_of(guest.name))),
        open_store=lambda: pytest.fail("a store was opened"),
        reporter=told,
        admit=forbid,
    )
    assert backup.run() is Ending.FINISHED
    assert thawed == [guest.name]
    assert told.timeline[-1][1].reason == "NotAllowedByPolicy"
