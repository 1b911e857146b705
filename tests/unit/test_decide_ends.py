"""How decide() ends: failed attempts, deletion, the doings of others, several disks; and when QEMU is asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.unit.decisions import (
    CANCELLED,
    DATA,
    DELETED,
    EMPTY,
    LIMIT_1,
    LOCKED,
    ON_BASE,
    ON_OVERLAY,
    VDA,
    Row,
    committing,
    disk_seen,
    finished,
    fresh,
    home,
    off,
    on,
    on_overlay,
    pivoted,
    pivoting,
    ready,
    rows,
    seen,
    taken,
)
from vmbackup.protocol import advice
from vmbackup.protocol.decide import needs_truth
from vmbackup.protocol.record import Copy, Guard, Image, Record, Snapshot
from vmbackup.protocol.terms import DiskSeen, Do, Mirror, Observation, Power

FAILED_TWICE = {"commit_running": False, "failures": 2}


@rows(
    Row(
        "not before the pause is over",
        committing(FAILED_TWICE | {"retry_at": 9.0}),
        seen(on_overlay(), now=8.0),
        Do.WAIT,
        more={"until": 9.0},
    ),
    Row("then again", committing(FAILED_TWICE | {"retry_at": 9.0}), seen(on_overlay(), now=9.0), Do.COMMIT),
    Row("beyond the limit: give up", committing(FAILED_TWICE), on_overlay(), Do.GIVE_UP, LIMIT_1),
    Row("given up: what was copied is shipped", committing(FAILED_TWICE, gave_up=True), on_overlay(), Do.SHIP),
    Row("… the backup ends", committing(FAILED_TWICE, gave_up=True, copy=Copy.STORED), on_overlay(), Do.FINISH),
    Row(
        "… and stays so", committing(FAILED_TWICE, gave_up=True, copy=Copy.STORED, finished=True), on_overlay(), Do.DONE
    ),
    Row("a pivot that failed: settle and resume", pivoting({"retry_at": 9.0}), ready(Power.PAUSED), Do.RESUME),
    Row("… then clear its intent", pivoting({"retry_at": 9.0}, guard=Guard.NONE), ready(), Do.CLEAR_PIVOT),
    Row("beyond the limit, suspended: resume first", pivoting(FAILED_TWICE), ready(Power.PAUSED), Do.RESUME, LIMIT_1),
    Row("given up, suspended: resume first", pivoting(gave_up=True), ready(Power.PAUSED), Do.RESUME),
)
def test_failed_attempts(row: Row):
    row.check()


@rows(
    Row("not begun: nothing to undo", fresh(), home(), Do.FAIL_BACKUP, CANCELLED),
    Row("not begun, over with: finish", fresh(copy=Copy.FAILED), home(), Do.FINISH, CANCELLED),
    Row("finished: nothing is released", fresh(copy=Copy.FAILED, finished=True), home(), Do.DONE, CANCELLED),
    Row("not begun, and off", fresh(), off("B"), Do.FAIL_BACKUP, CANCELLED),
    Row(
        "snapshot intended, suspended: resume",
        fresh(snapshot=Snapshot.INTENDED, guard=Guard.OURS),
        home(Power.PAUSED),
        Do.RESUME,
        CANCELLED,
    ),
    Row("copying: the copy ends", taken(), on_overlay(), Do.FAIL_BACKUP, CANCELLED),
    Row("committing: on it goes", committing(), on_overlay(mirror=Mirror.PENDING, job=True), Do.WAIT, CANCELLED),
    Row("READY: it is pivoted", committing(), ready(), Do.INTEND_PIVOT, CANCELLED),
    Row("home, copy taken: not shipped any more", pivoted(), home(), Do.FAIL_BACKUP, CANCELLED),
    Row("home, copy stored: too late", fresh(copy=Copy.STORED, snapshot=Snapshot.DONE), home(), Do.FINISH, CANCELLED),
    Row("off on its overlay, copy open: the copy ends", taken(), off("O", DATA), Do.FAIL_BACKUP, CANCELLED),
    Row("off on its overlay: wait for it", committing(copy=Copy.FAILED), off("O", DATA), Do.WAIT, CANCELLED),
    Row("off, copy taken: not shipped any more", taken(copy=Copy.TAKEN), off("O", DATA), Do.WAIT, CANCELLED),
    Row("quarantined: no orphan", taken(quarantined=advice.overlay_gone(VDA)), off("O"), Do.WAIT, CANCELLED),
    Row(
        "an adopted overlay goes home first", taken(snapshot=Snapshot.ADOPTED), on_overlay(), Do.BEGIN_COMMIT, CANCELLED
    ),
)
def test_cancelled_it_ends_as_one_that_was_deleted_but_nothing_is_released(row: Row):
    row.check()


@rows(
    Row("not begun: nothing to undo", fresh(), home(), Do.FAIL_BACKUP, DELETED),
    Row("not begun, over with: finish", fresh(copy=Copy.FAILED), home(), Do.FINISH, DELETED),
    Row("not begun, finished: release", fresh(copy=Copy.FAILED, finished=True), home(), Do.RELEASE, DELETED),
    Row(
        "snapshot intended, suspended: resume",
        fresh(snapshot=Snapshot.INTENDED, guard=Guard.OURS),
        home(Power.PAUSED),
        Do.RESUME,
        DELETED,
    ),
    Row("copying: the copy ends", taken(), on_overlay(), Do.FAIL_BACKUP, DELETED),
    Row("committing: on it goes", committing(), on_overlay(mirror=Mirror.PENDING, job=True), Do.WAIT, DELETED),
    Row("READY: it is pivoted", committing(), ready(), Do.INTEND_PIVOT, DELETED),
    Row("pivoted: O is removed", pivoted(), on("B", "B", DATA), Do.REMOVE_OVERLAY, DELETED),
    Row("home, copy taken: not shipped any more", pivoted(), home(), Do.FAIL_BACKUP, DELETED),
    Row("home, finished: release", finished(), home(), Do.RELEASE, DELETED),
    Row("off on its overlay, copy open: the copy ends", taken(), off("O", DATA), Do.FAIL_BACKUP, DELETED),
    Row(
        "off on its overlay: record the orphan", committing(copy=Copy.FAILED), off("O", DATA), Do.RECORD_ORPHAN, DELETED
    ),
    Row("… then release", committing(copy=Copy.FAILED, orphan=True), off("O", DATA), Do.RELEASE, DELETED),
    Row(
        "quarantined: record the orphan",
        taken(quarantined=advice.overlay_gone(VDA)),
        off("O"),
        Do.RECORD_ORPHAN,
        DELETED,
    ),
    Row(
        "quarantined while on: record the orphan",
        fresh(quarantined=advice.overlay_in_use(VDA)),
        on("B", "B", LOCKED),
        Do.RECORD_ORPHAN,
        DELETED,
    ),
    Row(
        "given up: record the orphan",
        committing(gave_up=True, copy=Copy.STORED, finished=True),
        on_overlay(),
        Do.RECORD_ORPHAN,
        DELETED,
    ),
    Row("off and home: release", finished(), off("B"), Do.RELEASE, DELETED),
)
def test_deletion(row: Row):
    row.check()


@rows(
    Row("before the snapshot: wait", fresh(), home(foreign_job=True), Do.WAIT),
    Row("before the commit: wait", committing({"commit_running": False}), on_overlay(foreign_job=True), Do.WAIT),
    Row("migrating: touch nothing", fresh(), seen(home(), migrating=True), Do.WAIT),
    Row(
        "migrating, suspended by us: resume",
        taken(guard=Guard.OURS),
        seen(on_overlay(Power.PAUSED), migrating=True),
        Do.RESUME,
    ),
    Row(
        "migrating, a switch intended, not suspended yet: wait",
        fresh(snapshot=Snapshot.INTENDED, guard=Guard.OURS),
        seen(home(), migrating=True),
        Do.WAIT,
    ),
    Row(
        "migrating, suspended for the snapshot: resume",
        fresh(snapshot=Snapshot.INTENDED, guard=Guard.OURS),
        seen(home(Power.PAUSED), migrating=True),
        Do.RESUME,
    ),
)
def test_somebody_elses_job(row: Row):
    row.check()


def on_ready(power: Power = Power.RUNNING, **more: Any) -> Observation:
    return on_overlay(power, mirror=Mirror.READY, job=True, job_at_end=True, **more)


def off_changed(persistent: str) -> Observation:
    return Observation(Power.OFF, (disk_seen(None, persistent, DATA, base_changed=True),))


@rows(
    Row("L is another image, O left: quarantine", taken(), on("X", "X", DATA), Do.QUARANTINE),
    Row("… suspended by us: resume first", taken(guard=Guard.OURS), on("X", "X", DATA, Power.PAUSED), Do.RESUME),
    Row("L is another image, nothing begun: refuse", fresh(), on("X", "X"), Do.REFUSE),
    Row("P is another image, nothing begun: refuse", fresh(), on("B", "X"), Do.REFUSE),
    Row("L is another image, all is over: P is not touched", finished(), on("X", "X"), Do.DONE),
    Row("… not even if not settled", pivoted({"settled": None}, copy=Copy.STORED), on("X", "X"), Do.FINISH),
    Row("P was changed meanwhile: copy on", taken(), on("O", "X", LOCKED), Do.COPY),
    Row("P was changed meanwhile: O may be below it", pivoted(), on("B", "X", DATA), Do.QUARANTINE),
    Row("off, P was changed, O empty: O may be below it", taken(), off("X", EMPTY), Do.QUARANTINE),
    Row("off, P was changed, no O: done", finished(), off("X"), Do.DONE),
)
def test_an_image_that_is_not_ours(row: Row):
    row.check()


@rows(
    Row("copying", taken(), on_overlay(base_changed=True), Do.QUARANTINE),
    Row("the copy is taken", taken(copy=Copy.TAKEN), on_overlay(base_changed=True), Do.QUARANTINE),
    Row(
        "a pivot was intended: it is not any more",
        pivoting(guard=Guard.NONE),
        on_ready(base_changed=True),
        Do.CLEAR_PIVOT,
    ),
    Row("… suspended by us", pivoting(), on_ready(Power.PAUSED, base_changed=True), Do.RESUME),
    Row("O is left", pivoted(), on("B", "B", DATA, base_changed=True), Do.QUARANTINE),
    Row("nothing begun: refuse", fresh(), home(base_changed=True), Do.REFUSE),
    Row(
        "quarantined: it stays so",
        taken(quarantined=advice.base_changed(VDA)),
        on_overlay(base_changed=True),
        Do.WAIT,
    ),
    Row("the original is back", taken(quarantined="why"), on_overlay(), Do.LIFT_QUARANTINE),
    Row("off: not merged", taken(copy=Copy.TAKEN), off_changed("O"), Do.QUARANTINE, {"offline": True}),
    Row("off, pivoted: not unlinked", pivoted(), off_changed("B"), Do.QUARANTINE),
)
def test_a_base_that_is_another_file_now(row: Row):
    row.check()


def two(first: DiskSeen, second: DiskSeen, power: Power = Power.RUNNING) -> Observation:
    return Observation(power, (first, replace(second, target="vdb")))


def two_disks(of: Record, **second: Any) -> Record:
    disk = of.disks[0]
    return replace(of, disks=(disk, replace(disk, target="vdb", **second)))


BASE_SEEN, OVERLAY_SEEN = disk_seen("B", "B", None), disk_seen("O", "O", LOCKED)


@rows(
    Row(
        "apart before the copy is complete: it is worthless",
        two_disks(taken({"settled": ON_BASE}), settled=ON_OVERLAY),
        two(BASE_SEEN, OVERLAY_SEEN),
        Do.FAIL_BACKUP,
    ),
    Row(
        "P of all disks is redefined at once",
        two_disks(taken()),
        two(disk_seen("O", "B", LOCKED), disk_seen("O", "B", LOCKED)),
        Do.REDEFINE,
        more={"images": (("vda", Image.OVERLAY), ("vdb", Image.OVERLAY))},
    ),
    Row(
        "the second commits while the first does",
        two_disks(committing(), commit_running=False),
        two(replace(OVERLAY_SEEN, mirror=Mirror.PENDING, job=True), OVERLAY_SEEN),
        Do.COMMIT,
        more={"target": "vdb"},
    ),
    Row(
        "the first comes home while the second is beyond its limit",
        two_disks(committing(), failures=2),
        two(replace(OVERLAY_SEEN, mirror=Mirror.READY, job=True), OVERLAY_SEEN),
        Do.INTEND_PIVOT,
        LIMIT_1,
        {"target": "vda"},
    ),
    Row(
        "one home, the other beyond its limit: give up",
        two_disks(pivoted(), settled=ON_OVERLAY, failures=2, pivot_intended=False),
        two(BASE_SEEN, OVERLAY_SEEN),
        Do.GIVE_UP,
        LIMIT_1,
    ),
)
def test_two_disks(row: Row):
    row.check()


@pytest.mark.parametrize(
    ("seen", "doubt", "quarantined", "asked"),
    [
        (home(), False, "", False),
        (on_overlay(), False, "", False),
        (ready(), False, "", False),
        (home(), True, "", True),
        (home(), False, "why", True),
        (on("B", "B", LOCKED), False, "", True),
        (on("O", "O", DATA), False, "", True),
        (on_overlay(mirror=Mirror.READY), False, "", True),
        (on_overlay(job=True), False, "", True),
        (off("O", DATA), True, "why", False),
    ],
)
def test_qemu_is_asked_only_where_there_is_reason_to(seen: Observation, doubt: bool, quarantined: str, asked: bool):
    assert needs_truth(taken(quarantined=quarantined), seen, doubt=doubt) is asked
