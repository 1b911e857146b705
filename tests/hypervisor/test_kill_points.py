"""SIGKILL before, during and after everything that a backup does: it is carried on to a good end, and nothing is lost.

The list of moments is taken from a run of the backup itself (tests/kill_points.py), so that no new call is forgotten.
"""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from threading import Semaphore
from typing import Any

import pytest

from sandbox.libvirtd import Libvirtd
from tests.domains import Domain, DomainFactory, qemu_img, wait_until
from tests.kill_points import Deed, Driving, Moment, Task, When, records_in
from tests.storage import sha256sum
from vmbackup.api.status import Outcome, Report
from vmbackup.errors import TransientError
from vmbackup.hypervisor import chain
from vmbackup.hypervisor.guest import GuestState
from vmbackup.reconcile.journal import record_of, records

WAITING, QUICK = 32, 8  # guests at once: those for PROTOCOL R4's barrier, which costs nothing, and the others
AT_ONCE = 6  # drivers on their way to their death
MISSED = 5  # moments that may not come by: when a job is READY decides the order of some steps
SUSPENDED_SECONDS = 5.0  # at most, after the driver is started again
SUSPENDED_SECONDS_IN_DOUBT = 45.0  # where a call was left unanswered

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

Guests = Callable[[int], list[Domain]]


@pytest.fixture
def guests(domain: DomainFactory, libvirtd: Libvirtd) -> Guests:
    """Running guests with a raw and a qcow2 disk."""

    def make(count: int) -> list[Domain]:
        made = [domain({"vda": "raw", "vdb": "qcow2"}, size="4M") for _ in range(count)]
        for guest in made:
            libvirtd.virsh("resume", guest.name)
        return made

    return make


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
    came_by: bool = True  # the moment was there in one of three backups

    def __str__(self) -> str:
        return f"{self.death.spec}, killed {self.death.moment}: {'; '.join(self.wrong)}"


@pytest.mark.timeout(600)
def test_a_driver_killed_at_any_moment_is_carried_on_and_nothing_is_lost(guests: Guests) -> None:
    started = time.monotonic()
    several = guests(WAITING + QUICK)
    guarded, live = {"switchPolicy": "Guarded"}, {"switchPolicy": "Live"}
    moments = distinct(moments_of(several[0], guarded))
    deaths = [Death(guarded, moment) for moment in moments]
    required = {"snapshot": {"quiesce": "Require"}}  # of guests without an agent
    deaths += [Death(required, moment, Outcome.REFUSED) for moment in moments if "freez" in moment.event]
    deaths += [Death(live, moment) for moment in distinct(moments_of(several[0], live))[::6]]
    ready = time.monotonic()
    survivals = survive_all(several, deaths)

    doubtful = [survival.suspended for survival in survivals if survival.in_doubt]
    certain = [survival.suspended for survival in survivals if not survival.in_doubt]
    print(
        f"{len(deaths)} moments in {time.monotonic() - started:.0f} s, {ready - started:.0f} s of it to begin with; "
        f"suspended for at most {max(certain):.1f} s, in doubt {max(doubtful):.1f} s"
    )
    missed = [survival for survival in survivals if not survival.came_by]
    assert len(survivals) == len(deaths)
    assert len(missed) <= MISSED, "\n".join(str(survival.death) for survival in missed)
    assert doubtful
    assert certain
    wrong = [str(survival) for survival in survivals if survival.wrong]
    assert not wrong, "\n".join(wrong)


@pytest.mark.timeout(300)
def test_libvirtd_killed_in_the_middle_of_a_backup_comes_back_to_guests_that_lose_nothing(
    guests: Guests, libvirtd: Libvirtd
) -> None:
    several = guests(len(SAMPLE))
    held = hold_at(several, SAMPLE)
    for driving in held:
        if driving.task.moment.when is When.DURING:
            driving.let_go()
    libvirtd.kill()
    for driving in held:
        if driving.task.moment.when is not When.DURING:
            driving.let_go()
    libvirtd.start()

    with ThreadPoolExecutor(len(held)) as pool:
        wrong = pool.map(come_home, several, held)
    assert not [each for each in wrong if each]


@pytest.mark.timeout(300)
def test_qemu_killed_in_the_middle_of_a_backup_starts_again_with_all_that_was_written(
    guests: Guests, libvirtd: Libvirtd
) -> None:
    several = guests(len(SAMPLE))
    held = hold_at(several, SAMPLE)
    for guest, driving in zip(several, held, strict=True):
        if driving.task.moment.when is When.DURING:
            driving.let_go()
        libvirtd.kill_guest(guest.name)
        if driving.task.moment.when is not When.DURING:
            driving.let_go()

    with ThreadPoolExecutor(len(held)) as pool:
        wrong = pool.map(come_home, several, held)
    assert not [each for each in wrong if each]


def hold_at(several: Sequence[Domain], moments: Sequence[Moment]) -> list[Driving]:
    """Start a backup of each guest, and hold each at another moment."""
    spec = {"switchPolicy": "Guarded"}
    tasks = [task_of(guest, spec, moment, deed=Deed.HOLD) for guest, moment in zip(several, moments, strict=True)]
    held = [Driving(task) for task in tasks]
    assert all(driving.wait_until_held() for driving in held)
    return held


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
            if guest.guest.state()[0] is GuestState.OFF:
                guest.libvirtd.virsh("start", guest.name)

    suspended = longest_suspension(guest, driving, tend)
    report, _, reasons = driving.end(0)
    tend()
    print(f"{task.moment}: {report.outcome} {report.reason}, suspended for {suspended:.1f} s {restarted or ''}")
    wrong = list(what_is_wrong(guest, task, report))
    if not report.chain_clean:
        wrong.append(f"its chain is not clean: {report}")
    if suspended > SUSPENDED_SECONDS_IN_DOUBT:
        wrong.append(f"the guest was left suspended for {suspended:.1f} s")
    return f"{task.moment}: {'; '.join(wrong)}; {reasons}" if wrong else ""


def moments_of(guest: Domain, spec: Mapping[str, Any]) -> list[Moment]:
    """Every moment of a backup in which nothing goes wrong."""
    task = task_of(guest, spec)
    report, moments, _ = Driving(task).end()
    assert report.outcome is Outcome.SUCCEEDED, report
    assert not list(what_is_wrong(guest, task, report))
    return moments


def distinct(moments: Sequence[Moment]) -> list[Moment]:
    """Without those that are the same instant as the next: between the journal's word of a call and the call."""
    following = [*moments[1:], None]
    return [
        moment
        for moment, after in zip(moments, following, strict=True)
        if not (after and moment.when is When.AFTER and after.when is When.BEFORE and moment.in_call and after.in_call)
    ]


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
    for _ in range(3):  # when a job is READY, and so the order of some steps, is not the same in every run
        task = task_of(guest, death.spec, death.moment)
        with few_at_once:
            killed = Driving(task).killed()
        if killed:
            break
    else:
        return Survival(death, came_by=False)
    record = record_of(task.state_dir, task.uid)
    in_doubt = record is not None and record.call is not None
    started = time.monotonic()
    second = Driving(task_of(guest, death.spec, uid=task.uid))
    suspended = longest_suspension(guest, second)
    report, _, reasons = second.end(0)
    seconds = time.monotonic() - started

    wrong = list(what_is_wrong(guest, task, report))
    if report.outcome is not death.outcome:
        wrong.append(f"it ended {report.outcome}: {report.reason}: {report.message}; {reasons}")
    limit = SUSPENDED_SECONDS_IN_DOUBT if in_doubt else SUSPENDED_SECONDS
    if suspended > limit:
        wrong.append(f"the guest was left suspended for {suspended:.1f} s")
    if seconds > limit + 10:
        wrong.append(f"it took {seconds:.1f} s; {reasons}")
    shutil.rmtree(task.directory / "store", ignore_errors=True)
    return Survival(death, in_doubt, suspended, tuple(wrong))


def task_of(
    guest: Domain, spec: Mapping[str, Any], moment: Moment | None = None, uid: str = "", deed: Deed = Deed.KILL
) -> Task:
    return Task(
        uri=guest.libvirtd.uri,
        config_dir=guest.libvirtd.config_dir,
        directory=guest.directory,
        domain=guest.name,
        targets=tuple(guest.bases),
        uid=uid or str(uuid.uuid4()),
        spec=spec,
        moment=moment,
        deed=deed,
    )


def longest_suspension(guest: Domain, driving: Driving, tend: Callable[[], object] = lambda: None) -> float:
    """How long the guest stands still at one stretch, in seconds, until the driver has ended.

    `tend` is called again and again meanwhile. A libvirtd that is away delays all until it is back.
    """
    longest, since, started = 0.0, time.monotonic(), time.monotonic()
    while not driving.ended(0.25):
        tend()
        now = time.monotonic()
        assert now - started < 120, f"{driving.task.moment}: no end, the guest is {guest.guest.state()}"
        try:
            suspended = guest.guest.state()[0] is GuestState.PAUSED
        except TransientError:
            since = now
            continue
        longest = max(longest, now - since if suspended else 0)
        since = since if suspended else now
    return longest


def what_is_wrong(guest: Domain, task: Task, report: Report) -> Iterator[str]:
    """All that is not as it must be once a backup has ended with its chain home."""
    if not runs(guest):
        why = guest.libvirtd.virsh("domstate", "--reason", guest.name).strip()
        guards = [record.guard for record in records(task.state_dir)]
        yield f"the guest does not run: {why}; guards in the journals: {guards}"
    if left := [path.name for path in guest.directory.glob("*.vmb-*")]:
        yield f"overlays are left: {left}"
    on_disk = (guest.libvirtd.config_dir / f"{guest.name}.xml").read_text()
    sources = {disk.target: disk.source for disk in chain.disks(on_disk)}
    for target, base in guest.bases.items():
        named = guest.live(target).source, guest.persistent(target).source, sources[target]
        if set(named) != {base}:
            yield f"{target}: live XML, persistent XML and the one on disk name {named}"
        count, acknowledged = records_in(content(Path(base))), task.diary.acknowledged
        if count not in (acknowledged, acknowledged + 1):  # one whose acknowledgement was lost may be there
            yield f"{target}: of {acknowledged} records it holds {count}"
    if report.outcome is Outcome.SUCCEEDED:
        yield from what_is_wrong_with_the_copy(task, Path(report.location))


def runs(guest: Domain) -> bool:
    """Whether the guest runs; libvirt may show an event of QEMU late on a busy machine."""
    try:
        wait_until(lambda: guest.guest.state()[0] is GuestState.RUNNING, "running", seconds=5)
    except TimeoutError:
        return False
    return True


def what_is_wrong_with_the_copy(task: Task, folder: Path) -> Iterator[str]:
    manifest = json.loads((folder / "manifest.json").read_text())
    expected = task.diary.snapshots(task.uid)
    counts: Counter[int] = Counter()
    for disk in manifest["disks"]:
        copy = folder / disk["file"]
        if sha256sum(copy) != disk["digest"]:
            yield f"{copy.name} has another digest"
        counts[records_in(content(copy))] += 1
    if len(counts) > 1 or not counts.keys() <= expected:
        yield f"the copies hold {sorted(counts.elements())} records; at the snapshot there were {sorted(expected)}"


def content(image: Path) -> bytes:
    """What a guest sees on this disk. Its guest may be running: it has flushed what it wrote."""
    if image.suffix == ".raw":
        return image.read_bytes()
    raw = image.with_name(f"{image.name}.{uuid.uuid4()}.raw")
    qemu_img("convert", "-U", "-f", "qcow2", "-O", "raw", str(image), str(raw))
    try:
        return raw.read_bytes()
    finally:
        raw.unlink()


def test_a_guest_that_dies_before_its_snapshot_gets_no_overlay_on_the_disks_that_are_left_out(
    guests: Guests, libvirtd: Libvirtd
) -> None:
    (guest,) = guests(1)
    driving = Driving(task_of(guest, {"disks": ["vda"]}, Moment(When.BEFORE, "journal call=snapshot"), deed=Deed.HOLD))
    assert driving.wait_until_held()
    libvirtd.kill_guest(guest.name)
    driving.let_go()
    assert not come_home(guest, driving)
    assert set(guest.directory.glob("vd*")) == {Path(base) for base in guest.bases.values()}
