"""What decide() never does, over many thousand situations."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from tests.unit.decisions import DATA, EMPTY, LOCKED, ON_BASE, ON_OVERLAY, Fields, on, record
from vmbackup.protocol.decide import decide
from vmbackup.protocol.record import Copy, Guard, Image, Record, Snapshot
from vmbackup.protocol.terms import Do, Intent, Mirror, Observation, Power

ENDS = ((False, False), (True, False), (False, True))


def every_situation(power: Power) -> list[tuple[Intent, Record, Observation]]:
    intents = [Intent(deleted=deleted, cancelled=cancelled, backoff_limit=1) for deleted, cancelled in ENDS]
    jobs = [
        {},
        {"mirror": Mirror.READY, "job": True},
        {"mirror": Mirror.READY},
        {"job": True, "job_at_end": True},
    ]
    observations = [
        replace(on(live, persistent, overlay, power, **job, **written), config_failing=failing)
        for live, persistent, overlay in product("BOX", ("B", "O", "X", None), (None, LOCKED, EMPTY, DATA))
        for job in (jobs if live == "O" else jobs[:1])
        for written in ({}, {"written": "B"}, {"written": "O"})[: 3 if overlay is LOCKED else 1]
        for failing in (False, True)
    ]
    disks: list[Fields] = [
        {"settled": settled, **marks}
        for settled in (None, ON_BASE, ON_OVERLAY)
        for marks in ({}, {"commit_begun": True, "failures": 2}, {"commit_begun": True, "pivot_intended": True})
    ]
    records = [
        record(disk, snapshot=snapshot, copy=copy, guard=Guard.OURS, **more)
        for disk, snapshot, copy in product(disks, Snapshot, (Copy.OPEN, Copy.STORED))
        for more in ({}, {"quarantined": "why", "orphan": True}, {"gave_up": True, "finished": True, "orphan": True})
    ]
    return list(product(intents, records, observations))


NEVER_WHILE_SUSPENDED = {Do.RELEASE, Do.DONE, Do.WAIT, Do.COPY, Do.SHIP, Do.FINISH, Do.QUARANTINE, Do.COMMIT, Do.THAW}


def test_it_never_rests_nor_releases_while_the_guest_is_suspended_by_us():
    for situation in every_situation(Power.PAUSED):
        assert decide(*situation).do not in NEVER_WHILE_SUSPENDED, situation


def test_no_overlay_is_removed_but_on_a_settled_definition():
    removed = [
        (known.disks[0], seen.disks[0])
        for power in (Power.RUNNING, Power.PAUSED)
        for intent, known, seen in every_situation(power)
        if decide(intent, known, seen).do is Do.REMOVE_OVERLAY
    ]
    assert removed
    for disk, found in removed:
        assert found.truth is Image.BASE
        assert found.persistent is None or (found.persistent is Image.BASE and disk.settled == ON_BASE)


def test_only_our_images_are_ever_written_into_the_definition():
    redefined = [
        (action, seen.disks[0])
        for intent, known, seen in every_situation(Power.RUNNING)
        if (action := decide(intent, known, seen)).do is Do.REDEFINE
    ]
    assert redefined
    for action, found in redefined:
        assert action.images
        assert {image for _, image in action.images} <= {Image.BASE, Image.OVERLAY}
        assert found.persistent in (Image.BASE, Image.OVERLAY)
