"""docs/protocol.md's decision table, row by row: record and observation in, action out."""

from __future__ import annotations

from tests.unit.decisions import (
    DATA,
    DELETED,
    EMPTY,
    LIVE,
    LOCKED,
    ON_BASE,
    ON_OVERLAY,
    TO_BASE,
    TO_OVERLAY,
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
    record,
    rows,
    seen,
    taken,
)
from vmbackup.protocol import advice
from vmbackup.protocol.record import Copy, Freeze, Guard, Image, Settled, Snapshot
from vmbackup.protocol.terms import Do, Mirror, Observation, OverlayFile, Power

NOTHING_SEEN = Observation(Power.OFF, (disk_seen(None, None, None, base_changed=True),))


@rows(
    Row("while a call may be in flight, whatever is seen", fresh(), seen(home(), call_in_flight=True), Do.WAIT),
    Row("also with the guest off", fresh(), seen(off("B"), call_in_flight=True), Do.WAIT),
    Row("also suspended by us", fresh(guard=Guard.OURS), seen(home(Power.PAUSED), call_in_flight=True), Do.WAIT),
)
def test_it_waits(row: Row):
    row.check()


@rows(
    Row("P=O, O gone: quarantine", taken(), off("O"), Do.QUARANTINE),
    Row(
        "P=O, O gone, settled on B: settle B",
        taken({"settled": ON_BASE}),
        off("O"),
        Do.REDEFINE,
        more={"images": TO_BASE},
    ),
    Row(
        "P=O, pivot intended: clear the intent, never compare",
        pivoting(guard=Guard.NONE),
        off("O", DATA),
        Do.CLEAR_PIVOT,
    ),
    Row(
        "P=O, pivot intended, Live: compare",
        pivoting(guard=Guard.NONE),
        off("O", DATA),
        Do.COMPARE,
        LIVE,
    ),
    Row(
        "P=O, pivot intended, Live, compared and different: nothing more",
        pivoting(guard=Guard.NONE, quarantined=advice.images_differ(VDA)),
        off("O", DATA),
        Do.WAIT,
        LIVE,
        {"parked": True},
    ),
    Row("P=O, not ours: adopt", record(), off("O", DATA), Do.ADOPT),
    Row("P=O, snapshot intended: it is there", fresh(snapshot=Snapshot.INTENDED), off("O", EMPTY), Do.RECORD_SNAPSHOT),
    Row(
        "P=O, not settled: settle O",
        record(snapshot=Snapshot.DONE),
        off("O", DATA),
        Do.REDEFINE,
        more={"images": TO_OVERLAY},
    ),
    Row(
        "P=O, redefined but not durable: sync",
        taken({"settled": Settled(Image.OVERLAY, durable=False)}),
        off("O", DATA),
        Do.SYNC_CONFIG,
    ),
    Row("P=O, settled, copy open: base is frozen, copy on", taken(), off("O", DATA), Do.COPY),
    Row("P=O, settled, copy taken: ship it", taken(copy=Copy.TAKEN), off("O", DATA), Do.SHIP),
    Row(
        "P=O, settled, commit begun: park", committing(copy=Copy.STORED), off("O", DATA), Do.WAIT, more={"parked": True}
    ),
    Row("P=O, pivot intended, settled on B since: a user's doing, settle B", pivoted(), off("O", DATA), Do.REDEFINE),
    Row(
        "P=B, O left, pivot intended, not settled on B: libvirt's doing or a user's, compare",
        pivoting(guard=Guard.NONE),
        off("B", DATA),
        Do.COMPARE,
        more={"images": TO_BASE},
    ),
    Row(
        "P=B, O left, pivot intended, Live: the guest ran meanwhile, nothing can be compared: settle B",
        pivoting({"settled": None}, guard=Guard.NONE),
        off("B", DATA),
        Do.REDEFINE,
        LIVE,
    ),
    Row(
        "P=B, O left, pivot intended, quarantined: nothing",
        pivoting(guard=Guard.NONE, quarantined="they differ", copy=Copy.STORED),
        off("B", DATA),
        Do.WAIT,
    ),
    Row(
        "P=B, O left, pivot intended, the same in both: make P durable",
        pivoting({"settled": Settled(Image.BASE, durable=False)}, guard=Guard.NONE),
        off("B", DATA),
        Do.SYNC_CONFIG,
    ),
    Row("P=B, O left, pivot intended, settled: remove O", pivoted(), off("B", DATA), Do.REMOVE_OVERLAY),
    Row("P=X, O left, pivot intended: not by P any more", pivoting(guard=Guard.NONE), off("X", DATA), Do.CLEAR_PIVOT),
    Row("P=X, O left: quarantine", taken(), off("X", DATA), Do.QUARANTINE),
    Row("P=B, O empty, not settled: settle B", record(snapshot=Snapshot.INTENDED), off("B", EMPTY), Do.REDEFINE),
    Row("P=B, O empty, settled: remove O", fresh(snapshot=Snapshot.INTENDED), off("B", EMPTY), Do.REMOVE_OVERLAY),
    Row("P=B, O empty but locked: quarantine", fresh(), off("B", OverlayFile(True, True)), Do.QUARANTINE),
    Row("P=B, O with data, no intent: quarantine", taken(), off("B", DATA), Do.QUARANTINE),
    Row(
        "… said once, then wait",
        taken(quarantined="why"),
        off("B", DATA),
        Do.WAIT,
        more={"parked": True, "reason": "why"},
    ),
    Row("undefined, O left: quarantine", taken(), off(None, DATA), Do.QUARANTINE),
    Row("… in use elsewhere", taken(), off(None, LOCKED), Do.QUARANTINE),
    Row(
        "… the copy has failed: base may be written elsewhere", taken(quarantined="x"), off(None, DATA), Do.FAIL_BACKUP
    ),
    Row("… touch nothing", taken(quarantined="x", copy=Copy.FAILED), off(None, DATA), Do.WAIT, more={"parked": True}),
    Row("… nor offline", taken(quarantined="x", copy=Copy.FAILED), off(None, DATA), Do.WAIT, {"offline": True}),
    Row("undefined, and O gone: lift", taken(quarantined="x", copy=Copy.FAILED), off(None), Do.LIFT_QUARANTINE),
    Row("… but not where B is not there either", taken(quarantined="x", copy=Copy.FAILED), NOTHING_SEEN, Do.FINISH),
    Row("… finish", taken(copy=Copy.FAILED), off(None), Do.FINISH),
    Row("P=B, no O: no lift", taken(quarantined="x", copy=Copy.FAILED), off("B"), Do.FINISH),
    Row("undefined before anything was begun: refuse", fresh(), off(None), Do.REFUSE),
    Row("P=B, no O, not begun: refuse", record(), off("B"), Do.REFUSE),
    Row("P=B, no O, adopted one is home: refuse", record(snapshot=Snapshot.ADOPTED), off("B"), Do.REFUSE),
    Row("P=B, no O, done: finish", finished(finished=False), off("B"), Do.FINISH),
    Row("P=B, no O, finished: done", finished(), off("B"), Do.DONE),
    Row("guard and freeze died with QEMU", taken(guard=Guard.OURS), off("O", DATA), Do.FORGET_GUEST),
    Row("… the freeze too", fresh(freeze=Freeze.FROZEN), off("B"), Do.FORGET_GUEST),
    Row("… and the I/O error", taken(io_error=True), off("O", DATA), Do.FORGET_GUEST),
)
def test_while_the_guest_is_off(row: Row):
    row.check()


LOST_SWITCH = on("B", "B", LOCKED, written="O")
LOST_PIVOT = on("O", "O", LOCKED, mirror=Mirror.READY, written="B")


@rows(
    Row("T=O, L=B: P:=O", fresh(snapshot=Snapshot.INTENDED), LOST_SWITCH, Do.REDEFINE, more={"images": TO_OVERLAY}),
    Row("T=B, L=O: P:=B", pivoting(), LOST_PIVOT, Do.REDEFINE, more={"images": TO_BASE}),
    Row(
        "settled, suspended by us: resume",
        fresh({"settled": ON_OVERLAY}, snapshot=Snapshot.INTENDED, guard=Guard.OURS),
        on("B", "O", LOCKED, Power.PAUSED, written="O"),
        Do.RESUME,
    ),
    Row(
        "resumed: if it is paused from now on, somebody else did it",
        fresh({"settled": ON_OVERLAY}, snapshot=Snapshot.INTENDED, guard=Guard.OURS),
        on("B", "O", LOCKED, written="O"),
        Do.CLEAR_GUARD,
    ),
    Row(
        "settled, frozen by us: thaw",
        fresh({"settled": ON_OVERLAY}, snapshot=Snapshot.INTENDED, freeze=Freeze.FROZEN),
        on("B", "O", LOCKED, written="O"),
        Do.THAW,
    ),
    Row(
        "settled: quarantine",
        fresh({"settled": ON_OVERLAY}, snapshot=Snapshot.INTENDED),
        on("B", "O", LOCKED, written="O"),
        Do.QUARANTINE,
    ),
    Row(
        "the configuration cannot be saved: resume all the same",
        fresh(snapshot=Snapshot.INTENDED, guard=Guard.OURS),
        seen(on("B", "B", LOCKED, Power.PAUSED, written="O"), config_failing=True),
        Do.RESUME,
    ),
    Row("T is another image: P is not touched", taken(), on("O", "O", LOCKED, written="X"), Do.QUARANTINE),
    Row("quarantined, L=P=T=O: lift", taken(quarantined="why"), on_overlay(written="O"), Do.LIFT_QUARANTINE),
    Row("quarantined, L=P=T=B, no O: lift", fresh(quarantined="why"), home(written="B"), Do.LIFT_QUARANTINE),
    Row(
        "quarantined, L=P=T=B, O left: not yet",
        taken({"settled": ON_BASE}, quarantined=advice.overlay_left_on(VDA)),
        on("B", "B", DATA, written="B"),
        Do.WAIT,
    ),
    Row(
        "quarantined for another reason: say this one",
        taken({"settled": ON_BASE}, quarantined=advice.overlay_left_off(VDA)),
        on("B", "B", DATA, written="B"),
        Do.QUARANTINE,
        more={"reason": advice.overlay_left_on(VDA)},
    ),
    Row(
        "quarantined, <mirror> without job: not yet",
        pivoting(quarantined="why", guard=Guard.NONE),
        on("O", "O", LOCKED, mirror=Mirror.READY, written="B"),
        Do.REDEFINE,
    ),
)
def test_when_qemu_and_libvirt_disagree(row: Row):
    row.check()


@rows(
    Row("L=O, not in our journal: adopt", record(), on_overlay(), Do.ADOPT),
    Row(
        "L=O, snapshot intended: it is there",
        fresh(snapshot=Snapshot.INTENDED, guard=Guard.OURS),
        on_overlay(Power.PAUSED),
        Do.RECORD_SNAPSHOT,
    ),
    Row("L=O, P=B: P:=O", taken(), on("O", "B", LOCKED), Do.REDEFINE, more={"images": TO_OVERLAY}),
    Row("L=B, P=O: P:=B", pivoted(), on("B", "O", DATA), Do.REDEFINE, more={"images": TO_BASE}),
    Row("L=B, O locked: quarantine", fresh(), on("B", "B", LOCKED), Do.QUARANTINE),
    Row(
        "suspended, nothing due, not settled: settle first",
        taken({"settled": None}, guard=Guard.OURS),
        on_overlay(Power.PAUSED),
        Do.REDEFINE,
    ),
    Row("suspended, nothing due, settled: resume", taken(guard=Guard.OURS), on_overlay(Power.PAUSED), Do.RESUME),
    Row("running again: clear the record", taken(guard=Guard.OURS), on_overlay(), Do.CLEAR_GUARD),
    Row(
        "pivot intended, job not READY: clear the intent",
        pivoting(guard=Guard.NONE),
        on_overlay(mirror=Mirror.PENDING, job=True),
        Do.CLEAR_PIVOT,
    ),
    Row(
        "L=O, not settled: settle O",
        record(snapshot=Snapshot.DONE),
        on_overlay(),
        Do.REDEFINE,
        more={"images": TO_OVERLAY},
    ),
    Row("L=O, settled, copy open: copy", taken(), on_overlay(), Do.COPY),
    Row(
        "L=O, copy open, commit begun: the copy is worthless",
        taken({"commit_begun": True}),
        on_overlay(),
        Do.FAIL_BACKUP,
    ),
    Row("L=O, copy open, deleted: the copy is not wanted", taken(), on_overlay(), Do.FAIL_BACKUP, DELETED),
    Row("an adopted overlay is never copied from", taken(snapshot=Snapshot.ADOPTED), on_overlay(), Do.BEGIN_COMMIT),
    Row("L=B, O left, not settled: settle B", pivoted({"settled": None}), on("B", "B", DATA), Do.REDEFINE),
    Row("L=B, O left, settled, pivoted: remove O", pivoted(), on("B", "B", DATA), Do.REMOVE_OVERLAY),
    Row("L=B, O empty: remove O", fresh(snapshot=Snapshot.INTENDED), on("B", "B", EMPTY), Do.REMOVE_OVERLAY),
    Row("L=B, O with data, not pivoted: quarantine", fresh(), on("B", "B", DATA), Do.QUARANTINE),
    Row("copy taken: begin the commit", taken(copy=Copy.TAKEN), on_overlay(), Do.BEGIN_COMMIT, more={"target": "vda"}),
    Row("copy failed: home all the same", taken(copy=Copy.FAILED), on_overlay(), Do.BEGIN_COMMIT),
    Row("commit begun, no job: commit", committing({"commit_running": False}), on_overlay(), Do.COMMIT),
    Row("job runs: wait", committing(), on_overlay(mirror=Mirror.PENDING, job=True), Do.WAIT, more={"parked": False}),
    Row("the job is gone, L=O: a failed attempt", committing(), on_overlay(), Do.RECORD_FAILURE),
    Row("READY: intend the pivot", committing(), ready(), Do.INTEND_PIVOT, more={"guard": Guard.OURS}),
    Row(
        "READY without <mirror>, at its end: intend the pivot",
        committing(),
        on_overlay(job=True, job_at_end=True),
        Do.INTEND_PIVOT,
    ),
    Row(
        "<mirror> is READY but there is no job: quarantine",
        committing(),
        on_overlay(mirror=Mirror.READY),
        Do.QUARANTINE,
    ),
    Row(
        "intended: settle O once more before suspending",
        pivoting({"settled": None}),
        ready(),
        Do.REDEFINE,
        more={"images": TO_OVERLAY},
    ),
    Row("intended, settled: suspend", pivoting(), ready(), Do.SUSPEND),
    Row("suspended: pivot", pivoting(), ready(Power.PAUSED), Do.PIVOT),
    Row("all home, to do, not settled: settle B", record(), home(), Do.REDEFINE, more={"images": TO_BASE}),
    Row("all home, to do: intend the snapshot", fresh(), home(), Do.INTEND_SNAPSHOT, more={"guard": Guard.OURS}),
    Row("intended: suspend", fresh(snapshot=Snapshot.INTENDED, guard=Guard.OURS), home(), Do.SUSPEND),
    Row("suspended: snapshot", fresh(snapshot=Snapshot.INTENDED, guard=Guard.OURS), home(Power.PAUSED), Do.SNAPSHOT),
    Row("what was adopted is home: plan again", fresh(snapshot=Snapshot.ADOPTED), home(), Do.PLAN),
    Row("all home, not settled: settle B before the end", pivoted({"settled": None}), home(), Do.REDEFINE),
    Row("all home, copy taken: ship", pivoted(), home(), Do.SHIP),
    Row("all home, shipped: finish", pivoted(copy=Copy.STORED), home(), Do.FINISH),
    Row("all home, snapshot failed: finish", fresh(snapshot=Snapshot.INTENDED, copy=Copy.FAILED), home(), Do.FINISH),
    Row("finished: done", finished(), home(), Do.DONE),
    Row("an orphan came home", finished(orphan=True), home(), Do.CLEAR_ORPHAN, DELETED),
)
def test_while_the_guest_is_on(row: Row):
    row.check()
