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
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from threading import Lock
from typing import Any

import pytest

from sandbox.libvirtd import Libvirtd
from tests.domains import Domain, DomainFactory, qemu_img
from tests.kill_points import Driving, Moment, Task, records_in
from tests.storage import sha256sum
from vmbackup.api.status import Outcome, Report
from vmbackup.hypervisor import chain
from vmbackup.hypervisor.guest import GuestState
from vmbackup.reconcile.journal import record_of

WAITING, QUICK = 36, 4  # guests at once: those for PROTOCOL R4's barrier, which costs nothing, and the others
SUSPENDED_SECONDS = 5.0  # at most, after the driver is started again
SUSPENDED_SECONDS_IN_DOUBT = 45.0  # where a call was left unanswered

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


@dataclass(frozen=True)
class Survival:
    """What came of it. `suspended`: for how long at one stretch, in seconds from the start of the second driver."""

    death: Death
    in_doubt: bool = False  # a call was left unanswered
    suspended: float = 0.0
    wrong: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.death.spec}, killed {self.death.moment}: {'; '.join(self.wrong)}"


@pytest.mark.timeout(600)
def test_a_driver_killed_at_any_moment_is_carried_on_and_nothing_is_lost(guests: Guests) -> None:
    started = time.monotonic()
    several = guests(WAITING + QUICK)
    guarded, live = {"switchPolicy": "Guarded"}, {"switchPolicy": "Live"}
    deaths = [Death(guarded, moment) for moment in moments_of(several[0], guarded)]
    deaths += [Death(live, moment) for moment in moments_of(several[0], live)[::4]]
    ready = time.monotonic()
    survivals = survive_all(several, deaths)

    doubtful = [survival.suspended for survival in survivals if survival.in_doubt]
    certain = [survival.suspended for survival in survivals if not survival.in_doubt]
    print(
        f"{len(deaths)} moments in {time.monotonic() - started:.0f} s, {ready - started:.0f} s of it to begin with; "
        f"suspended for at most {max(certain):.1f} s, in doubt {max(doubtful):.1f} s"
    )
    assert len(survivals) == len(deaths)
    assert doubtful
    assert certain
    wrong = [str(survival) for survival in survivals if survival.wrong]
    assert not wrong, "\n".join(wrong)


def moments_of(guest: Domain, spec: Mapping[str, Any]) -> list[Moment]:
    """Every moment of a backup in which nothing goes wrong."""
    task = task_of(guest, spec)
    report, moments, _ = Driving(task).end()
    assert report.outcome is Outcome.SUCCEEDED, report
    assert not list(what_is_wrong(guest, task, report))
    return moments


def survive_all(several: Sequence[Domain], deaths: Sequence[Death]) -> list[Survival]:
    """Let each guest survive one death after the other, all guests at once; most guests those that wait long."""
    doubtful: Queue[Death] = Queue()
    certain: Queue[Death] = Queue()
    for death in deaths:
        (doubtful if death.moment.in_call else certain).put(death)
    one_at_once = Lock()  # killed one by one, so that what follows is not measured on a machine under full load

    def work(guest: Domain, queue: Queue[Death]) -> list[Survival]:
        survived: list[Survival] = []
        while True:
            try:
                survived.append(survive(guest, queue.get_nowait(), one_at_once))
            except Empty:
                return survived

    queues = [certain] * QUICK + [doubtful] * WAITING
    with ThreadPoolExecutor(len(several)) as pool:
        return [survival for survived in pool.map(work, several, queues) for survival in survived]


def survive(guest: Domain, death: Death, one_at_once: Lock) -> Survival:
    """Kill the driver of a backup at this moment, and let another carry on."""
    for _ in range(3):  # when a job is READY, and so the order of some steps, is not the same in every run
        task = task_of(guest, death.spec, death.moment)
        with one_at_once:
            killed = Driving(task).killed()
        if killed:
            break
    else:
        return Survival(death, wrong=("it never came by",))
    record = record_of(task.state_dir, task.uid)
    in_doubt = record is not None and record.call is not None
    started = time.monotonic()
    second = Driving(task_of(guest, death.spec, uid=task.uid))
    suspended = longest_suspension(guest, second)
    report, _, reasons = second.end(0)
    seconds = time.monotonic() - started

    wrong = list(what_is_wrong(guest, task, report))
    if report.outcome is not Outcome.SUCCEEDED:
        wrong.append(f"it ended {report.outcome}: {report.reason}: {report.message}; {reasons}")
    limit = SUSPENDED_SECONDS_IN_DOUBT if in_doubt else SUSPENDED_SECONDS
    if suspended > limit:
        wrong.append(f"the guest was left suspended for {suspended:.1f} s")
    if seconds > limit + 10:
        wrong.append(f"it took {seconds:.1f} s; {reasons}")
    shutil.rmtree(task.directory / "store", ignore_errors=True)
    return Survival(death, in_doubt, suspended, tuple(wrong))


def task_of(guest: Domain, spec: Mapping[str, Any], moment: Moment | None = None, uid: str = "") -> Task:
    return Task(
        uri=guest.libvirtd.uri,
        config_dir=guest.libvirtd.config_dir,
        directory=guest.directory,
        domain=guest.name,
        targets=tuple(guest.bases),
        uid=uid or str(uuid.uuid4()),
        spec=spec,
        moment=moment,
    )


def longest_suspension(guest: Domain, driving: Driving) -> float:
    """How long the guest stands still at one stretch, in seconds, until the driver has ended."""
    longest, since = 0.0, time.monotonic()
    while not driving.ended(0.1):
        now = time.monotonic()
        assert now - since < 120 or longest < 120, "the guest is suspended for ever"
        if guest.guest.state()[0] is GuestState.PAUSED:
            longest = max(longest, now - since)
        else:
            since = now
    return longest


def what_is_wrong(guest: Domain, task: Task, report: Report) -> Iterator[str]:
    """All that is not as it must be once a backup has ended with its chain home."""
    if (state := guest.guest.state()[0]) is not GuestState.RUNNING:
        yield f"the guest is {state}"
    if left := [path.name for path in guest.directory.glob("*.vmb-*")]:
        yield f"overlays are left: {left}"
    on_disk = (guest.libvirtd.config_dir / f"{guest.name}.xml").read_text()
    sources = {disk.target: disk.source for disk in chain.disks(on_disk)}
    for target, base in guest.bases.items():
        named = guest.live(target).source, guest.persistent(target).source, sources[target]
        if set(named) != {base}:
            yield f"{target}: live XML, persistent XML and the one on disk name {named}"
        if (count := records_in(content(Path(base)))) != task.diary.acknowledged:
            yield f"{target}: of {task.diary.acknowledged} records it holds {count}"
    if report.outcome is Outcome.SUCCEEDED:
        yield from what_is_wrong_with_the_copy(task, Path(report.location))


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
