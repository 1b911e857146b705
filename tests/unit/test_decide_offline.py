"""decide() while the guest is off on its overlay, with commit.offline."""

from __future__ import annotations

from dataclasses import replace

from tests.unit.decisions import (
    DATA,
    DELETED,
    EMPTY,
    LIMIT_1,
    LOCKED,
    ON_BASE,
    TO_BASE,
    TO_OVERLAY,
    Row,
    committing,
    disk_seen,
    finished,
    fresh,
    off,
    on,
    rows,
    seen,
    taken,
)
from vmbackup.protocol.advice import migrated
from vmbackup.protocol.record import Copy, Image, Settled, Snapshot
from vmbackup.protocol.terms import Do, Observation, OverlayFile, Power

OFFLINE = {"offline": True}
MARKED = OverlayFile(locked=False, empty=False, merged=True)
HELD = OverlayFile(locked=False, empty=False, merged=True, held=True)
WRITTEN_SINCE = OverlayFile(locked=False, empty=False, merged=False, held=True)
FAILED_ONCE = {"failures": 1, "retry_at": 9.0, "last_error": "no space"}
NOT_SETTLED, IN_XML = {"settled": None}, {"settled": Settled(Image.OVERLAY, durable=False)}
MARK = {"merged": "1.2.3", "settled": None}


@rows(
    Row("without commit.offline: wait", committing(), off("O", DATA), Do.SHIP),
    Row("… until it starts", committing(copy=Copy.STORED), off("O", DATA), Do.WAIT, more={"parked": True}),
    Row("the copy comes first", taken(), off("O", DATA), Do.COPY, OFFLINE),
    Row("deleted while copying: the copy ends", taken(), off("O", DATA), Do.FAIL_BACKUP, OFFLINE | DELETED),
    Row("P=O must be durable", committing(NOT_SETTLED), off("O", DATA), Do.REDEFINE, OFFLINE, {"images": TO_OVERLAY}),
    Row("… on disk too", committing(IN_XML), off("O", DATA), Do.SYNC_CONFIG, OFFLINE),
    Row(
        "P=O cannot be made durable: base must not be touched",
        committing(NOT_SETTLED, copy=Copy.STORED),
        seen(off("O", DATA), config_failing=True),
        Do.WAIT,
        OFFLINE,
        {"parked": True},
    ),
    Row("base is no moment any more: journal", taken(copy=Copy.TAKEN), off("O", DATA), Do.BEGIN_COMMIT, OFFLINE),
    Row("merge, before what was taken is shipped", committing(), off("O", DATA), Do.MERGE_OFFLINE, OFFLINE),
    Row("… deleted too", committing(copy=Copy.FAILED), off("O", DATA), Do.MERGE_OFFLINE, OFFLINE | DELETED),
    Row(
        "an orphan too", committing(copy=Copy.FAILED, orphan=True), off("O", DATA), Do.MERGE_OFFLINE, OFFLINE | DELETED
    ),
    Row(
        "an adopted one too",
        committing(snapshot=Snapshot.ADOPTED, copy=Copy.OPEN),
        off("O", DATA),
        Do.MERGE_OFFLINE,
        OFFLINE,
    ),
    Row("saved: its state names O", committing(), seen(off("O", DATA), saved=True), Do.SHIP, OFFLINE),
    Row("migrated: it writes O elsewhere", committing(), seen(off("O", DATA), migrated=True), Do.SHIP, OFFLINE),
    Row("… its copy is given up", taken(), seen(off("O", DATA), migrated=True), Do.FAIL_BACKUP, OFFLINE),
    Row(
        "… and brought home there",
        committing(copy=Copy.FAILED),
        seen(off("O"), migrated=True),
        Do.WAIT,
        OFFLINE,
        {"parked": True},
    ),
    Row(
        "… nobody is told to end its QEMU",
        committing(copy=Copy.FAILED),
        seen(off("O", LOCKED), migrated=True),
        Do.WAIT,
        OFFLINE,
        {"parked": True, "reason": migrated(committing())},
    ),
    Row("saved while it is copied", taken(), seen(off("O", DATA), saved=True), Do.COPY, OFFLINE),
    Row("in use: wait", committing(), off("O", LOCKED), Do.WAIT, OFFLINE, {"parked": False}),
    Row("quarantined: touch nothing", committing(quarantined="why"), off("O", DATA), Do.SHIP, OFFLINE),
    Row("merged and held: P:=B", committing(MARK), off("O", HELD), Do.REDEFINE, OFFLINE, {"images": TO_BASE}),
    Row("written though held: merge again", committing(), off("O", WRITTEN_SINCE), Do.MERGE_OFFLINE, OFFLINE),
    Row(
        "merged by a run that is gone: settle O",
        committing(MARK),
        off("O", MARKED),
        Do.REDEFINE,
        OFFLINE,
        {"images": TO_OVERLAY},
    ),
    Row("… and merge again", committing({"merged": "1.2.3"}), off("O", MARKED), Do.MERGE_OFFLINE, OFFLINE),
    Row("P=B: durable first", committing(MARK), off("B", HELD), Do.REDEFINE, OFFLINE, {"images": TO_BASE}),
    Row("P=B durable: O goes", committing(MARK | {"settled": ON_BASE}), off("B", HELD), Do.REMOVE_OVERLAY, OFFLINE),
    Row("… in a later run too", committing(MARK | {"settled": ON_BASE}), off("B", MARKED), Do.REMOVE_OVERLAY),
    Row("P=B, O written since the mark: quarantine", committing(MARK), off("B", DATA), Do.QUARANTINE, OFFLINE),
    Row("home: ship", committing({"settled": ON_BASE}), off("B"), Do.SHIP, OFFLINE),
    Row("home: finish", committing({"settled": ON_BASE}, copy=Copy.STORED), off("B"), Do.FINISH, OFFLINE),
    Row("home: the orphan is none", finished(orphan=True), off("B"), Do.CLEAR_ORPHAN, OFFLINE | DELETED),
    Row("home, adopted: there is nobody to back up", fresh(snapshot=Snapshot.ADOPTED), off("B"), Do.REFUSE, OFFLINE),
    Row(
        "started on base meanwhile: O goes",
        committing(MARK | {"settled": ON_BASE}),
        on("B", "B", MARKED),
        Do.REMOVE_OVERLAY,
    ),
    Row("… not if it was written since", committing(MARK | {"settled": ON_BASE}), on("B", "B", DATA), Do.QUARANTINE),
    Row(
        "started on O meanwhile: commit",
        committing({"commit_running": False}),
        on("O", "O", LOCKED),
        Do.COMMIT,
        OFFLINE,
    ),
)
def test_the_way_home_of_a_guest_that_is_off(row: Row):
    row.check()


@rows(
    Row(
        "not before the pause is over",
        committing(FAILED_ONCE),
        seen(off("O", DATA), now=8.0),
        Do.WAIT,
        OFFLINE,
        {"until": 9.0, "parked": False},
    ),
    Row("then again", committing(FAILED_ONCE), seen(off("O", DATA), now=9.0), Do.MERGE_OFFLINE, OFFLINE),
    Row("beyond the limit: give up", committing({"failures": 2}), off("O", DATA), Do.GIVE_UP, OFFLINE | LIMIT_1),
    Row("given up: ship", committing(gave_up=True), off("O", DATA), Do.SHIP, OFFLINE),
    Row("… finish", committing(gave_up=True, copy=Copy.STORED), off("O", DATA), Do.FINISH, OFFLINE),
    Row("… done", committing(gave_up=True, copy=Copy.STORED, finished=True), off("O", DATA), Do.DONE, OFFLINE),
    Row(
        "… deleted: record the orphan",
        committing(gave_up=True, copy=Copy.STORED, finished=True),
        off("O", DATA),
        Do.RECORD_ORPHAN,
        OFFLINE | DELETED,
    ),
)
def test_merges_that_fail(row: Row):
    row.check()


def two(first: OverlayFile | None, second: OverlayFile | None) -> Observation:
    disks = (
        disk_seen(None, "O" if first else "B", first),
        disk_seen(None, "O" if second else "B", second, target="vdb"),
    )
    return Observation(Power.OFF, disks)


def test_one_disk_is_merged_after_the_other_and_one_that_fails_holds_up_none():
    record = committing()
    failing = replace(record.disks[0], failures=1, retry_at=9.0)
    other = replace(record.disks[0], target="vdb")
    Row(
        "",
        replace(record, disks=(record.disks[0], other)),
        two(DATA, DATA),
        Do.MERGE_OFFLINE,
        OFFLINE,
        {"target": "vda"},
    ).check()
    Row(
        "", replace(record, disks=(failing, other)), two(DATA, DATA), Do.MERGE_OFFLINE, OFFLINE, {"target": "vdb"}
    ).check()
    home = replace(record, disks=(replace(failing, retry_at=0.0), replace(other, settled=ON_BASE)))
    Row("", home, two(DATA, None), Do.MERGE_OFFLINE, OFFLINE, {"target": "vda"}).check()


def test_an_empty_overlay_is_merged_like_any_other():
    Row("", committing(), off("O", EMPTY), Do.MERGE_OFFLINE, OFFLINE).check()
