"""A guest that is suspended or frozen by us runs again though the process that did it was killed, and none is started.

The limits count from the death: 5 s, or 45 s where a call was left unanswered (PROTOCOL R4).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Semaphore
from uuid import uuid4

import pytest
import yaml

from sandbox.guest import Guest as WritingGuest
from sandbox.libvirtd import Libvirtd
from tests.support import manifests
from tests.support.domains import Domain, DomainFactory, GuestFactory, wait_until
from tests.support.kill_points import Driving, Moment, Task, When, guardians
from tests.support.stopwatch import Stopwatch
from tests.support.survival import (
    SUSPENDED,
    SUSPENDED_SECONDS,
    SUSPENDED_SECONDS_IN_DOUBT,
    moments_of,
    task_of,
    what_is_wrong,
)
from tests.support.tiers import in_chaos
from vmbackup.api.status import Outcome
from vmbackup.protocol.terms import Power
from vmbackup.reconcile.state.journal import record_of

RSS_MB = 60
AT_ONCE = 3  # drivers on their way to their death, and guardians at work
GUARDED = {"switchPolicy": "Guarded"}
FROZEN = Moment(When.AFTER, "journal call=None, quiesced")
THAWING = Moment(When.BEFORE, "thawing the file systems")

WINDOW = [
    ("suspending", 1),
    ("taking the snapshot", 1),
    ("redefining", 2),  # after the snapshot
    ("suspending", 2),
    ("pivoting vda", 1),
    ("redefining", 4),  # after the pivot
    ("resuming", 2),
    ("pivoting vdb", 1),
]


@pytest.mark.timeout(180)
def test_a_guest_in_the_middle_of_a_switch_runs_again_though_nobody_starts_an_agent(guests: GuestFactory) -> None:
    every = moments_of(guests(1)[0], GUARDED)
    calls = [Moment(When.AFTER, *call) for call in WINDOW]
    moments = [replace(call, when=When.DURING) for call in calls] + [answered(every, call) for call in calls]
    wrong = survive_without_agent(guests(len(moments)), moments)
    assert not wrong, "\n".join(wrong)


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_whenever_an_agent_is_killed_no_guest_is_left_suspended_though_nobody_starts_another(
    guests: GuestFactory,
) -> None:
    several = guests(24)
    every = moments_of(several[0], GUARDED)
    wrong: list[str] = []
    for first in range(0, len(every), len(several)):
        wrong += survive_without_agent(several, every[first : first + len(several)])
    assert not wrong, "\n".join(wrong)


@pytest.mark.scenario(6)
@pytest.mark.parametrize(
    ("moment", "seconds"),
    [
        (FROZEN, SUSPENDED_SECONDS),
        (Moment(When.DURING, "freezing the file systems"), SUSPENDED_SECONDS_IN_DOUBT),
        (Moment(When.AFTER, "journal snapshot, guard"), SUSPENDED_SECONDS),
        in_chaos(Moment(When.DURING, "thawing the file systems"), SUSPENDED_SECONDS_IN_DOUBT),
        in_chaos(THAWING, SUSPENDED_SECONDS_IN_DOUBT),
        in_chaos(replace(THAWING, when=When.AFTER), SUSPENDED_SECONDS_IN_DOUBT),
    ],
    ids=["frozen", "while freezing", "about to be suspended", "while thawing", "before thawing", "thawed"],
)
def test_a_frozen_guest_thaws_though_nobody_starts_an_agent(
    writer: WritingGuest, libvirtd: Libvirtd, tmp_path: Path, moment: Moment, seconds: float
) -> None:
    task = replace(task_of_writer(libvirtd, tmp_path), moment=moment, guarded=True)
    assert Driving(task).killed()
    watch = Stopwatch()
    wait_until(lambda: not is_held(task), "the guest resumed", seconds + 60)
    print(f"resumed after {watch}")
    assert watch.within(seconds), watch
    assert frozen_file_systems(libvirtd) == "thawed"
    writer.wait_for_more()
    assert watch.within(seconds + 3), watch

    report, _, reasons = Driving(replace(task, moment=None, guarded=False)).end()
    assert report.outcome is Outcome.SUCCEEDED, reasons
    assert report.quiesced
    writer.assert_only_rising()


def test_run_without_a_cluster_has_a_guardian_too(domain: DomainFactory, libvirtd: Libvirtd, tmp_path: Path) -> None:
    guest = domain()
    libvirtd.virsh("resume", guest.name)
    command = run_command(libvirtd, tmp_path, guest)
    process = dying(command, SUSPENDED, tmp_path)
    said, _ = process.communicate(timeout=60)  # returns once the guardian has closed stderr too
    assert process.returncode == -signal.SIGKILL
    assert guest.guest.state()[0] is Power.RUNNING
    assert "was left suspended or frozen by a process that died" in said
    assert f"the guest {guest.name} runs again" in said
    assert not guardians(tmp_path / "state")
    assert subprocess.run([sys.executable, "-m", "vmbackup.cli", *command], check=False, timeout=60).returncode == 0


def test_a_guardian_whose_output_nobody_reads_still_resumes_the_guest(
    domain: DomainFactory, libvirtd: Libvirtd, tmp_path: Path
) -> None:
    guest = domain()
    libvirtd.virsh("resume", guest.name)
    command = run_command(libvirtd, tmp_path, guest)
    with unread_pipe() as full:
        process = dying(command, SUSPENDED, tmp_path, says_to=full)
        assert process.wait(60) == -signal.SIGKILL
        watch = Stopwatch()
        wait_until(lambda: guest.guest.state()[0] is Power.RUNNING, "the guest runs", 60)
        assert watch.within(SUSPENDED_SECONDS), watch
        wait_until(lambda: not guardians(tmp_path / "state"), "the end of the guardian")
    assert subprocess.run([sys.executable, "-m", "vmbackup.cli", *command], check=False, timeout=60).returncode == 0


def test_a_guardian_waits_deaf_and_ends_with_its_starter(
    domain: DomainFactory, libvirtd: Libvirtd, tmp_path: Path
) -> None:
    guest = domain()
    guest.write("vda", 0x11, length="16M")
    program = [sys.executable, "-m", "vmbackup.cli"]
    command = program + run_command(libvirtd, tmp_path, guest, **{"copy.bandwidth": "1Mi"})
    quiet = os.environ | {"COVERAGE_PROCESS_CONFIG": "", "COVERAGE_PROCESS_START": ""}  # it takes memory too
    process = subprocess.Popen(command, env=quiet, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: bool(guardians(tmp_path / "state")), "a guardian")
    (guardian,) = guardians(tmp_path / "state")
    wait_until(lambda: name_of(guardian) == "vmb-guardian", "its name")
    wait_until(lambda: bool(list(guest.directory.glob("*.vmb-*"))), "the guest on its overlay")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(guardian, number)
    assert os.getsid(guardian) == guardian
    assert rss_mb(guardian) < RSS_MB
    print(f"a guardian that waits takes {rss_mb(guardian):.1f} MB")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert not said, "an orderly end is none of its business"
    assert not guardians(tmp_path / "state")
    fast = program + run_command(libvirtd, tmp_path, guest)
    assert subprocess.run(fast, env=quiet, check=False, timeout=60, stdout=subprocess.DEVNULL).returncode == 0


def test_a_guardian_that_waits_has_all_in_memory_that_it_will_need(guests: GuestFactory, tmp_path: Path) -> None:
    (guest,) = guests(1)
    task = task_of(guest, GUARDED, SUSPENDED)
    assert Driving(task).killed()
    assert is_held(task)
    places = (task.uri, str(task.config_dir), str(task.state_dir), str(task.directory / "locks"))
    says = tmp_path / "says"
    with subprocess.Popen(
        [sys.executable, "-m", "vmbackup.guardian", *places],
        env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"},  # a line for each import
        stdin=subprocess.PIPE,
        stderr=says.open("w"),
    ) as guardian:
        wait_until(lambda: name_of(guardian.pid) == "vmb-guardian", "its name")
        imported = says.stat().st_size
        guardian.communicate(timeout=20)
    assert not is_held(task)
    assert b"import time:" in says.read_bytes()[:imported]
    assert b"import time:" not in says.read_bytes()[imported:]
    assert Driving(task_of(guest, GUARDED, uid=task.uid)).end()[0].outcome is Outcome.SUCCEEDED


def test_a_guardian_that_is_killed_has_a_successor(domain: DomainFactory, libvirtd: Libvirtd, tmp_path: Path) -> None:
    with slow_run(domain(), libvirtd, tmp_path) as process:
        (guardian,) = guardians(tmp_path / "state")
        os.kill(guardian, signal.SIGKILL)
        wait_until(lambda: guardians(tmp_path / "state") not in ([], [guardian]), "its successor", 20)
    assert process.returncode == 130
    assert not guardians(tmp_path / "state")


def test_nothing_that_lies_where_it_is_started_is_run(
    domain: DomainFactory, libvirtd: Libvirtd, tmp_path: Path
) -> None:
    trap = tmp_path / "downloads" / "vmbackup" / "__init__.py"
    trap.parent.mkdir(parents=True)
    trap.write_text(f"open({str(tmp_path / 'caught')!r}, 'w')")
    with slow_run(domain(), libvirtd, tmp_path, cwd=trap.parent.parent):
        pass
    assert not (tmp_path / "caught").exists()


# -- helpers


@contextmanager
def slow_run(
    guest: Domain, libvirtd: Libvirtd, directory: Path, cwd: Path | None = None
) -> Generator[subprocess.Popen[str]]:
    """`vmbackup run`, with its guardian and its guest on the overlay; interrupted at the end."""
    guest.write("vda", 0x11, length="16M")
    command = [str(Path(sys.executable).with_name("vmbackup"))]
    command += run_command(libvirtd, directory, guest, **{"copy.bandwidth": "1Mi"})
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: bool(guardians(directory / "state")), "a guardian")
        wait_until(lambda: bool(list(guest.directory.glob("*.vmb-*"))), "the guest on its overlay")
        yield process
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    fast = [command[0], *run_command(libvirtd, directory, guest)]
    assert subprocess.run(fast, check=False, timeout=60, stdout=subprocess.DEVNULL).returncode == 0


def survive_without_agent(several: Sequence[Domain], moments: Sequence[Moment]) -> list[str]:
    """Let each guest survive one death: all that is wrong."""
    few_at_once = Semaphore(AT_ONCE)
    with ThreadPoolExecutor(len(moments)) as pool:
        wrong = pool.map(partial(survive_alone, few_at_once), several, moments)
        return [each for each in wrong if each]


def survive_alone(few_at_once: Semaphore, guest: Domain, moment: Moment) -> str:
    """Kill a driver that has a guardian: what is wrong before any other driver is started, and at the end."""
    task = replace(task_of(guest, GUARDED, moment), guarded=True)
    wrong: list[str] = []
    few_at_once.acquire()
    killed = Driving(task).killed(120)
    watch = Stopwatch()
    record = record_of(task.state_dir, task.uid)
    in_doubt = record is not None and record.call is not None
    if in_doubt:  # it waits for the barrier, and costs nothing
        few_at_once.release()
    if killed:
        wait_until(lambda: not is_held(task), f"{moment}: the guest resumed", 90)
        seconds = watch.seconds
        print(f"killed {moment}: resumed after {seconds:.1f} s{' in doubt' if in_doubt else ''}")
        if not watch.allows(seconds, SUSPENDED_SECONDS_IN_DOUBT if in_doubt else SUSPENDED_SECONDS):
            wrong.append(f"it was held for {seconds:.1f} s")
        if guest.guest.state()[0] is not Power.RUNNING:
            wrong.append("the guest does not run")
        wait_until(lambda: not guardians(task.state_dir), f"{moment}: the end of the guardian", 10)
    if not in_doubt:
        few_at_once.release()
    report, _, reasons = Driving(task_of(guest, GUARDED, uid=task.uid)).end()
    if report.outcome is not Outcome.SUCCEEDED:
        wrong.append(f"it ended {report.outcome}: {report.reason}: {report.message}; {reasons}")
    wrong += what_is_wrong(guest, task, report)
    return f"killed {moment}: {'; '.join(wrong)}" if wrong else ""


def is_held(task: Task) -> bool:
    record = record_of(task.state_dir, task.uid)
    return record is not None and record.holds_guest


def answered(moments: Sequence[Moment], call: Moment) -> Moment:
    """The moment at which the journal holds the answer of a call."""
    following = moments[moments.index(call) + 1 :]
    return next(moment for moment in following if moment.when is When.AFTER)


def task_of_writer(libvirtd: Libvirtd, directory: Path) -> Task:
    """A backup of the writing guest, which writes all the time."""
    return Task(libvirtd.uri, libvirtd.config_dir, directory, "writer", (), str(uuid4()), GUARDED)


def frozen_file_systems(libvirtd: Libvirtd) -> str:
    answer = libvirtd.virsh("qemu-agent-command", "writer", '{"execute": "guest-fsfreeze-status"}')
    return yaml.safe_load(answer)["return"]


def run_command(libvirtd: Libvirtd, directory: Path, guest: Domain, **changes: str) -> list[str]:
    """`vmbackup run` of a guest."""
    backup = manifests.backup("nightly", domain=guest.name, nodeName=manifests.DROP, **changes)
    store = manifests.store("local", directory={"path": str(directory / "store")})
    file = directory / "backup.yaml"
    file.write_text(yaml.safe_dump_all([backup, store]))
    flags = {
        "file": file,
        "libvirt-uri": libvirtd.uri,
        "libvirt-config-dir": libvirtd.config_dir,
        "state-dir": directory / "state",
    }
    return ["run", *(f"--{name}={value}" for name, value in flags.items())]


def dying(
    command: Sequence[str], moment: Moment, directory: Path, says_to: int = subprocess.PIPE
) -> subprocess.Popen[str]:
    """A `vmbackup` that dies at this moment."""
    words = [moment.when, moment.event, str(moment.nth), str(directory), *command]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.kill_points", *words],
        cwd=Path(__file__).parents[2],
        stdout=says_to,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextmanager
def unread_pipe() -> Generator[int]:
    """The end to write to of a pipe that is full, and that nobody reads."""
    nobody, full = os.pipe()
    try:
        os.set_blocking(full, False)
        with suppress(BlockingIOError):
            while True:
                os.write(full, bytes(4096))
        os.set_blocking(full, True)
        yield full
    finally:
        os.close(full)
        os.close(nobody)


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def rss_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024 / 1e6
