"""SIGKILL before, during and after everything that a backup does: it is carried on to a good end, and nothing is lost.

The list of moments is taken from a run of the backup itself (tests/support/kill_points.py): no new call is forgotten.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import Empty, Queue
from threading import Semaphore
from typing import Any

import pytest

from sandbox.libvirtd import Libvirtd
from tests.support.backups import Told, make_backup, spec_of
from tests.support.domains import Domain, DomainFactory, GuestFactory, starts, wait_until
from tests.support.kill_points import Driving, Interruption, Moment, Task, When
from tests.support.stopwatch import Stopwatch
from tests.support.survival import (
    dies,
    distinct,
    longest_allowed,
    longest_suspension,
    moments_of,
    one_of_each_kind,
    task_of,
    what_is_wrong,
)
from vmbackup.api.backup import BackupSpec
from vmbackup.api.identity import BackupId
from vmbackup.api.status import Outcome
from vmbackup.errors import TransientError
from vmbackup.protocol.terms import Power
from vmbackup.reconcile.backup import Backup
from vmbackup.reconcile.node import Node
from vmbackup.reconcile.request import Request
from vmbackup.reconcile.state.journal import record_of
from vmbackup.reconcile.steps.step import Ending

WAITING, QUICK = 12, 5  # guests at once: those that wait for PROTOCOL R4's barrier, which costs nothing, and the others
AT_ONCE = 4  # drivers on their way to their death
BUSY_SECONDS = 30  # beside what it may wait for: a backup is a second of CPU on a slow machine, and all may run at once

GUARDED = {"switchPolicy": "Guarded"}
LIVE = {"switchPolicy": "Live"}
QUIESCED = {"snapshot": {"quiesce": "Require"}}  # refused by guests without an agent

SAMPLE = [
    Moment(when, event, nth)
    for event, nth in [
        ("taking the snapshot", 1),
        ("redefining", 2),  # after the snapshot
        ("starting the commit of vda", 1),
        ("pivoting vda", 1),
        ("redefining", 4),  # after the pivot
        ("pivoting vdb", 1),
    ]
    for when in When
]


def hold_at(several: Sequence[Domain], moments: Sequence[Moment], spec: Mapping[str, Any]) -> list[Driving]:
    """Start a backup of each guest, and hold each at another moment."""
    tasks = [
        task_of(guest, spec, moment, interruption=Interruption.HOLD)
        for guest, moment in zip(several, moments, strict=False)
    ]
    held = [Driving(task) for task in tasks]
    assert all(driving.wait_until_held() for driving in held)
    return held


def libvirtd_dies(
    libvirtd: Libvirtd, several: Sequence[Domain], moments: Sequence[Moment], spec: Mapping[str, Any] = GUARDED
) -> list[str]:
    """Kill libvirtd while the backup of each guest is at another moment: all that is wrong."""
    held = hold_at(several, moments, spec)
    for driving in held:
        if driving.task.moment.when is When.DURING:
            driving.let_go()
    libvirtd.kill()
    for driving in held:
        if driving.task.moment.when is not When.DURING:
            driving.let_go()
    libvirtd.start()
    return all_come_home(several, held)


def qemu_dies(
    libvirtd: Libvirtd, several: Sequence[Domain], moments: Sequence[Moment], spec: Mapping[str, Any] = GUARDED
) -> list[str]:
    """Kill each guest's QEMU while its backup is at another moment: all that is wrong."""
    held = hold_at(several, moments, spec)
    for guest, driving in zip(several, held, strict=False):
        if driving.task.moment.when is When.DURING:
            driving.let_go()
        libvirtd.kill_guest(guest.name)
        wait_until(partial(is_off, guest), f"libvirt knows that {guest.name} is off")
        if driving.task.moment.when is not When.DURING:
            driving.let_go()
    return all_come_home(several, held)


def is_off(guest: Domain) -> bool:
    with suppress(TransientError):  # libvirt is busy with the call in the middle of which QEMU died
        return guest.guest.state()[0] is Power.OFF
    return False


def all_come_home(several: Sequence[Domain], held: Sequence[Driving]) -> list[str]:
    with ThreadPoolExecutor(len(held)) as pool:
        return [wrong for wrong in pool.map(come_home, several, held) if wrong]


@dataclass(frozen=True)
class Death:
    """When the driver of which backup is killed."""

    spec: Mapping[str, Any]
    moment: Moment
    outcome: Outcome = Outcome.SUCCEEDED


@dataclass(frozen=True)
class Survival:
    """What came of it. `suspended`: for how long at one stretch, in seconds from the start of the second driver."""

    death: Death
    in_doubt: bool = False  # a call was left unanswered
    suspended: float = 0.0
    wrong: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.death.spec}, killed {self.death.moment}: {'; '.join(self.wrong)}"


@pytest.mark.misfortune("the agent is killed at each kind of step")
@pytest.mark.timeout(600)
def test_a_driver_killed_once_in_each_kind_of_moment_is_carried_on_and_nothing_is_lost(guests: GuestFactory) -> None:
    several = guests(WAITING + QUICK)
    guarded, live = (one_of_each_kind(distinct(moments_of(several[0], spec))) for spec in (GUARDED, LIVE))
    frozen = next(moment for moment in guarded if "freez" in moment.event)
    deaths = [Death(GUARDED, moment) for moment in guarded]
    deaths += [Death(QUIESCED, frozen, Outcome.REFUSED)]
    deaths += [Death(LIVE, moment) for moment in live[::4]]
    assert_all_survive(several, deaths)


@pytest.mark.misfortune("the agent is killed at every step")
@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_a_driver_killed_at_any_moment_is_carried_on_and_nothing_is_lost(guests: GuestFactory) -> None:
    several = guests(WAITING + QUICK)
    guarded, live = (distinct(moments_of(several[0], spec)) for spec in (GUARDED, LIVE))
    deaths = [Death(GUARDED, moment) for moment in guarded]
    deaths += [Death(QUIESCED, moment, Outcome.REFUSED) for moment in guarded if "freez" in moment.event]
    deaths += [Death(LIVE, moment) for moment in live]
    assert_all_survive(several, deaths)


def assert_all_survive(several: Sequence[Domain], deaths: Sequence[Death]) -> None:
    started = time.monotonic()
    survivals = survive_all(several, deaths)
    doubtful = [survival.suspended for survival in survivals if survival.in_doubt]
    certain = [survival.suspended for survival in survivals if not survival.in_doubt]
    print(
        f"{len(deaths)} moments in {time.monotonic() - started:.0f} s; "
        f"suspended for at most {max(certain):.1f} s, in doubt {max(doubtful):.1f} s"
    )
    assert len(survivals) == len(deaths)
    assert doubtful
    assert certain
    wrong = [str(survival) for survival in survivals if survival.wrong]
    assert not wrong, "\n".join(wrong)


def test_a_driver_killed_while_it_completes_clones_in_the_store_is_carried_on(
    domain: DomainFactory, xfs: Path, libvirtd: Libvirtd
) -> None:
    guest = domain({"vda": "raw", "vdb": "qcow2"}, directory=xfs, size="4M")
    libvirtd.virsh("resume", guest.name)
    moments = moments_of(guest, GUARDED)
    home = max(number for number, moment in enumerate(moments) if moment.event == "remove an overlay")
    at_home = distinct(moments[home + 1 :])
    assert any(moment.when is When.BEFORE and "location" in moment.event for moment in at_home), at_home
    survivals = [survive(guest, Death(GUARDED, moment), Semaphore()) for moment in at_home]
    assert not [str(survival) for survival in survivals if survival.wrong]


def test_nothing_remains_of_a_backup_deleted_with_its_data_whose_driver_was_killed(
    domain: DomainFactory, xfs: Path, libvirtd: Libvirtd, node: Node
) -> None:
    """It was killed just after it had stored the backup."""
    guest = domain(directory=xfs, size="4M")
    libvirtd.virsh("resume", guest.name)
    noted = next(moment for moment in moments_of(guest, GUARDED) if "location" in moment.event)
    task = task_of(guest, GUARDED, noted)
    assert Driving(task).killed()
    folder = next((task.directory / "store/tests").glob(f"*{task.uid}"))

    assert deleted_with_data(task, node).run() is Ending.RELEASED
    assert not folder.exists()
    assert not list(folder.parent.glob(f".*{task.uid}*"))


@pytest.mark.usefixtures("short_barrier")
def test_a_deleted_backup_is_released_only_after_the_guest_that_it_froze_has_thawed(
    domain: DomainFactory, libvirtd: Libvirtd, node: Node
) -> None:
    """Its driver was killed while it froze the guest, and libvirtd is away."""
    guest = domain(size="4M")
    libvirtd.virsh("resume", guest.name)
    task = task_of(guest, {"snapshot": {"quiesce": "Try"}}, Moment(When.AFTER, "freezing the file systems"))
    assert Driving(task).killed()
    libvirtd.kill()
    try:
        with ThreadPoolExecutor(1) as pool:
            ending = pool.submit(deleted_with_data(task, node).run)
            try:
                with pytest.raises(TimeoutError):
                    ending.result(5)
                assert record_of(task.state_dir, task.uid)
            finally:
                libvirtd.start()
            assert ending.result(60) is Ending.RELEASED
    finally:
        libvirtd.start()


def deleted_with_data(task: Task, node: Node) -> Backup:
    """The backup of a task whose VMBackup is deleted, with deletionPolicy Delete."""
    request = Request(BackupSpec.parse(spec_of(task.domain)), deleted=True, delete_data=True)
    key, there = BackupId("tests", "backup", task.uid), replace(node, state_dir=task.state_dir)
    return make_backup(there, key, lambda: request, task.directory / "store", Told())


@pytest.mark.misfortune("libvirtd is killed")
@pytest.mark.timeout(300)
def test_libvirtd_killed_in_the_middle_of_a_backup_comes_back_to_guests_that_lose_nothing(
    guests: GuestFactory, libvirtd: Libvirtd
) -> None:
    assert not libvirtd_dies(libvirtd, guests(len(SAMPLE)), SAMPLE)


@pytest.mark.vulnerability("V2")
@pytest.mark.misfortune("QEMU is killed")
@pytest.mark.timeout(300)
def test_qemu_killed_in_the_middle_of_a_backup_starts_again_with_all_that_was_written(
    guests: GuestFactory, libvirtd: Libvirtd
) -> None:
    assert not qemu_dies(libvirtd, guests(len(SAMPLE)), SAMPLE)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("policy", ["Guarded", "Live"])
@pytest.mark.parametrize("die", [libvirtd_dies, qemu_dies], ids=["libvirtd", "qemu"])
def test_libvirtd_and_qemu_killed_at_every_moment(
    guests: GuestFactory, libvirtd: Libvirtd, die: Callable[..., list[str]], policy: str
) -> None:
    several, spec = guests(len(SAMPLE)), {"switchPolicy": policy}
    moments = distinct(moments_of(several[0], spec))
    wrong: list[str] = []
    for first in range(0, len(moments), len(several)):
        wrong += die(libvirtd, several, moments[first : first + len(several)], spec)
    print(f"{len(moments)} kills")
    assert not wrong, "\n".join(wrong)


def come_home(guest: Domain, driving: Driving) -> str:
    """Wait for the end of a backup, starting the guest when it is off or should be restarted: all that is wrong."""
    task = driving.task
    restarted: list[str] = []

    def tend() -> None:
        record = record_of(task.state_dir, task.uid)
        with suppress(TransientError):
            if record and record.quarantined not in ("", *restarted):
                restarted.append(record.quarantined)
                guest.libvirtd.kill_guest(guest.name)
            if guest.guest.state()[0] is Power.OFF:
                starts(guest)  # or later: not while its overlay is compared with its base

    watch = Stopwatch()
    suspended = longest_suspension(guest, driving, tend)
    report, _, reasons = driving.end(0)
    tend()
    print(f"{task.moment}: {report.outcome} {report.reason}, suspended for {suspended:.1f} s {restarted or ''}")
    wrong = list(what_is_wrong(guest, task, report))
    if not report.chain_clean:
        wrong.append(f"its chain is not clean: {report}")
    if not watch.allows(suspended, longest_allowed(in_doubt=True)):
        wrong.append(f"the guest was left suspended for {suspended:.1f} s")
    return f"{task.moment}: {'; '.join(wrong)}; {reasons}" if wrong else ""


def survive_all(several: Sequence[Domain], deaths: Sequence[Death]) -> list[Survival]:
    """Let each guest survive one death after the other, all guests at once; most guests those that wait long."""
    doubtful: Queue[Death] = Queue()
    certain: Queue[Death] = Queue()
    for death in deaths:
        (doubtful if death.moment.in_call else certain).put(death)
    few_at_once = Semaphore(AT_ONCE)  # so that what follows is not measured on a machine under full load

    def work(guest: Domain, queue: Queue[Death]) -> list[Survival]:
        survived: list[Survival] = []
        while True:
            try:
                survived.append(survive(guest, queue.get_nowait(), few_at_once))
            except Empty:
                return survived

    queues = [certain] * QUICK + [doubtful] * WAITING
    with ThreadPoolExecutor(len(several)) as pool:
        return [survival for survived in pool.map(work, several, queues) for survival in survived]


def survive(guest: Domain, death: Death, few_at_once: Semaphore) -> Survival:
    """Kill the driver of a backup at this moment, and let another carry on."""
    with few_at_once:
        task, missed = dies(lambda: task_of(guest, death.spec, death.moment))
    if missed:
        return Survival(death, wrong=(missed,))
    record = record_of(task.state_dir, task.uid)
    in_doubt = record is not None and record.call is not None
    watch, libvirtd = Stopwatch(), guest.libvirtd.pid
    second = Driving(replace(task, moment=None))
    suspended = longest_suspension(guest, second)
    in_doubt = in_doubt or guest.libvirtd.pid != libvirtd  # which may crash without us
    report, _, reasons = second.end(0)
    seconds = watch.seconds

    wrong = list(what_is_wrong(guest, task, report))
    if report.outcome is not death.outcome:
        wrong.append(f"it ended {report.outcome}: {report.reason}: {report.message}; {reasons}")
    limit = longest_allowed(in_doubt=in_doubt)
    if not watch.allows(suspended, limit):
        wrong.append(f"the guest was left suspended for {suspended:.1f} s")
    if not watch.allows(seconds, limit + BUSY_SECONDS):
        wrong.append(f"it took {seconds:.1f} s; {reasons}")
    shutil.rmtree(task.directory / "store", ignore_errors=True)
    return Survival(death, in_doubt, suspended, tuple(wrong))


def test_a_guest_that_dies_before_its_snapshot_gets_no_overlay_on_the_disks_that_are_left_out(
    guests: GuestFactory, libvirtd: Libvirtd
) -> None:
    (guest,) = guests(1)
    driving = Driving(
        task_of(guest, {"disks": ["vda"]}, Moment(When.BEFORE, "journal call=snapshot"), interruption=Interruption.HOLD)
    )
    assert driving.wait_until_held()
    libvirtd.kill_guest(guest.name)
    driving.let_go()
    assert not come_home(guest, driving)
    assert set(guest.directory.glob("vd*")) == {Path(base) for base in guest.bases.values()}
