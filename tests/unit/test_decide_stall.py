"""What decide() does about a commit that does not converge."""

from __future__ import annotations

from typing import Any

from tests.unit.decisions import (
    DELETED,
    LIVE,
    LOCKED,
    ON_BASE,
    PAUSED_BY_USER,
    Fields,
    Row,
    committing,
    disk_seen,
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
from vmbackup.api.backup import StallPolicy
from vmbackup.protocol.record import Copy, DiskRecord, Freeze, Guard, Record, Throttle
from vmbackup.protocol.terms import Action, Do, Mirror, Observation, Power
from vmbackup.protocol.transition import answered, begun, of_this_boot, recorded, resumed_after_crash

HOLD: Fields = {"stall_policy": StallPolicy.HOLD}
THROTTLE: Fields = {"stall_policy": StallPolicy.THROTTLE}
PAUSE: Fields = {"stall_policy": StallPolicy.PAUSE, "stall_pause": 10.0}
LEAVING: Fields = {"leaving": True}

LOWERED = {"throttle": Throttle((), limits=(1 << 20,), next_at=5.0)}
YIELDED = {"throttle": Throttle((), limits=(1 << 20,), yielded=True)}


def late(power: Power = Power.RUNNING, **more: Any) -> Observation:
    return on_overlay(power, mirror=Mirror.PENDING, job=True, overdue=True, **more)


def running(power: Power = Power.RUNNING) -> Observation:
    return on_overlay(power, mirror=Mirror.PENDING, job=True)


def paused(disk: Fields | None = None, **changes: Any) -> Record:
    """Suspended by us until 10 (CLOCK_BOOTTIME), for its commit to converge."""
    return committing({"pause_used": True} | (disk or {}), **({"guard": Guard.OURS, "pause_until": 10.0} | changes))


@rows(
    Row("in time: nothing", committing(), running(), Do.WAIT, THROTTLE),
    Row("Hold: nothing", committing(), late(), Do.WAIT, HOLD),
    Row("late: throttle", committing(), late(), Do.THROTTLE, THROTTLE, {"target": "vda"}),
    Row("Live too", committing(), late(), Do.THROTTLE, THROTTLE | LIVE),
    Row("deleted: it still goes home", committing(copy=Copy.FAILED), late(), Do.THROTTLE, THROTTLE | DELETED),
    Row("a commit while base is copied is not ours", taken(), late(), Do.FAIL_BACKUP, THROTTLE),
    Row("throttled a moment ago: wait", committing(LOWERED), late(), Do.WAIT, THROTTLE),
    Row("throttled long enough: look again", committing(LOWERED), seen(late(), now=5.0), Do.THROTTLE, THROTTLE),
    Row("the user's now: not touched", committing(YIELDED), seen(late(), now=5.0), Do.WAIT, THROTTLE),
    Row("READY: pivot", committing(LOWERED), ready(), Do.INTEND_PIVOT, THROTTLE),
    Row("suspended for the pivot: that first", pivoting(LOWERED), ready(Power.PAUSED), Do.PIVOT, THROTTLE),
    Row(
        "pivoted: resume first",
        pivoted(LOWERED, guard=Guard.OURS),
        on("B", "B", None, Power.PAUSED),
        Do.RESUME,
        THROTTLE,
    ),
    Row("… then undo it", pivoted(LOWERED), home(), Do.UNTHROTTLE, THROTTLE, {"target": "vda"}),
    Row("the job is gone: undo it", committing(LOWERED), on_overlay(), Do.UNTHROTTLE, THROTTLE),
    Row("the attempt has failed", committing(LOWERED | {"retry_at": 9.0}), running(), Do.UNTHROTTLE, THROTTLE),
    Row("given up", committing(LOWERED, gave_up=True), late(), Do.UNTHROTTLE, THROTTLE),
    Row("not asked for any more", committing(LOWERED), late(), Do.UNTHROTTLE, HOLD),
    Row("this run is to end", committing(LOWERED), late(), Do.UNTHROTTLE, THROTTLE | LEAVING),
    Row("it does not begin then", committing(), late(), Do.WAIT, THROTTLE | LEAVING),
    Row(
        "quarantine: undo it first",
        pivoted(LOWERED | {"settled": ON_BASE}),
        on("X", "X", LOCKED),
        Do.UNTHROTTLE,
        THROTTLE,
    ),
    Row("off: QEMU has forgotten it", committing(LOWERED), off("O", LOCKED), Do.FORGET_GUEST, THROTTLE),
)
def test_a_late_commit_throttles_the_guest_until_its_attempt_is_over(row: Row):
    row.check()


@rows(
    Row("in time: nothing", committing(), running(), Do.WAIT, PAUSE),
    Row("late: pause", committing(), seen(late(), now=5.0), Do.INTEND_PAUSE, PAUSE, {"until": 15.0}),
    Row("never in Live", committing(), late(), Do.WAIT, PAUSE | LIVE),
    Row("once in an attempt", committing({"pause_used": True}), late(), Do.WAIT, PAUSE),
    Row(
        "not while thawing has failed",
        committing(freeze=Freeze.THAW_DUE),
        seen(late(), thaw_after=9.0),
        Do.WAIT,
        PAUSE,
    ),
    Row("not while the configuration cannot be saved", committing(), seen(late(), config_failing=True), Do.WAIT, PAUSE),
    Row("not if this run is to end", committing(), late(), Do.WAIT, PAUSE | LEAVING),
    Row("found paused: no need to", committing(), late(Power.PAUSED), Do.WAIT, PAUSE),
    Row("P is settled before", committing({"settled": None}), late(), Do.REDEFINE, PAUSE),
    Row("intended: suspend", paused(), late(), Do.SUSPEND, PAUSE),
    Row("suspended: wait, but no longer", paused(), late(Power.PAUSED), Do.WAIT, PAUSE, {"until": 10.0}),
    Row("READY: pivot without resuming", paused(), ready(Power.PAUSED), Do.INTEND_PIVOT, PAUSE, {"guard": Guard.OURS}),
    Row("… and at once", paused({"pivot_intended": True, "settled": None}), ready(Power.PAUSED), Do.PIVOT, PAUSE),
    Row(
        "pivoted: resume",
        paused({"pivot_intended": True, "settled": ON_BASE}),
        on("B", "B", None, Power.PAUSED),
        Do.RESUME,
        PAUSE,
    ),
    Row("the time is over: resume", paused(), seen(late(Power.PAUSED), now=10.0), Do.RESUME, PAUSE),
    Row("the job is gone: resume", paused(), on_overlay(Power.PAUSED), Do.RESUME, PAUSE),
    Row("the attempt has failed: resume", paused({"retry_at": 9.0}), late(Power.PAUSED), Do.RESUME, PAUSE),
    Row("not asked for any more: resume", paused(), late(Power.PAUSED), Do.RESUME, HOLD),
    Row("this run is to end: resume", paused(), late(Power.PAUSED), Do.RESUME, PAUSE | LEAVING),
    Row("an earlier run suspended it: resume", resumed_after_crash(paused()), late(Power.PAUSED), Do.RESUME, PAUSE),
    Row("resumed: no longer ours", paused(pause_until=0.0), late(), Do.CLEAR_GUARD, PAUSE),
    Row(
        "paused by an I/O error meanwhile: not suspended over it",
        paused(io_error=True),
        late(Power.IO_ERROR),
        Do.WAIT,
        PAUSE,
    ),
    Row("quarantine: resume", paused(), on("X", "X", LOCKED, Power.PAUSED), Do.RESUME, PAUSE),
    Row("off: QEMU is gone", paused(), off("O", LOCKED), Do.FORGET_GUEST, PAUSE),
    Row(
        "its user's pause is not ours to end",
        committing(guard=PAUSED_BY_USER, pause_until=10.0),
        late(Power.PAUSED),
        Do.CLEAR_GUARD,
        PAUSE,
    ),
)
def test_a_late_commit_suspends_the_guest_once_and_for_a_while(row: Row):
    row.check()


def two(first: Fields, second: Fields, **changes: Any) -> Record:
    record = paused(**changes)
    disk = {"commit_begun": True, "commit_running": True, "pause_used": True}
    base = record.disks[0]
    pair = (DiskRecord(**(vars(base) | first)), DiskRecord(**(vars(base) | disk | second | {"target": "vdb"})))
    return Record(**(vars(record) | {"disks": pair}))


def test_a_disk_that_is_home_during_the_pause_does_not_end_it_for_another():
    merging = disk_seen("O", "O", LOCKED, target="vdb", mirror=Mirror.PENDING, job=True, overdue=True)
    both = Observation(Power.PAUSED, (disk_seen("B", "B", None), merging))
    Row("wait", two({"settled": ON_BASE}, {}), both, Do.WAIT, PAUSE, {"until": 10.0}).check()
    Row("time is over", two({"settled": ON_BASE}, {}), seen(both, now=10.0), Do.RESUME, PAUSE).check()


def test_the_marks_of_a_pause_and_of_a_throttle_end_with_what_they_are_for():
    begun_pause = recorded(committing(), Action(Do.INTEND_PAUSE, "vda", until=10.0))
    assert (begun_pause.guard, begun_pause.pause_until, begun_pause.disks[0].pause_used) == (Guard.OURS, 10.0, True)
    assert recorded(begun_pause, Action(Do.CLEAR_GUARD)).pause_until == 0.0
    resumed = answered(begun_pause, Action(Do.RESUME))
    assert (resumed.pause_until, resumed.disks[0].pause_used) == (0.0, True)
    assert not begun(resumed, Action(Do.COMMIT, "vda")).disks[0].pause_used
    for gone in (
        recorded(paused(LOWERED), Action(Do.FORGET_GUEST)),
        of_this_boot(paused(LOWERED), "this", 1.0),
    ):
        assert (gone.pause_until, gone.disks[0].throttle) == (0.0, None)
    assert answered(committing(LOWERED), Action(Do.UNTHROTTLE, "vda")).disks[0].throttle is None
