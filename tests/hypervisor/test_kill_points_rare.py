"""SIGKILL at the calls that a backup makes only where a commit does not converge, or where its bandwidth is changed.

And that no call is forgotten: the list of all that change something is taken from the code.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.backups import SLOW
from tests.support.domains import Domain, DomainFactory, GuestFactory
from tests.support.kill_points import Driving, Interruption, Moment, When
from tests.support.survival import moments_of, task_of, what_is_wrong
from tests.support.tiers import in_chaos
from vmbackup.api.status import Outcome
from vmbackup.hypervisor import guest as guest_module

LIMIT, BANDWIDTH = "limiting vda", "setting the bandwidth of the block job of vda"
FAST = {"commit": {"bandwidth": "1Gi"}}
SLOWLY = {"commit": {"bandwidth": SLOW}}
THROTTLING = {"commit": {"bandwidth": SLOW, "deadlineSeconds": 1, "stallPolicy": "Throttle"}}
USERS = {"write_bytes_sec": 80_000_000}  # limits of the guest's disk

# What a plain backup does not call: its kills are here, and those of a thaw in test_guardian.py.
RARE = {"limiting", "setting the bandwidth of the block job of", "thawing the file systems"}
WORDS = r"(?:doing = |self\._(?:change|agent)\()f?'([^'{]+)"


@dataclass(frozen=True)
class Deaths:
    """The drivers of one backup: each is killed at its moment, and the next one carries on."""

    name: str
    drivers: Sequence[tuple[Mapping[str, Any], Moment]]


def deaths() -> Iterator[Deaths]:
    throttled = THROTTLING, Moment(When.AFTER, "journal call=None, vda.throttle")
    under_way = SLOWLY, Moment(When.AFTER, "journal call=None")
    for when in When:
        yield Deaths(f"{when} the guest is throttled", [(THROTTLING, Moment(when, LIMIT))])
        yield Deaths(f"{when} its own limits are back", [throttled, (FAST, Moment(when, LIMIT))])
        yield Deaths(f"{when} the bandwidth is changed", [under_way, (FAST, Moment(when, BANDWIDTH))])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("step", [4, in_chaos(1)], ids=["each kind once", "all"])
def test_a_driver_killed_while_it_throttles_is_carried_on_and_the_limits_are_the_users(
    domain: DomainFactory, step: int
) -> None:
    """Whether it limits the guest or the commit."""
    every = list(deaths())[::step]
    several = [domain(size="32M") for _ in every]
    with ThreadPoolExecutor(len(every)) as pool:
        wrong = [each for each in pool.map(survive, several, every) if each]
    assert not wrong, "\n".join(wrong)


def survive(guest: Domain, deaths: Deaths) -> str:
    """All that is wrong in the end."""
    guest.libvirtd.virsh("resume", guest.name)
    guest.libvirtd.virsh(
        "blkdeviotune", guest.name, "vda", "--live", "--write-bytes-sec", str(USERS["write_bytes_sec"])
    )
    uid = hold_before_the_commit(guest)
    wrong: list[str] = []
    for spec, moment in deaths.drivers:
        driving = Driving(task_of(guest, spec, moment, uid))
        if not driving.killed():
            wrong.append(f"it never came by {moment}: {driving}")
    task = task_of(guest, FAST, uid=uid)
    report, _, reasons = Driving(task).end()
    if report.outcome is not Outcome.SUCCEEDED:
        wrong.append(f"it ended {report.outcome}: {report.message}; {reasons}")
    if (limits := guest.guest.byte_limits("vda")) != USERS:
        wrong.append(f"the guest is limited to {limits}")
    wrong += what_is_wrong(guest, task, report)
    return f"killed {deaths.name}: {'; '.join(wrong)}" if wrong else ""


def hold_before_the_commit(guest: Domain) -> str:
    """Let the overlay of a backup grow by far more than QEMU merges before it keeps to a limit. Returns its uid."""
    task = task_of(guest, {}, Moment(When.AFTER, "journal vda.commit_begun"), interruption=Interruption.HOLD)
    driving = Driving(task)
    assert driving.wait_until_held()
    guest.write("vda", 0, offset="4M", length="28M")  # zeros: behind the records nothing else may be
    driving.kill()
    return task.uid


def test_every_call_that_changes_something_is_among_the_moments_at_which_a_driver_is_killed(
    guests: GuestFactory,
) -> None:
    events = {moment.event for moment in moments_of(guests(1)[0], {"switchPolicy": "Guarded"})}
    calls = set(mutating_calls())
    assert len(calls) > 8
    assert {call for call in calls if not any(event.startswith(call) for event in events)} == RARE


def mutating_calls() -> Iterator[str]:
    """What a Guest calls that changes something: the words for it, up to the name of a disk."""
    for function in ast.walk(ast.parse(inspect.getsource(guest_module))):
        if not isinstance(function, ast.FunctionDef):
            continue
        code = ast.unparse(function)
        if re.search(r"self\._(change|agent)\(", code) and (words := re.search(WORDS, code)):
            yield words[1].strip()
