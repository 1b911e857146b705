"""Proves a guest after a killed backup (tests/support/kill_points.py) has ended: nothing lost, its disks home."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from tests.support.domains import Domain, wait_until
from tests.support.kill_points import BARRIER_SECONDS, Driving, Interruption, Moment, Task, When, records_in
from tests.support.proof import (
    content,
    copies,
    damaged,
    not_on_base,
    sources_on_disk,
    wrong_digests,
    wrong_records,
)
from vmbackup.api.status import Outcome, Report
from vmbackup.errors import TransientError
from vmbackup.protocol.terms import Power
from vmbackup.reconcile.state.journal import records

SUSPENDED = Moment(When.AFTER, "journal call=None", 2)  # the answer of the first suspension is written
CHANCES = 3  # for a driver to come by a moment
SUSPENDED_SECONDS = 5.0  # at most, after somebody is there to end it
SUSPENDED_SECONDS_IN_DOUBT = 45.0  # where a call was left unanswered: the barrier of 31 s, and 14 s


def task_of(
    guest: Domain,
    spec: Mapping[str, Any],
    moment: Moment | None = None,
    uid: str = "",
    interruption: Interruption = Interruption.KILL,
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
        interruption=interruption,
    )


def longest_allowed(*, in_doubt: bool) -> float:
    """For how many seconds at most a driver may leave its guest suspended. `in_doubt`: a call was left unanswered."""
    return SUSPENDED_SECONDS_IN_DOUBT - 31 + BARRIER_SECONDS if in_doubt else SUSPENDED_SECONDS


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


def one_of_each_kind(moments: Sequence[Moment]) -> list[Moment]:
    """A fixed sample: one moment of each kind of event; which one, and on which disk, goes round from kind to kind."""
    kinds: dict[str, list[Moment]] = {}
    for moment in moments:
        kinds.setdefault(moment.event.replace("vdb", "vda"), []).append(moment)
    return [alike[number % len(alike)] for number, alike in enumerate(kinds.values())]


def dies(task_at_its_moment: Callable[[], Task]) -> tuple[Task, str]:
    """Let a driver die at the moment of its task. Returns the task, and what happened if it was not killed there.

    What a backup comes by depends a little on how fast others are, so it gets several chances, each with a new task.
    """
    for chance in count(1):
        task = task_at_its_moment()
        driving = Driving(task)
        if driving.killed():
            break
        missed = f"it never came by {task.moment}: {driving}"
        print(missed)
        if chance == CHANCES:
            return task, missed
    return task, ""


def longest_suspension(guest: Domain, driving: Driving, tend: Callable[[], object] = lambda: None) -> float:
    """The longest time for which the guest is suspended, in seconds, until the driver has ended.

    `tend` is called again and again meanwhile. A libvirtd that is away delays all until it is back.
    """
    longest, since, started = 0.0, time.monotonic(), time.monotonic()
    while not driving.ended(0.25):
        tend()
        now = time.monotonic()
        assert now - started < 120, f"{driving.task.moment}: no end, the guest is {guest.guest.state()}"
        try:
            suspended = guest.guest.state()[0] is Power.PAUSED
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
    named = {
        "live XML": {target: guest.live(target).source for target in guest.bases},
        "persistent XML": {target: guest.persistent(target).source for target in guest.bases},
        "XML on disk": sources_on_disk(guest.libvirtd, guest.name),
    }
    yield from not_on_base(named, guest.bases)
    acknowledged = task.diary.acknowledged
    images = {target: Path(base) for target, base in guest.bases.items()}
    yield from wrong_records(images, (acknowledged, acknowledged + 1))  # one more: its acknowledgement may be lost
    if report.outcome is Outcome.SUCCEEDED:
        yield from what_is_wrong_with_the_copy(task, Path(report.location))


def runs(guest: Domain) -> bool:
    """Whether the guest runs; libvirt may show an event of QEMU late on a busy machine."""
    try:
        wait_until(lambda: guest.guest.state()[0] is Power.RUNNING, "running", seconds=5)
    except TimeoutError:
        return False
    return True


def what_is_wrong_with_the_copy(task: Task, folder: Path) -> Iterator[str]:
    """The copies must be intact, and hold what the guest had written when the snapshot was taken, all disks alike."""
    expected = task.diary.snapshots(task.uid)
    stored = copies(folder)
    yield from wrong_digests(folder)
    yield from damaged(stored.values(), leaks=True)
    counts = Counter(records_in(content(copy)) for copy in stored.values())
    if len(counts) > 1 or not counts.keys() <= expected:
        yield f"the copies hold {sorted(counts.elements())} records; at the snapshot there were {sorted(expected)}"
