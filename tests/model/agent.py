"""The agent: the real decide(), needs_truth() and transitions, and what the driver does with each action.

It observes and decides in one step, and acts in another; a crash fits between any two. Records, observations and
actions are kept once each (Held), and what the pure functions make of them is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from typing import Any, cast

from tests.model import merging
from tests.model.libvirt import GUEST_AGENT_CALLS, LETTER, index_of
from tests.model.observer import View, look, observation
from tests.model.trace import AGENT, ASKS, DECIDES, TOLD
from tests.model.world import (
    ENOUGH,
    TICK,
    Held,
    Kind,
    Setting,
    Step,
    World,
    named,
    on,
    put,
    put_all,
    saved,
    without_agent,
)
from vmbackup.api.backup import StallPolicy
from vmbackup.protocol import decide as machine
from vmbackup.protocol import transition
from vmbackup.protocol.record import Call, Copy, DiskRecord, Guard, Image, Record, Snapshot
from vmbackup.protocol.terms import Action, Do, Intent
from vmbackup.reconcile.state import clock
from vmbackup.reconcile.steps.actions import STEPS

BESIDE_A_COPY = {do for do, step in STEPS.items() if step.beside_copy}
HOLDING = {do for do, step in STEPS.items() if step.keeps_merged}
CALLS = {Do.SUSPEND, Do.RESUME, Do.SNAPSHOT, Do.COMMIT, Do.PIVOT, Do.REDEFINE, Do.FREEZE, Do.THAW}
BACKOFF_OVER, IN_BACKOFF = 0.0, 1.0
PAUSE_OVER, PAUSE = 0.0, 1.0
NO_LIMIT = 10**6
UNSETTLED = "sync: it names others"


class Agent:
    """The agent in one setting. It has no state of its own: that is in the world."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.limit = NO_LIMIT if setting.limit is None else setting.limit
        self._held: dict[str, Held[Any]] = {}
        self._cache: dict[Hashable, Any] = {}
        disks = tuple(DiskRecord("abcd"[n]) for n in range(setting.disks))
        self.fresh = self.hold(Record(uid="", namespace="", name="", disks=disks))

    def hold(self, it: Any) -> Held[Any]:
        """The one copy of this value."""
        return self._held.setdefault(repr(it), Held(it))

    def steps(self, world: World) -> Iterator[Step]:
        """What the agent, or the time it waits for, does next."""
        if not world.agent:
            yield from self._starts(world)
            return
        if world.stopping and world.plan is None and _may_end(world):
            yield Step("guardian ends", without_agent(world))
            return
        if world.vmbackup == "released" and not world.record.it.orphan:
            return
        yield from self._time_passes(world)
        if world.copying:
            yield from self._copy(world)
        if world.plan is None:
            if world.libvirtd:
                if world.sent is not None and not self._in_flight(world):
                    yield Step(AGENT + "the barrier is over", world._replace(sent=None, answering=ENOUGH, doubt=True))
                else:
                    yield from self._decide(world)
        elif world.plan[0] == "do":
            yield self._act(world, world.plan[1])
        elif world.plan[0] != "wait":
            yield self._take_answer(world, *world.plan)

    def _time_passes(self, world: World) -> Iterator[Step]:
        """What it waits for comes."""
        if any(disk.retry_at for disk in world.record.it.disks):
            over = self._record("back-off", world.record, _back_off_over)
            kept = self._record("back-off", world.kept, _back_off_over)
            yield Step("time passes: the back-off is over", world._replace(record=over, kept=kept))
        if world.record.it.pause_until:
            over = self._record("pause", world.record, _pause_over)
            kept = self._record("pause", world.kept, _pause_over)
            yield Step("time passes: the pause is over", world._replace(record=over, kept=kept))
        if world.deaf:
            yield Step("time passes: thawing may be tried again", world._replace(deaf=False))
        if world.config_failing:
            yield Step("time passes: settling P may be tried again", world._replace(config_failing=False))

    def _starts(self, world: World) -> Iterator[Step]:
        """The agent again, or first its guardian."""
        record = self._record("crash", world.record, transition.resumed_after_crash)
        started = world._replace(agent=True, record=record, doubt=record.it.snapshot is not Snapshot.NONE)
        yield Step("agent starts", started)
        if record.it.holds_guest:
            yield Step("guardian starts", started._replace(stopping=True))

    def faults(self, world: World) -> Iterator[Step]:
        """Failures of the agent's own work."""
        if self.setting.residual == "journal" and world.agent and world.plan is None:
            lost = without_agent(world)._replace(record=self.fresh, kept=self.fresh)
            yield Step("FAULT: the agent is killed, and its journal is lost", lost, Kind.FAULT)
        for index, disk in enumerate(world.disks):
            if disk.merge in merging.RUNNING and world.plan is None:
                failed = self._merge_failed(world, index)
                yield Step("FAULT: " + failed.label, failed.world, Kind.FAULT)
        if world.copying and world.plan is None:
            reason = Action(Do.FAIL_BACKUP, reason="copy")
            yield Step(
                "FAULT: the copy fails",
                self._decided(world, self._recorded(world.record, self.hold(reason))),
                Kind.FAULT,
            )
        if world.plan and world.plan[0] == "do" and world.plan[1].it.do is Do.SHIP:
            failed = self._record("unshipped", world.record, lambda r: replace(r, copy=Copy.FAILED))
            yield Step("FAULT: shipping fails", world._replace(plan=None, record=failed, kept=failed), Kind.FAULT)

    # ------------------------------------------------------------------------------------------ observe, decide
    def _decide(self, world: World) -> Iterator[Step]:
        action, doubt = self.decision(world)
        do = action.it.do
        nothing = do in (Do.WAIT, Do.DONE) or (do is Do.COPY and world.copying and not _copied(world))
        nothing = nothing or (do is Do.RELEASE and world.vmbackup == "released")
        nothing = nothing or (do is Do.MERGE_OFFLINE and any(map(merging.under_way, world.disks)))
        if nothing and do not in HOLDING and merging.let_go(world) is not world:
            yield Step(AGENT + "release the overlays", merging.let_go(world))
        elif not nothing:
            yield Step(DECIDES + do, world._replace(plan=("do", action), doubt=doubt))
        elif doubt != world.doubt:
            yield Step(AGENT + "the doubt is gone", world._replace(doubt=doubt))

    def decision(self, world: World) -> tuple[Held[Action], bool]:
        """What the agent decides now, and whether it is in doubt afterwards."""
        wanted = world.vmbackup if world.vmbackup in ("wanted", "cancelled") else "deleted"
        view = look(world, in_flight=self._in_flight(world))
        key = (world.record, view, world.doubt, wanted, world.stopping)
        if (known := self._cache.get(key)) is None:
            known = self._cache[key] = self._decision(world.record.it, view, world.doubt, wanted, world.stopping)
        return known

    def idle(self, world: World) -> bool:
        """The agent has looked, and has nothing to do."""
        ready = world.agent and world.libvirtd and world.plan is None and world.sent is None
        return ready and next(self._decide(world), None) is None

    def _in_flight(self, world: World) -> bool:
        """R4, by the clock; or, where that is not looked at, by what is really under way."""
        if not self.setting.clock:
            return world.call is not None and world.call[0].it.do not in GUEST_AGENT_CALLS
        if world.sent is None:
            return False
        return clock.may_be_in_flight(
            Call("", boot_id="this", boottime=-TICK * world.sent),
            boot="this",
            now=0.0,
            answering_since=-TICK * world.answering,
            control_idle=world.call is None or world.call[1] == 0,
        )

    def _decision(
        self, record: Record, view: View, doubt: bool, wanted: str, stopping: bool
    ) -> tuple[Held[Action], bool]:
        intent = Intent(
            deleted=wanted == "deleted",
            cancelled=wanted == "cancelled",
            guarded=not self.setting.live,
            quiesce=self.setting.quiesce,
            backoff_limit=self.limit,
            offline=self.setting.offline,
            stall_policy=StallPolicy.PAUSE if self.setting.stall else StallPolicy.HOLD,
            stall_pause=PAUSE,
            leaving=stopping,
        )
        seen = observation(record, view, truth=False, late=self.setting.stall)
        if not seen.call_in_flight and machine.needs_truth(record, seen, doubt=doubt):
            seen = observation(record, view, truth=True, late=self.setting.stall)
            doubt = doubt and any(disk.written is not disk.live for disk in seen.disks)
        return self.hold(machine.decide(intent, record, seen)), doubt

    # ------------------------------------------------------------------------------------------ act
    def _act(self, world: World, action: Held[Action]) -> Step:
        do = action.it.do
        world = _cleared(world, do)
        if do in CALLS:
            return self._send(world, action)
        done = world._replace(plan=None)
        index = index_of(action.it)
        match do:
            case Do.COPY:
                if not (world.copying and _copied(world)):
                    return Step(AGENT + "begin to copy", done._replace(copying=True))
                taken = self._record("taken", world.record, lambda r: replace(r, copy=Copy.TAKEN))
                return Step(AGENT + "the copy is COMPLETE", self._decided(done, taken))
            case Do.SHIP:
                record = self._record("shipped", world.record, lambda r: replace(r, copy=Copy.STORED))
                return Step(AGENT + "store the copy", done._replace(record=record, kept=record))
            case Do.PLAN:
                record = self._record("again", world.record, transition.planned_again)
                return Step(AGENT + "plan again", done._replace(record=record, kept=record))
            case Do.REMOVE_OVERLAY:
                return self._unlink(done, index)
            case Do.MERGE_OFFLINE:
                return self._merge(done, action)
            case Do.RECORD_FAILURE:
                record = self._failed(world.record, action)
                return Step(AGENT + "record-failure", done._replace(record=record, kept=record))
            case Do.RELEASE:
                return Step(AGENT + "RELEASE the finalizer", done._replace(vmbackup="released"))
            case Do.SYNC_CONFIG:
                return self._sync_config(done, action)
            case Do.COMPARE:
                return self._compare(done, action)
            case _:
                record = self._recorded(world.record, action)
                return Step(named(AGENT + do, world, index), self._decided(done, record))

    def _send(self, world: World, action: Held[Action]) -> Step:
        """Journal, then send. The call waits for its turn; with libvirtd gone, the outcome is unknown."""
        record = self._record(("begun", action), world.record, lambda r: transition.begun(r, action.it))
        label = named(ASKS + action.it.do, world, index_of(action.it))
        sent = 0 if self.setting.clock else None
        world = world._replace(record=record)
        if not world.libvirtd and not world.stopped:
            return Step(label + ": no libvirtd", world._replace(plan=None, doubt=True, sent=sent))
        if world.call:  # an older one still has libvirt's job (only without the barrier)
            return Step(label + ": waits", world)
        answering = 0 if world.stopped else ENOUGH
        return Step(label, world._replace(plan=("wait", action), call=(action, 0), sent=sent, answering=answering))

    def _take_answer(self, world: World, outcome: str, action: Held[Action]) -> Step:
        record = self._answered(world.record, action) if outcome == "ok" else self._failed(world.record, action)
        label = f"{TOLD}{action.it.do}: {outcome}"
        deaf = world.deaf or (outcome == "error" and action.it.do is Do.THAW)
        failing = world.config_failing or (world.config_full and outcome == "error" and action.it.do is Do.REDEFINE)
        after = world._replace(record=record, plan=None, deaf=deaf, config_failing=failing, sent=None, answering=ENOUGH)
        if outcome == "error" and action.it.do in (Do.SNAPSHOT, Do.COMMIT, Do.PIVOT, Do.FREEZE):
            return Step(label, self._decided(after, record))
        return Step(label, after)

    def _sync_config(self, world: World, action: Held[Action]) -> Step:
        """Read the file back, fsync it and its directory: so it is durable as it is, whatever it says."""
        if world.config == "cached":
            world = saved(world)
        durable = {"abcd"[n]: disk.durable for n, disk in enumerate(world.disks)}
        if all(durable[target] == LETTER[image] for target, image in action.it.images):
            record = self._answered(world.record, action)
            kept = record if any(disk.pivot_intended for disk in record.it.disks) else world.kept
            edited = world.edited and len(action.it.images) < len(world.disks)
            settled = world._replace(record=record, kept=kept, config_failing=False, edited=edited)
            return Step(AGENT + "sync", settled)
        return Step(AGENT + UNSETTLED, world._replace(record=self._failed(world.record, action)))

    def _unlink(self, world: World, index: int) -> Step:
        """Not without another proof that the file names base: somebody may have redefined the domain meanwhile."""
        if world.disks[index].persistent != "-":
            proof = self.hold(Action(Do.SYNC_CONFIG, images=(("abcd"[index], Image.BASE),)))
            synced = self._sync_config(world, proof)
            if synced.label.endswith(UNSETTLED):
                return synced
            world = synced.world
        record = self._record(
            ("unlinked", index), world.record, lambda r: r.with_disk("abcd"[index], commit_running=False, merged="")
        )
        after = put(world, index, overlay=None, merge=merging.NONE, unwritten=False)
        after = after._replace(full=False, room_low=False, record=record, kept=record)
        return Step(named(AGENT + "UNLINK the overlay", world, index), after)

    def _merge(self, world: World, action: Held[Action]) -> Step:
        """Begin to merge, or take what has come of it."""
        index = next((n for n, disk in enumerate(world.disks) if disk.merge in merging.RUNNING), None)
        if index is None:
            index = index_of(action.it)
            begun = merging.begin(merging.let_go(world), index)
            if begun is not None:
                return Step(named(AGENT + "begin to merge", world, index), begun)
        elif world.disks[index].merge == merging.COMPARES and merging.same(world.disks[index]):
            record = self._record(
                ("merged", index), world.record, lambda r: transition.merged_offline(r, "abcd"[index], "stamp")
            )
            after = put(world, index, merge=merging.HELD, unwritten=True)._replace(record=record, kept=record)
            return Step(named(AGENT + "the overlay holds nothing new", world, index), after)
        return self._merge_failed(world, index)

    def _merge_failed(self, world: World, index: int) -> Step:
        record = self._failed(world.record, self.hold(Action(Do.MERGE_OFFLINE, "abcd"[index])))
        after = merging.let_go(world)._replace(plan=None, record=record, kept=record)
        return Step(named(AGENT + "merging has failed", world, index), after)

    def _compare(self, world: World, action: Held[Action]) -> Step:
        """Overlay over base against base."""
        disk = world.disks[index_of(action.it)]
        if on(world) or disk.overlay is None:
            return Step(AGENT + "compare: locked", world)
        same = all(o in (None, b) for o, b in zip(disk.overlay, disk.base, strict=True))

        def change(record: Record) -> Record:
            return transition.compared(record, action.it, "stamp" if same else "")

        record = self._record(("compared", action, same), world.record, change)
        label = f"{AGENT}compare: {'identical' if same else 'different'}"
        found = put(world, index_of(action.it), unwritten=True) if same else world
        return Step(label, found._replace(record=record, kept=record))

    # ------------------------------------------------------------------------------------------ copy
    def _copy(self, world: World) -> Iterator[Step]:
        """Block by block, in the background, holding the lock that keeps QEMU from writing base."""
        for index, disk in enumerate(world.disks):
            for n, block in enumerate(disk.copied):
                if block is None:
                    if on(world) and (disk.writes == "B" or disk.job not in ("-", "foreign")):
                        return  # refused
                    copied = (*disk.copied[:n], disk.base[n], *disk.copied[n + 1 :])
                    yield Step(named(f"{AGENT}copy block {n}", world, index), put(world, index, copied=copied))
                    return

    def _decided(self, world: World, record: Held[Record]) -> World:
        """A durable line in the journal. With it the copy may be decided: then its blocks are of no interest."""
        copying = world.copying and record.it.copy is Copy.OPEN
        world = world._replace(record=record, kept=record, copying=copying)
        if record.it.copy is Copy.OPEN or all(disk.snapshot is None for disk in world.disks):
            return world
        return put_all(world, snapshot=None, copied=(None,) * len(world.disks[0].base))

    # ------------------------------------------------------------------------------------------ the record
    def _recorded(self, record: Held[Record], action: Held[Action]) -> Held[Record]:
        return self._record(("recorded", action), record, lambda r: transition.recorded(r, action.it))

    def _answered(self, record: Held[Record], action: Held[Action]) -> Held[Record]:
        return self._record(("answered", action), record, lambda r: transition.answered(r, action.it))

    def _failed(self, record: Held[Record], action: Held[Action]) -> Held[Record]:
        def change(r: Record) -> Record:
            return transition.failed(r, action.it, "error", retry_at=IN_BACKOFF)

        return self._record(("failed", action), record, change)

    def _record(self, key: Hashable, record: Held[Record], change: Callable[[Record], Record]) -> Held[Record]:
        held = self._cache.get((record, key))
        if held is None:
            held = self._cache[record, key] = self.hold(self._essence(change(record.it)))
        return cast("Held[Record]", held)

    def _essence(self, record: Record) -> Record:
        """Without texts, and without counting further than the limit: decide() reads no more."""
        disks = tuple(replace(d, failures=self._counted(d.failures), last_error="") for d in record.disks)
        return replace(record, disks=disks, copy_error="", copy_reason="")

    def _counted(self, failures: int) -> int:
        return 0 if self.setting.limit is None else min(failures, self.limit + 1)


def _cleared(world: World, do: Do) -> World:
    """Without what runs in the background and would be in the way."""
    if do not in BESIDE_A_COPY:
        world = world._replace(copying=False)
    return world if do in HOLDING else merging.let_go(world)


def _back_off_over(record: Record) -> Record:
    return record.with_every_disk(retry_at=BACKOFF_OVER)


def _pause_over(record: Record) -> Record:
    return replace(record, pause_until=PAUSE_OVER)


def _may_end(world: World) -> bool:
    """Nothing is suspended or frozen by us, or it is frozen, and cannot be thawed while another has paused it."""
    record = world.record.it
    return not record.holds_guest or (record.guard is not Guard.OURS and world.guest in ("paused", "io-error"))


def _copied(world: World) -> bool:
    return all(None not in disk.copied for disk in world.disks)
