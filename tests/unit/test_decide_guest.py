"""What decide() does about the guest itself: frozen, suspended, paused, without a definition."""

from __future__ import annotations

from tests.unit.decisions import (
    DATA,
    DELETED,
    EMPTY,
    LIVE,
    LOCKED,
    PAUSED_BY_USER,
    QUIESCE,
    REQUIRED,
    VDA,
    Row,
    committing,
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
from vmbackup.protocol.record import Copy, Freeze, Guard, Snapshot
from vmbackup.protocol.terms import Do, Power


@rows(
    Row("freeze before the snapshot is intended", fresh(), home(), Do.FREEZE, QUIESCE),
    Row("frozen: intend", fresh(freeze=Freeze.FROZEN, quiesced=True), home(), Do.INTEND_SNAPSHOT, QUIESCE),
    Row("freezing failed: without", fresh(freeze=Freeze.TRIED), home(), Do.INTEND_SNAPSHOT, QUIESCE),
    Row("a paused guest is not frozen", fresh(), home(Power.PAUSED), Do.INTEND_SNAPSHOT, QUIESCE),
    Row("required, and the guest is paused: refuse", fresh(), home(Power.PAUSED), Do.REFUSE, QUIESCE | REQUIRED),
    Row(
        "frozen by a run that is gone, which had suspended it too: resume, to plan and freeze again",
        fresh(snapshot=Snapshot.INTENDED, replan=True, guard=Guard.OURS, freeze=Freeze.THAW_DUE),
        home(Power.PAUSED),
        Do.RESUME,
        QUIESCE,
    ),
    Row(
        "… then thaw",
        fresh(snapshot=Snapshot.INTENDED, replan=True, freeze=Freeze.THAW_DUE),
        home(),
        Do.THAW,
        QUIESCE,
    ),
    Row(
        "… then choose the disks again: the domain may have changed since they were chosen",
        fresh(snapshot=Snapshot.INTENDED, replan=True),
        home(),
        Do.PLAN,
        QUIESCE,
    ),
    Row(
        "… unless the snapshot is there",
        fresh(snapshot=Snapshot.INTENDED, replan=True, guard=Guard.OURS),
        on_overlay(Power.PAUSED),
        Do.RECORD_SNAPSHOT,
        QUIESCE,
    ),
    Row(
        "suspended by this very run, and freezing had failed: take it",
        fresh(snapshot=Snapshot.INTENDED, guard=Guard.OURS, freeze=Freeze.THAW_DUE, quiesced=False),
        home(Power.PAUSED),
        Do.SNAPSHOT,
        QUIESCE,
    ),
    Row(
        "snapshot done: resume first",
        taken(guard=Guard.OURS, freeze=Freeze.FROZEN),
        on_overlay(Power.PAUSED),
        Do.RESUME,
        QUIESCE,
    ),
    Row("… then thaw", taken(freeze=Freeze.FROZEN), on_overlay(), Do.THAW, QUIESCE),
    Row("frozen by a run that is gone: thaw", fresh(freeze=Freeze.THAW_DUE), home(), Do.THAW, QUIESCE),
    Row("the snapshot failed: thaw", fresh(freeze=Freeze.FROZEN, copy=Copy.FAILED), home(), Do.THAW, QUIESCE),
    Row("deleted: thaw", fresh(freeze=Freeze.FROZEN), home(), Do.THAW, QUIESCE | DELETED),
    Row(
        "thawing has just failed: it blocks nothing",
        taken(freeze=Freeze.THAW_DUE),
        seen(on_overlay(), thaw_after=1.0),
        Do.COPY,
    ),
    Row(
        "… but the end",
        finished(finished=False, freeze=Freeze.THAW_DUE),
        seen(home(), thaw_after=1.0),
        Do.WAIT,
        more={"until": 1.0},
    ),
    Row(
        "a migration does not wait frozen", fresh(freeze=Freeze.FROZEN), seen(home(), migrating=True), Do.THAW, QUIESCE
    ),
    Row("nor does a foreign job", fresh(freeze=Freeze.FROZEN), home(foreign_job=True), Do.THAW, QUIESCE),
)
def test_freezing_and_thawing(row: Row):
    row.check()


@rows(
    Row("its guard is recorded", fresh(), home(Power.PAUSED), Do.INTEND_SNAPSHOT, more={"guard": PAUSED_BY_USER}),
    Row(
        "no need to suspend it",
        fresh(snapshot=Snapshot.INTENDED, guard=PAUSED_BY_USER),
        home(Power.PAUSED),
        Do.SNAPSHOT,
    ),
    Row("it is not resumed", taken(guard=PAUSED_BY_USER), on_overlay(Power.PAUSED), Do.CLEAR_GUARD),
    Row(
        "resumed by its user meanwhile: now we guard",
        fresh(snapshot=Snapshot.INTENDED, guard=PAUSED_BY_USER),
        home(),
        Do.INTEND_SNAPSHOT,
        more={"guard": Guard.OURS},
    ),
    Row("the pivot too", committing(), ready(Power.PAUSED), Do.INTEND_PIVOT, more={"guard": PAUSED_BY_USER}),
    Row("… without suspending", pivoting(guard=PAUSED_BY_USER), ready(Power.PAUSED), Do.PIVOT),
)
def test_a_guest_that_was_found_paused(row: Row):
    row.check()


@rows(
    Row("the snapshot is intended, unguarded", fresh(), home(), Do.INTEND_SNAPSHOT, LIVE, {"guard": Guard.NONE}),
    Row("… and taken while it runs", fresh(snapshot=Snapshot.INTENDED), home(), Do.SNAPSHOT, LIVE),
    Row("the pivot is intended, unguarded", committing(), ready(), Do.INTEND_PIVOT, LIVE, {"guard": Guard.NONE}),
    Row("… settled", pivoting({"settled": None}, guard=Guard.NONE), ready(), Do.REDEFINE, LIVE),
    Row("… and made while it runs", pivoting(guard=Guard.NONE), ready(), Do.PIVOT, LIVE),
)
def test_live(row: Row):
    row.check()


@rows(
    Row("there is no P to settle", record(), on("B", None), Do.INTEND_SNAPSHOT),
    Row(
        "after the snapshot: resume at once",
        record(snapshot=Snapshot.DONE, guard=Guard.OURS),
        on("O", None, LOCKED, Power.PAUSED),
        Do.RESUME,
    ),
    Row("copy", record(snapshot=Snapshot.DONE), on("O", None, LOCKED), Do.COPY),
    Row("remove O after the pivot", pivoted({"settled": None}), on("B", None, DATA), Do.REMOVE_OVERLAY),
    Row("stopped on O: quarantine", record(snapshot=Snapshot.DONE), off(None, DATA), Do.QUARANTINE),
    Row(
        "not defined here, O empty: it may be in use where the guest went, quarantine",
        record(snapshot=Snapshot.DONE),
        off(None, EMPTY),
        Do.QUARANTINE,
    ),
    Row("stopped on O, even in a pivot: quarantine", pivoting(guard=Guard.NONE), off(None, DATA), Do.QUARANTINE),
    Row("stopped at home: finish", pivoted(copy=Copy.STORED), off(None), Do.FINISH),
)
def test_a_transient_domain(row: Row):
    row.check()


@rows(
    Row("found before anything is begun: refuse", fresh(), home(Power.IO_ERROR), Do.REFUSE),
    Row("on its overlay: note it", taken(), on_overlay(Power.IO_ERROR), Do.RECORD_IO_ERROR),
    Row(
        "its overlay may soon be full: the copy is given up",
        taken(),
        seen(on_overlay(), room_low="32 MiB"),
        Do.FAIL_BACKUP,
        more={"reason": "32 MiB"},
    ),
    Row(
        "… the copy is safe: no matter", taken(copy=Copy.TAKEN), seen(on_overlay(), room_low="32 MiB"), Do.BEGIN_COMMIT
    ),
    Row("the guest comes before the copy", taken(io_error=True), on_overlay(Power.IO_ERROR), Do.FAIL_BACKUP),
    Row("commit", committing({"commit_running": False}, io_error=True), on_overlay(Power.IO_ERROR), Do.COMMIT),
    Row(
        "READY: no need to suspend",
        committing(io_error=True),
        ready(Power.IO_ERROR),
        Do.INTEND_PIVOT,
        more={"guard": PAUSED_BY_USER},
    ),
    Row("… pivot", pivoting(io_error=True, guard=PAUSED_BY_USER), ready(Power.IO_ERROR), Do.PIVOT),
    Row(
        "O goes first, and frees the space",
        pivoted(io_error=True),
        on("B", "B", DATA, Power.IO_ERROR),
        Do.REMOVE_OVERLAY,
    ),
    Row("then the guest is resumed", pivoted(io_error=True), home(Power.IO_ERROR), Do.RESUME),
    Row("once: the next error is its own", pivoted(copy=Copy.STORED), home(Power.IO_ERROR), Do.FINISH),
)
def test_a_guest_paused_by_an_io_error(row: Row):
    row.check()


@rows(
    Row(
        "the guest does not wait for it",
        taken({"settled": None}, guard=Guard.OURS),
        seen(on_overlay(Power.PAUSED), config_failing=True),
        Do.RESUME,
    ),
    Row(
        "in quarantine neither",
        taken({"settled": None}, guard=Guard.OURS),
        seen(on("X", "O", DATA, Power.PAUSED), config_failing=True),
        Do.RESUME,
    ),
    Row("no pivot meanwhile", committing(), seen(ready(), config_failing=True), Do.WAIT),
    Row(
        "an intended one is taken back", pivoting(guard=Guard.NONE), seen(ready(), config_failing=True), Do.CLEAR_PIVOT
    ),
    Row(
        "O is never removed on an unsettled P",
        pivoted({"settled": None}),
        seen(on("B", "B", DATA), config_failing=True),
        Do.REDEFINE,
    ),
)
def test_a_configuration_that_cannot_be_saved(row: Row):
    row.check()


LEAVING = {"leaving": True}


@rows(
    Row(
        "suspended for a snapshot: no snapshot, resume",
        fresh(snapshot=Snapshot.INTENDED, guard=Guard.OURS),
        home(Power.PAUSED),
        Do.RESUME,
        LEAVING,
    ),
    Row("suspended for a pivot: settle P", pivoting({"settled": None}), ready(Power.PAUSED), Do.REDEFINE, LEAVING),
    Row("… no pivot, resume", pivoting(), ready(Power.PAUSED), Do.RESUME, LEAVING),
    Row("it runs again", pivoting(), ready(), Do.CLEAR_GUARD, LEAVING),
    Row(
        "frozen for a snapshot: thaw",
        fresh(freeze=Freeze.FROZEN, quiesced=True),
        home(),
        Do.THAW,
        LEAVING | QUIESCE,
    ),
    Row(
        "thawing has just failed: no copy meanwhile",
        taken(freeze=Freeze.THAW_DUE),
        seen(on_overlay(), thaw_after=1.0),
        Do.WAIT,
        LEAVING,
        {"until": 1.0},
    ),
    Row("a call may be in flight", pivoting(), seen(ready(), call_in_flight=True), Do.WAIT, LEAVING),
    Row("nothing new is begun", taken({"commit_begun": False}, copy=Copy.TAKEN), on_overlay(), Do.WAIT, LEAVING),
)
def test_a_run_that_is_to_end_lets_the_guest_run_and_does_nothing_else(row: Row):
    row.check()


@rows(
    Row("at home", finished(finished=False, freeze=Freeze.THAW_DUE), seen(home(), thaw_after=1.0), Do.WAIT),
    Row(
        "on its overlay, given up",
        committing(gave_up=True, copy=Copy.STORED, freeze=Freeze.THAW_DUE),
        seen(on_overlay(), thaw_after=1.0),
        Do.WAIT,
    ),
    Row(
        "quarantined, and deleted",
        fresh(quarantined=advice.overlay_in_use(VDA), freeze=Freeze.THAW_DUE),
        seen(on("B", "B", LOCKED), thaw_after=1.0),
        Do.WAIT,
        {"deleted": True},
        {"until": 1.0},
    ),
    Row(
        "off: nothing is frozen any more",
        committing(gave_up=True, freeze=Freeze.THAW_DUE),
        off("O", LOCKED),
        Do.FORGET_GUEST,
    ),
)
def test_it_does_not_end_with_the_guest_frozen(row: Row):
    row.check()
