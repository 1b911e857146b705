"""decide() where others change what is under the guest: another file for base, a snapshot in the overlay."""

from __future__ import annotations

from dataclasses import replace

from tests.unit.decisions import (
    DATA,
    DELETED,
    LOCKED,
    Row,
    committing,
    disk_seen,
    finished,
    fresh,
    off,
    on,
    on_overlay,
    pivoted,
    pivoting,
    rows,
    taken,
)
from vmbackup.api.backup import StallPolicy
from vmbackup.protocol.decide import decide
from vmbackup.protocol.record import Copy, Guard
from vmbackup.protocol.terms import Do, Intent, Mirror, Observation, OverlayFile, Power

OFFLINE = {"offline": True}
READY = {"mirror": Mirror.READY, "job": True, "job_at_end": True}
KEPT = OverlayFile(locked=True, empty=False, holds_snapshot=True)
KEPT_UNLOCKED = OverlayFile(locked=False, empty=False, holds_snapshot=True)
STORED = {"copy": Copy.STORED}


def with_snapshot(**more: object) -> Observation:
    return on("O", "O", KEPT, **more)  # pyright: ignore[reportArgumentType]


@rows(
    Row("QEMU reads another file than base: no copy of it", taken(), on_overlay(astray=True), Do.QUARANTINE),
    Row("… nor is it committed into", committing(**STORED), on_overlay(job=True, astray=True), Do.QUARANTINE),
    Row("… nor pivoted to", committing(**STORED), on_overlay(**READY, astray=True), Do.QUARANTINE),
    Row(
        "… and where that is seen in the middle of a pivot, the guest runs first",
        pivoting(),
        on_overlay(Power.PAUSED, **READY, astray=True),
        Do.RESUME,
    ),
    Row(
        "after a pivot to another file the overlay is needed",
        pivoted(),
        on("B", "B", DATA, astray=True),
        Do.CLEAR_PIVOT,
    ),
    Row(
        "… and stays",
        pivoted({"pivot_intended": False}),
        on("B", "B", DATA, astray=True),
        Do.QUARANTINE,
    ),
    Row(
        "… also once the guest was started again",
        pivoted({"pivot_intended": False}, quarantined="why", **STORED),
        on("B", "B", DATA),
        Do.QUARANTINE,
    ),
    Row(
        "… or is off",
        pivoted({"pivot_intended": False}, quarantined="why", **STORED),
        off("B", DATA),
        Do.WAIT,
        more={"parked": True},
    ),
    Row("before the snapshot it is refused", fresh(), on("B", "B", None, astray=True), Do.REFUSE),
    Row(
        "… and the quarantine is not lifted though L, P and T agree by name",
        pivoted({"pivot_intended": False}, quarantined="why"),
        on("B", "B", None, astray=True),
        Do.QUARANTINE,
    ),
    Row("… which it is once QEMU has base again", pivoted(quarantined="why"), on("B", "B"), Do.LIFT_QUARANTINE),
    Row("a base that is not astray is no trouble", finished(), on("B", "B"), Do.DONE),
)
def test_another_file_than_base(row: Row):
    row.check()


@rows(
    Row("the copy goes on", taken(), with_snapshot(), Do.COPY),
    Row("no commit is begun", taken(**STORED), with_snapshot(), Do.WAIT, more={"others": True}),
    Row("… nor begun again", committing({"commit_running": False}, **STORED), with_snapshot(), Do.WAIT),
    Row("… and what was taken is stored meanwhile", taken(copy=Copy.TAKEN), with_snapshot(), Do.SHIP),
    Row(
        "… and a deleted VMBackup does not wait for it",
        taken(copy=Copy.FAILED),
        with_snapshot(),
        Do.RECORD_ORPHAN,
        DELETED,
    ),
    Row("… but may go", taken(copy=Copy.FAILED, orphan=True), with_snapshot(), Do.RELEASE, DELETED),
    Row("it is on base: the overlay stays", pivoted(**STORED), on("B", "B", KEPT_UNLOCKED), Do.QUARANTINE),
    Row("off: nothing is merged", committing(**STORED), off("O", KEPT_UNLOCKED), Do.WAIT, OFFLINE, {"others": True}),
    Row("… what was taken is stored meanwhile", committing(), off("O", KEPT_UNLOCKED), Do.SHIP, OFFLINE),
    Row(
        "… and a deleted VMBackup does not wait",
        committing(copy=Copy.FAILED),
        off("O", KEPT_UNLOCKED),
        Do.RECORD_ORPHAN,
        OFFLINE | DELETED,
    ),
    Row("off, on base: the overlay stays", pivoted(**STORED), off("B", KEPT_UNLOCKED), Do.QUARANTINE),
    Row("without one it is committed", taken(**STORED), on("O", "O", LOCKED), Do.BEGIN_COMMIT),
)
def test_a_snapshot_of_the_user_in_the_overlay(row: Row):
    row.check()


def test_another_disk_comes_home_while_a_snapshot_keeps_one_on_its_overlay():
    stays, other = taken(**STORED).disks[0], replace(taken(**STORED).disks[0], target="vdb")
    record = replace(taken(**STORED), disks=(stays, other))
    seen = Observation(Power.RUNNING, (disk_seen("O", "O", KEPT), disk_seen("O", "O", LOCKED, target="vdb")))
    action = decide(Intent(), record, seen)
    assert (action.do, action.target) == (Do.BEGIN_COMMIT, "vdb")


def test_a_deleted_backup_is_not_released_while_the_guest_is_suspended_for_another_disk():
    stays = committing({"commit_running": False}, copy=Copy.FAILED).disks[0]
    other = replace(committing().disks[0], target="vdb")
    record = replace(committing(copy=Copy.FAILED), disks=(stays, other), guard=Guard.OURS, pause_until=9.0)
    disks = (disk_seen("O", "O", KEPT), disk_seen("O", "O", LOCKED, target="vdb", job=True, mirror=Mirror.PENDING))
    intent = Intent(deleted=True, stall_policy=StallPolicy.PAUSE, stall_pause=10.0)
    action = decide(intent, record, Observation(Power.PAUSED, disks, now=1.0))
    assert action.do is Do.WAIT
    over = decide(intent, record, Observation(Power.PAUSED, disks, now=10.0))
    assert over.do in (Do.REDEFINE, Do.SYNC_CONFIG, Do.RESUME)
