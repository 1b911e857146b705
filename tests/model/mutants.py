"""decide() with one of the repairs R1–R7 (docs/protocol.md), or a safeguard, taken out: each must show a violation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import inf
from typing import Any
from unittest.mock import patch

from tests.model import merging
from tests.model.agent import Agent
from tests.model.world import Setting, Step, World, put
from vmbackup.protocol import decide as machine
from vmbackup.protocol import guest_off as rules_off
from vmbackup.protocol import guest_on as rules_on
from vmbackup.protocol import situation
from vmbackup.protocol.record import Freeze, Guard, Image, Record, Snapshot
from vmbackup.protocol.situation import Case, Rule, Situation
from vmbackup.protocol.terms import Action, Do, Intent, Mirror, Observation, Power
from vmbackup.reconcile.state import clock
from vmbackup.reconcile.state.clock import may_be_in_flight

Patch = tuple[Any, str, Any]  # module, name, what stands there instead


@dataclass(frozen=True)
class Mutant:
    """One safeguard taken out, and the smallest setting that shows why it is there."""

    repair: str
    without: str
    patches: tuple[Patch, ...]
    setting: Setting

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The real decide() is the mutant within."""
        with ExitStack() as stack:
            for module, name, instead in self.patches:
                stack.enter_context(patch.object(module, name, instead))
            yield


def _instead(rules: str, rule: Rule, mutant: Rule) -> Patch:
    before: tuple[Rule, ...] = getattr(machine, rules)
    assert rule in before
    return (machine, rules, tuple(mutant if each is rule else each for each in before))


# ---------------------------------------------------------------------------------------------- R1
def _snapshot_unguarded(s: Situation) -> Action | None:
    return rules_on.take_snapshot(replace(s, intent=replace(s.intent, guarded=False)))


# ---------------------------------------------------------------------------------------------- R2
def _settle_in_memory(_: Situation, wanted: Iterable[tuple[Case, Image | None]]) -> Action | None:
    """As if what the API shows were what the disk holds."""
    pairs = [(disk, image) for disk, image in wanted if image]
    if all(disk.seen.persistent is image for disk, image in pairs):
        return None
    return Action(Do.REDEFINE, images=tuple((disk.target, image) for disk, image in pairs))


# ---------------------------------------------------------------------------------------------- R3
def _never_ask_qemu(_record: Record, _seen: Observation, *, doubt: bool) -> bool:
    return False


# ---------------------------------------------------------------------------------------------- R4
def _without_barrier(decide: Callable[[Intent, Record, Observation], Action]) -> Callable[..., Action]:
    return lambda intent, record, seen: decide(intent, record, replace(seen, call_in_flight=False))


# ---------------------------------------------------------------------------------------------- R5
def _ready_by_mirror_alone(disk: Case) -> bool:
    return disk.seen.mirror is Mirror.READY and disk.seen.job


# ---------------------------------------------------------------------------------------------- R6
def _unlink_what_was_pivoted(s: Situation) -> Action | None:
    for disk in s.disks:
        if disk.seen.persistent is Image.BASE and disk.overlay and disk.record.pivot_intended:
            return Action(Do.REMOVE_OVERLAY, disk.target)
    return rules_off.off_with_overlay_left(s)


def _not_by_the_intent(s: Situation) -> Action | None:
    disks = tuple(replace(disk, record=replace(disk.record, pivot_intended=False)) for disk in s.disks)
    return rules_off.off_with_overlay_left(replace(s, disks=disks))


def _unlink_unproven(_: Agent, world: World, index: int) -> Step:
    return Step("agent: UNLINK the overlay", put(world, index, overlay=None)._replace(full=False, kept=world.record))


# ---------------------------------------------------------------------------------------------- commit.offline
def _anything_merged_counts(s: Situation) -> Action | None:
    def held(disk: Case) -> Case:
        file = disk.overlay and replace(disk.overlay, held=True)
        return replace(disk, seen=replace(disk.seen, overlay=file))

    return rules_off.off_on_overlay(replace(s, disks=tuple(map(held, s.disks))))


# ---------------------------------------------------------------------------------------------- users
def _if_p_names_base(s: Situation) -> Action | None:
    return rules_off.off_with_overlay_left(replace(s, intent=replace(s.intent, guarded=False)))


def _whatever_was_settled(s: Situation) -> Action | None:
    disks = tuple(replace(disk, record=replace(disk.record, settled=None)) for disk in s.disks)
    return rules_off.off_on_overlay(replace(s, disks=disks))


def _switch_on(s: Situation) -> Action | None:
    return rules_on.wait_for_migration(s) if s.record.guard is not Guard.OURS else None


def _quarantine_with_guard(s: Situation, reason: str) -> Action:
    waits = not s.suspended_by_us and s.record.guard is not Guard.NONE
    return situation.quarantine(replace(s, record=replace(s.record, guard=Guard.NONE)) if waits else s, reason)


def _since_the_call(*args: Any, answering_since: float | None, **kwargs: Any) -> bool:
    return may_be_in_flight(*args, answering_since=answering_since and -inf, **kwargs)


def _never_busy(*args: Any, control_idle: bool, **kwargs: Any) -> bool:
    return may_be_in_flight(*args, control_idle=True, **kwargs)


# ---------------------------------------------------------------------------------------------- I5, the guest
def _release_at_once(s: Situation) -> Action | None:
    return Action(Do.RELEASE) if s.intent.deleted else None


def _resume_also_if_paused_by_others(s: Situation) -> bool:
    return s.seen.power is Power.PAUSED and s.record.guard is not Guard.NONE


def _never_thaw_in_quarantine(s: Situation, reason: str) -> Action:
    return situation.quarantine(replace(s, record=replace(s.record, freeze=Freeze.TRIED)), reason)


# ---------------------------------------------------------------------------------------------- R7
def _take_it_for_ours(s: Situation) -> Action | None:
    return Action(Do.RECORD_SNAPSHOT) if s.on_overlay and s.record.snapshot is Snapshot.NONE else None


# ---------------------------------------------------------------------------------------------- FAULTS 5 and 51
def _never(_: Situation) -> Action | None:
    return None


def _by_name(disk: Case) -> bool:
    return situation.consistent(replace(disk, seen=replace(disk.seen, astray=False)))


SMALL = Setting(faults=1, writes=1)
MUTANTS = (
    Mutant(
        "R1",
        "the snapshot is taken while the guest runs",
        (_instead("RULES_ON", rules_on.take_snapshot, _snapshot_unguarded),),
        SMALL,
    ),
    Mutant(
        "R2",
        "P counts as settled as soon as the API shows it",
        tuple((module, "settle", _settle_in_memory) for module in (situation, rules_on, rules_off)),
        SMALL,
    ),
    Mutant("R3", "QEMU is never asked", ((machine, "needs_truth", _never_ask_qemu),), SMALL),
    Mutant("R4", "no barrier", ((machine, "decide", _without_barrier(machine.decide)),), SMALL),
    Mutant(
        "R5",
        "a job without <mirror> is never pivoted",
        ((situation, "ready", _ready_by_mirror_alone),),
        SMALL,
    ),
    Mutant(
        "R6",
        "off: what was pivoted is unlinked on an unsettled P",
        (
            _instead("RULES_OFF", rules_off.off_with_overlay_left, _unlink_what_was_pivoted),
            (Agent, "_unlink", _unlink_unproven),
        ),
        Setting(faults=2, writes=1),
    ),
    Mutant(
        "R6",
        "off: P=B after an intended pivot says nothing",
        (_instead("RULES_OFF", rules_off.off_with_overlay_left, _not_by_the_intent),),
        Setting(faults=2, writes=1),
    ),
    Mutant(
        "R7",
        "an earlier backup's overlay is copied from",
        (_instead("RULES_ON", rules_on.adopt, _take_it_for_ours),),
        Setting(faults=0, writes=1, orphan=True),
    ),
    Mutant(
        "offline",
        "what was merged is not compared",
        ((merging, "same", lambda _: True),),
        Setting(faults=2, writes=2, offline=True),
    ),
    Mutant(
        "offline",
        "what was merged counts without the lock",
        (_instead("RULES_OFF", rules_off.off_on_overlay, _anything_merged_counts),),
        Setting(faults=2, writes=2, offline=True),
    ),
    Mutant(
        "edits",
        "an overlay is unlinked without a last look at what P is on disk",
        ((Agent, "_unlink", _unlink_unproven),),
        Setting(faults=2, writes=0, edits=True),
    ),
    Mutant(
        "edits",
        "off: P=B proves that it was pivoted, also if a user wrote it",
        (_instead("RULES_OFF", rules_off.off_with_overlay_left, _if_p_names_base),),
        Setting(faults=2, writes=1, edits=True),
    ),
    Mutant(
        "edits",
        "off: P=O counts though P was settled on base since the pivot",
        (_instead("RULES_OFF", rules_off.off_on_overlay, _whatever_was_settled),),
        Setting(faults=2, writes=2, edits=True),
    ),
    Mutant(
        "migration",
        "a switch that was intended goes on",
        (_instead("RULES_ON", rules_on.wait_for_migration, _switch_on),),
        Setting(faults=1, writes=1, migration=True),
    ),
    Mutant(
        "pauses",
        "in quarantine the guard stays, and who pauses the guest then is taken for us",
        ((rules_on, "quarantine", _quarantine_with_guard),),
        Setting(faults=2, writes=0, pauses=True),
    ),
    Mutant(
        "barrier",
        "it is shorter than libvirt's own patience",
        ((clock, "BARRIER_SECONDS", 10.0),),
        Setting(faults=1, writes=1, clock=True),
    ),
    Mutant(
        "barrier",
        "it counts from the call, though libvirtd was stopped",
        ((clock, "may_be_in_flight", _since_the_call),),
        Setting(faults=1, writes=1, clock=True),
    ),
    Mutant(
        "barrier",
        "what libvirt is busy with does not count",
        ((clock, "may_be_in_flight", _never_busy),),
        Setting(faults=1, writes=1, clock=True),
    ),
    Mutant(
        "identity",
        "the file that QEMU writes is compared by name alone",
        (_instead("RULES_ON", situation.spare_astray_base, _never),),
        Setting(faults=1, writes=0, swaps=True),
    ),
    Mutant(
        "identity",
        "a quarantine is lifted where L, P and T agree by name",
        ((rules_on, "consistent", _by_name),),
        Setting(faults=1, writes=0, swaps=True),
    ),
    Mutant(
        "identity",
        "an overlay that holds a snapshot of the user is merged and removed",
        ((Case, "holds_snapshot", property(lambda _: False)),),
        Setting(faults=1, writes=0, snapshots=True),
    ),
    Mutant(
        "I5",
        "deleted, it is released without recording the orphan",
        tuple((module, "release_deleted", _release_at_once) for module in (situation, rules_on, rules_off)),
        Setting(faults=2, writes=0),
    ),
    Mutant(
        "guard",
        "a guest that was found paused is resumed",
        ((Situation, "suspended_by_us", property(_resume_also_if_paused_by_others)),),
        Setting(faults=0, writes=0, paused=True),
    ),
    Mutant(
        "freeze",
        "a quarantined guest stays frozen",
        ((rules_on, "quarantine", _never_thaw_in_quarantine),),
        Setting(faults=1, writes=0, quiesce=True),
    ),
)
