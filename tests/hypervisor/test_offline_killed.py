"""SIGKILL at every moment of a merge while the guest is off, the guest run in between or not: nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import pytest

from sandbox.libvirtd import Libvirtd
from tests.support.domains import Domain, DomainFactory, starts, wait_until
from tests.support.kill_points import FIRST_SLOT, SLOT, Driving, Moment, Task, When, pattern
from tests.support.proof import not_on_base, sources_on_disk, wrong_records
from tests.support.survival import dies, distinct, one_of_each_kind, task_of, what_is_wrong_with_the_copy
from vmbackup.api.status import Outcome
from vmbackup.hypervisor import chain
from vmbackup.imaging.locks import has_writer, is_locked
from vmbackup.protocol.terms import Power
from vmbackup.reconcile.state.journal import record_of

GUESTS = 12  # at once: those that wait for PROTOCOL R4's barrier cost nothing
OFFLINE: dict[str, Any] = {"commit": {"offline": True}}
COMMIT_BEGUN = Moment(When.AFTER, "journal vda.commit_begun")
MARKED = Moment(When.AFTER, "journal vda.merged, vda.settled")


@dataclass(frozen=True)
class Death:
    """When the driver is killed, and whether the guest runs and writes before the next driver starts."""

    moment: Moment
    runs_between: bool

    def __str__(self) -> str:
        return f"killed {self.moment}{', then the guest ran' if self.runs_between else ''}"


@pytest.mark.timeout(400)
def test_a_merge_killed_once_in_each_kind_of_moment_is_carried_on_and_nothing_is_lost(domain: DomainFactory) -> None:
    first, *others = (running_guest(domain) for _ in range(GUESTS))
    moments = moments_of(first)
    assert MARKED in moments
    deaths = [Death(moment, runs) for moment, runs in zip(one_of_each_kind(moments), cycle([True, False]))]
    deaths += [Death(MARKED, runs) for runs in (True, False)]
    wrong = survive_all(others, deaths)
    print(f"{len(deaths)} moments")
    assert not wrong, "\n".join(wrong)


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_merge_killed_at_any_moment_is_carried_on_and_nothing_is_lost(domain: DomainFactory) -> None:
    first, *others = (running_guest(domain) for _ in range(GUESTS))
    deaths = [Death(moment, runs) for moment in moments_of(first) for runs in (True, False)]
    wrong = survive_all(others, deaths)
    assert not wrong, "\n".join(wrong)


def test_a_driver_killed_while_qemu_img_merges_takes_it_along_and_the_next_one_merges_again(
    domain: DomainFactory, libvirtd: Libvirtd
) -> None:
    guest = domain(size="16M")
    guest.write("vda", 0x11, length="8M")
    slow: dict[str, Any] = {"commit": {"offline": True, "bandwidth": "1Mi"}}
    task = begun(guest, slow, write="4M")
    driving = Driving(task)
    overlay = Path(overlays(task)[0])
    wait_until(lambda: has_writer(overlay), "qemu-img merges")
    driving.kill()
    assert driving.killed()
    wait_until(lambda: not is_locked(overlay), "qemu-img goes with its driver: the guest could start")
    report, _, _ = Driving(task_of(guest, slow, uid=task.uid)).end()
    assert report.outcome is Outcome.SUCCEEDED, report
    assert not list(guest.directory.glob("*.vmb-*"))
    libvirtd.virsh("start", guest.name, "--paused")
    assert guest.holds("vda", 0x22, "0", "4M")
    assert guest.holds("vda", 0x11, "4M", "4M")


def test_an_overlay_written_since_it_was_merged_is_never_removed(domain: DomainFactory, libvirtd: Libvirtd) -> None:
    """Not even if the user edits the definition meanwhile."""
    guest = domain(size="16M")
    task = begun(guest, OFFLINE, write="4M")
    assert Driving(task_of(guest, OFFLINE, MARKED, uid=task.uid)).killed()
    overlay = Path(overlays(task)[0])
    libvirtd.virsh("start", guest.name, "--paused")
    guest.write("vda", 0x33, "0", "1M")
    libvirtd.virsh("destroy", guest.name)
    xml = guest.guest.persistent_xml() or ""
    disk = record_of(task.state_dir, task.uid)
    assert disk is not None
    guest.guest.define(chain.with_images(xml, {"vda": disk.disks[0].persistent_disk_xml}))

    driving = Driving(task_of(guest, OFFLINE, uid=task.uid))
    wait_until(lambda: "compare them" in quarantine(task), "quarantined")
    driving.kill()
    assert overlay.exists()
    assert str(overlay) in quarantine(task)


def quarantine(task: Task) -> str:
    record = record_of(task.state_dir, task.uid)
    return record.quarantined if record else ""


def running_guest(domain: DomainFactory) -> Domain:
    guest = domain({"vda": "raw", "vdb": "qcow2"}, size="4M")
    guest.libvirtd.virsh("resume", guest.name)
    return guest


def begun(guest: Domain, spec: dict[str, Any], write: str = "") -> Task:
    """A backup whose copy is decided, whose driver is dead, and whose guest is off on its overlay."""
    task = task_of(guest, spec, COMMIT_BEGUN)
    assert Driving(task).killed()
    if write:
        guest.write("vda", 0x22, length=write)
    guest.libvirtd.virsh("destroy", guest.name)
    return task_of(guest, spec, uid=task.uid)


def overlays(task: Task) -> list[str]:
    record = record_of(task.state_dir, task.uid)
    assert record is not None
    return [disk.overlay for disk in record.disks]


def moments_of(guest: Domain) -> list[Moment]:
    """Every moment of the way home of a guest that is off, if nothing goes wrong."""
    task = begun(guest, OFFLINE)
    report, moments, _ = Driving(task).end()
    assert report.outcome is Outcome.SUCCEEDED, report
    return distinct(moments)


def survive_all(guests: Sequence[Domain], deaths: Sequence[Death]) -> list[str]:
    """Let each guest survive one death after the other, all guests at once: all that is wrong."""
    queue: Queue[Death] = Queue()
    for death in sorted(deaths, key=lambda death: not death.moment.in_call):  # those that take long first
        queue.put(death)

    def work(guest: Domain) -> list[str]:
        wrong: list[str] = []
        while True:
            try:
                death = queue.get_nowait()
            except Empty:
                return wrong
            wrong += [f"{death}: {each}" for each in survive(guest, death)]

    with ThreadPoolExecutor(len(guests)) as pool:
        return [each for wrong in pool.map(work, guests) for each in wrong]


def survive(guest: Domain, death: Death) -> Iterator[str]:
    """Kill the driver at this moment, let the guest write where that is asked for, and let another driver carry on."""

    def begun_again() -> Task:
        if guest.guest.state()[0] is Power.OFF:  # by an attempt that did not come by
            guest.libvirtd.virsh("start", guest.name)
        return task_of(guest, OFFLINE, death.moment, uid=begun(guest, OFFLINE).uid)

    task, missed = dies(begun_again)
    if missed:
        yield missed
        return
    if death.runs_between:
        run_and_write(guest, task)
    report, _, reasons = Driving(replace(task, moment=None)).end()
    if report.outcome is not Outcome.SUCCEEDED:
        yield f"it ended {report.outcome}: {report.reason}: {report.message}; {reasons}"
    yield from what_is_wrong(guest, task)
    if report.outcome is Outcome.SUCCEEDED:
        yield from what_is_wrong_with_the_copy(task, Path(report.location))
    guest.libvirtd.virsh("start", guest.name)


def run_and_write(guest: Domain, task: Task) -> None:
    """The user starts the guest, it writes its next record to each disk, and is stopped."""
    wait_until(lambda: starts(guest, "--paused"), "a qemu-img that has outlived its driver has ended")
    number = task.diary.acknowledged
    for target in guest.bases:
        guest.libvirtd.qemu_io(guest.name, target, f"write -f -P {pattern(number)} {FIRST_SLOT + number * SLOT} {SLOT}")
    task.diary.note("record")
    guest.libvirtd.virsh("destroy", guest.name)


def what_is_wrong(guest: Domain, task: Task) -> Iterator[str]:
    if left := [path.name for path in guest.directory.glob("*.vmb-*")]:
        yield f"overlays are left: {left}"
    named = {
        "persistent XML": {target: guest.persistent(target).source for target in guest.bases},
        "XML on disk": sources_on_disk(guest.libvirtd, guest.name),
    }
    yield from not_on_base(named, guest.bases)
    yield from wrong_records({target: Path(base) for target, base in guest.bases.items()}, [task.diary.acknowledged])
