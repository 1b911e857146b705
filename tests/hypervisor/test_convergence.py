"""A guest that writes faster than its commit merges: what is done about it, and that all of it is undone."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from sandbox.guest import Guest as WritingGuest
from sandbox.guest import make_disk
from sandbox.libvirtd import Libvirtd
from sandbox.oracle import prove
from tests.support.backups import SLOW, BackupFactory, RunningBackup
from tests.support.domains import Domain, DomainFactory, wait_until
from tests.support.kill_points import Driving, Moment, Task, When
from tests.support.stopwatch import Stopwatch
from tests.support.tiers import in_chaos
from vmbackup.api.status import Outcome, Phase, Reason
from vmbackup.errors import VMBackupError
from vmbackup.hypervisor.guest import Guest
from vmbackup.hypervisor.hypervisor import Hypervisor
from vmbackup.protocol.record import Guard
from vmbackup.protocol.terms import Power
from vmbackup.reconcile.node import Node
from vmbackup.reconcile.state.clock import boottime
from vmbackup.reconcile.state.journal import record_of
from vmbackup.reconcile.steps.step import Ending

YEAR = 31_536_000.0  # seconds
SWITCH_SECONDS = 10.0  # far more than a switch takes where the disk is busy: one took 3 s, waiting for a flush
FAST = {"bandwidth": "1Gi"}
LABELS = {"domain": "stubborn", "target": "vda"}


@pytest.fixture(scope="module")
def one_guest(libvirtd: Libvirtd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WritingGuest]:
    directory = tmp_path_factory.mktemp("stubborn")
    disk = make_disk("vda", directory / "vda.raw", size_mib=64, bulk_mib=4)
    guest = WritingGuest(libvirtd.virsh, "stubborn", directory, [disk], dirty_kib_per_second=32768)
    guest.define()
    yield guest
    if "stubborn" in libvirtd.guest_pids():
        guest.destroy()
    libvirtd.virsh("undefine", "stubborn")


@pytest.fixture
def stubborn(one_guest: WritingGuest, libvirtd: Libvirtd) -> WritingGuest:
    """A Linux guest that dirties all of a file of 4 MiB again and again, in less than a second. No limits."""
    if "stubborn" not in libvirtd.guest_pids():
        one_guest.start()
    libvirtd.virsh("blkdeviotune", "stubborn", "vda", "--live", "--total-bytes-sec", "0", "--total-iops-sec", "0")
    one_guest.wait_for_more(3)
    return one_guest


@pytest.fixture
def limits(hypervisor: Hypervisor) -> Any:
    """What limits the bytes of the stubborn guest's disk now."""
    return lambda: hypervisor.guest("stubborn").byte_limits("vda")


def stalling(policy: str, **more: Any) -> dict[str, Any]:
    return {"bandwidth": SLOW, "deadlineSeconds": 1, "stallPolicy": policy, **more}


def task_of(libvirtd: Libvirtd, directory: Path, domain: str, commit: dict[str, Any]) -> Task:
    """A backup whose driver is a process of its own."""
    return Task(
        uri=libvirtd.uri,
        config_dir=libvirtd.config_dir,
        directory=directory,
        domain=domain,
        targets=(),
        uid=str(uuid.uuid4()),
        spec={"commit": commit},
    )


def prove_that_nothing_is_lost(guest: WritingGuest) -> None:
    guest.wait_for_more(5)
    guest.destroy()
    guest.assert_only_rising()
    prove(Path(guest.disks["vda"].path), acknowledged_at_least=guest.acknowledged("vda"))


@dataclass
class Standstills:
    """When the guest was suspended, as far as looks every few milliseconds tell."""

    seconds: list[float] = field(default_factory=list[float])


@contextmanager
def watched(guest: Guest) -> Iterator[Standstills]:
    """Note every time for which the guest is suspended."""
    seen, over = Standstills(), threading.Event()

    def watch() -> None:
        since: float | None = None
        while not over.wait(0.01):
            with suppress(VMBackupError):
                suspended, now = guest.state()[0] is Power.PAUSED, time.monotonic()
                if suspended and since is None:
                    since = now
                elif not suspended and since is not None:
                    seen.seconds.append(now - since)
                    since = None

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def wait_for_event(running: RunningBackup, reason: str) -> None:
    running.wait_for(lambda _: reason in running.told.reasons, f"event {reason}")


def escalation(running: RunningBackup) -> list[str]:
    return [reason for reason in running.told.reasons if reason.startswith(("CommitConv", "CommitDead", "Guest"))]


# -- Hold


@pytest.mark.scenario(23)
def test_a_commit_that_is_held_goes_on_beside_the_running_guest_and_everybody_hears_of_it(
    stubborn: WritingGuest, backup: BackupFactory, node: Node, hypervisor: Hypervisor
) -> None:
    with watched(hypervisor.guest("stubborn")) as standstills:
        running = backup("stubborn", commit=stalling("Hold"))
        running.wait_for(lambda report: report.reason == Reason.COMMIT_NOT_CONVERGING, "not converging")
        stalled = [node.metrics.registry.get_sample_value("vmbackup_commit_stalled", LABELS)]
        before = running.report.disks[0].merged_bytes
        running.wait_for(lambda report: report.disks[0].merged_bytes > before + (8 << 20), "8 MiB more merged")
        assert running.report.phase is Phase.COMMITTING, "it has converged: the guest is not stubborn"
        running.edit("commit", bandwidth="1Gi")
        report = running.end()

    assert report.outcome is Outcome.SUCCEEDED, report
    stalled.append(node.metrics.registry.get_sample_value("vmbackup_commit_stalled", LABELS))
    assert stalled == [1, None]
    assert running.told.reasons.count("CommitDeadlineExceeded") == 1
    assert running.told.reasons.count("CommitConverged") == 1
    assert max(standstills.seconds, default=0) < SWITCH_SECONDS, standstills
    prove_that_nothing_is_lost(stubborn)


# -- Throttle


def test_a_guest_that_is_throttled_lets_its_commit_converge_and_has_its_own_limits_afterwards(
    stubborn: WritingGuest, backup: BackupFactory, libvirtd: Libvirtd, limits: Any
) -> None:
    own = ["--total-bytes-sec", "90000000", "--total-bytes-sec-max", "95000000", "--total-iops-sec", "70000"]
    libvirtd.virsh("blkdeviotune", "stubborn", "vda", "--live", *own)
    before = libvirtd.virsh("blkdeviotune", "stubborn", "vda")
    persistent = libvirtd.virsh("dumpxml", "stubborn", "--inactive")
    running = backup("stubborn", commit=stalling("Throttle"))
    wait_for_event(running, "GuestThrottled")
    running.wait_for(lambda report: "the guest may write" in report.message, "a status that says so")
    throttled = limits()
    assert 0 < throttled["write_bytes_sec"] <= 16 << 20
    assert throttled["read_bytes_sec"] + throttled["write_bytes_sec"] == 90_000_000
    assert "<total_iops_sec>70000<" in libvirtd.virsh("dumpxml", "stubborn")
    report = running.end()

    assert report.outcome is Outcome.SUCCEEDED, report
    assert libvirtd.virsh("blkdeviotune", "stubborn", "vda") == before
    assert libvirtd.virsh("dumpxml", "stubborn", "--inactive") == persistent
    reasons = escalation(running)
    assert reasons[:2] == ["CommitDeadlineExceeded", "GuestThrottled"]
    assert reasons.count("GuestUnthrottled") == reasons.count("CommitConverged") == 1
    assert running.record.disks[0].throttle is None
    prove_that_nothing_is_lost(stubborn)


def test_a_backup_that_is_stopped_leaves_no_guest_throttled_and_carries_on(
    stubborn: WritingGuest, backup: BackupFactory, limits: Any
) -> None:
    running = backup("stubborn", commit=stalling("Throttle"))
    wait_for_event(running, "GuestThrottled")
    assert limits()
    running.ask(stop=True)
    assert running.ending is Ending.INTERRUPTED
    assert limits() == {}
    assert backup("stubborn", again=running, commit=FAST).end().outcome is Outcome.SUCCEEDED
    assert limits() == {}


def test_limits_that_their_user_changes_meanwhile_stay_as_the_user_wants_them(
    stubborn: WritingGuest, backup: BackupFactory, libvirtd: Libvirtd, limits: Any
) -> None:
    running = backup("stubborn", commit=stalling("Throttle"))
    wait_for_event(running, "GuestThrottled")
    libvirtd.virsh("blkdeviotune", "stubborn", "vda", "--live", "--write-bytes-sec", "50000000")
    wait_for_event(running, "IoTuneChanged")
    running.edit("commit", **FAST)
    assert running.end().outcome is Outcome.SUCCEEDED
    assert limits() == {"write_bytes_sec": 50_000_000}
    assert running.told.reasons.count("IoTuneChanged") == 1


@pytest.mark.parametrize(
    "moment",
    [Moment(When.BEFORE, "limiting vda"), Moment(When.AFTER, "journal call=None, vda.throttle")],
    ids=["before the guest is throttled", "when the guest is throttled"],
)
def test_a_guest_whose_driver_is_killed_has_its_own_limits_after_the_next_run(
    stubborn: WritingGuest, libvirtd: Libvirtd, tmp_path: Path, limits: Any, moment: Moment
) -> None:
    libvirtd.virsh("blkdeviotune", "stubborn", "vda", "--live", "--write-bytes-sec", "80000000")
    task = task_of(libvirtd, tmp_path, "stubborn", stalling("Throttle"))
    killed = Driving(replace(task, moment=moment))
    assert killed.killed()
    assert (limits() == {"write_bytes_sec": 80_000_000}) is (moment.when is When.BEFORE)
    report, _, reasons = Driving(replace(task, spec={"commit": FAST})).end()

    assert report.outcome is Outcome.SUCCEEDED, report
    assert limits() == {"write_bytes_sec": 80_000_000}
    assert ("GuestUnthrottled" in reasons) is (moment.when is When.AFTER)


# -- Pause


def test_a_stall_pause_suspends_the_guest_once_until_its_commit_has_converged(
    stubborn: WritingGuest, backup: BackupFactory, hypervisor: Hypervisor
) -> None:
    with watched(hypervisor.guest("stubborn")) as standstills:
        running = backup("stubborn", commit=stalling("Pause", stallPauseSeconds=60))
        report = running.end()

    assert report.outcome is Outcome.SUCCEEDED, report
    assert max(standstills.seconds) < 30, standstills
    messages = [each.message for _, each in running.told.timeline if each.reason == Reason.COMMIT_NOT_CONVERGING]
    assert "the guest is suspended" in messages[-1]
    assert escalation(running) == ["CommitDeadlineExceeded", "GuestSuspended", "CommitConverged", "GuestResumed"]
    prove_that_nothing_is_lost(stubborn)


@pytest.fixture
def slow_to_merge(domain: DomainFactory, libvirtd: Libvirtd) -> Domain:
    """A running guest without an OS. QEMU merges 16 MiB at once before it keeps to the limit; again when it stops."""
    guest = domain(size="128M")
    libvirtd.virsh("resume", guest.name)
    return guest


def write_on_overlay(running: RunningBackup, guest: Domain) -> None:
    running.wait_for_copying()
    guest.write("vda", 0x22, "0", "128M")
    running.edit("copy", bandwidth="10Gi")


def test_a_pause_that_does_not_suffice_ends_at_its_bound_and_is_not_repeated_in_the_attempt(
    slow_to_merge: Domain, backup: BackupFactory
) -> None:
    slow_to_merge.write("vda", 0x11, "0", "16M")
    commit = stalling("Pause", stallPauseSeconds=4)
    with watched(slow_to_merge.guest) as standstills:
        running = backup(slow_to_merge.name, commit=commit, copy={"bandwidth": SLOW})
        write_on_overlay(running, slow_to_merge)
        wait_for_event(running, "GuestSuspended")
        bound = running.record.pause_until  # it counts from the intent: to stop takes QEMU seconds of a busy disk
        wait_until(lambda: slow_to_merge.guest.state()[0] is Power.PAUSED, "suspended")
        wait_for_event(running, "GuestResumed")
        late = boottime() - bound
        running.wait_for(lambda _: len(held(running)) > 3, "a few looks at a commit that goes on")
        running.edit("commit", **FAST)
        report = running.end()

    assert report.outcome is Outcome.SUCCEEDED, report
    assert 0 <= late < SWITCH_SECONDS
    assert max(standstills.seconds) < 4 + SWITCH_SECONDS, standstills
    assert running.told.reasons.count("GuestSuspended") == 1
    assert slow_to_merge.holds("vda", 0x22)


def held(running: RunningBackup) -> list[str]:
    """What status has said of a commit that does not converge, and beside which the guest runs."""
    messages = [report.message for _, report in running.told.timeline]
    return [message for message in messages if "has not converged" in message and "the commit continues" in message]


def test_a_backup_that_is_stopped_leaves_no_guest_paused(slow_to_merge: Domain, backup: BackupFactory) -> None:
    slow_to_merge.write("vda", 0x11, "0", "16M")
    commit = stalling("Pause", stallPauseSeconds=300)
    running = backup(slow_to_merge.name, commit=commit, copy={"bandwidth": SLOW})
    write_on_overlay(running, slow_to_merge)
    wait_until(lambda: slow_to_merge.guest.state()[0] is Power.PAUSED and paused(running), "paused", 60)
    watch = Stopwatch()
    running.ask(stop=True)
    assert running.ending is Ending.INTERRUPTED
    assert watch.within(5), watch
    assert slow_to_merge.guest.state()[0] is Power.RUNNING
    assert backup(slow_to_merge.name, again=running, commit=FAST).end().outcome is Outcome.SUCCEEDED


def paused(running: RunningBackup) -> bool:
    record = running.record
    return record.pause_until > 0 and record.guard is Guard.OURS and record.call is None


def test_a_guest_whose_driver_is_killed_during_its_pause_is_resumed_by_the_next_run_at_once(
    stubborn: WritingGuest, hypervisor: Hypervisor, libvirtd: Libvirtd, tmp_path: Path
) -> None:
    guest = hypervisor.guest("stubborn")
    task = task_of(libvirtd, tmp_path, "stubborn", stalling("Pause", stallPauseSeconds=300))
    killed = Driving(task)

    def in_its_pause() -> bool:
        record = record_of(task.state_dir, task.uid)
        paused = record is not None and record.pause_until > 0 and record.call is None
        return paused and guest.state()[0] is Power.PAUSED

    wait_until(in_its_pause, "paused", 60)
    killed.kill()
    assert guest.state()[0] is Power.PAUSED
    again = Driving(replace(task, spec={"commit": FAST}))
    watch = Stopwatch()
    wait_until(lambda: guest.state()[0] is Power.RUNNING, "resumed", 60)
    assert watch.within(5), watch
    report, _, _ = again.end()
    assert report.outcome is Outcome.SUCCEEDED, report
    prove_that_nothing_is_lost(stubborn)


# -- the clock


@pytest.mark.parametrize("jump", [YEAR, in_chaos(-YEAR)], ids=["a year ahead", "a year back"])
def test_a_clock_that_jumps_neither_fails_a_copy_nor_escalates_a_commit(
    domain: DomainFactory, backup: BackupFactory, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    guest = domain(size="4M")
    guest.write("vda", 0x11, "0", "2M")
    running = backup(guest.name, copy={"bandwidth": SLOW}, commit={"bandwidth": SLOW})
    running.wait_for_copying()
    guest.write("vda", 0x22, "0", "2M")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump)
    running.wait_for_phase(Phase.COMMITTING)
    monkeypatch.setattr(time, "time", lambda: real() + 3 * jump)
    report = running.end()

    assert report.outcome is Outcome.SUCCEEDED, report
    assert "CommitDeadlineExceeded" not in running.told.reasons
    seconds = report.disks[0].commit_seconds
    assert seconds is not None
    assert 0 < seconds < 60
