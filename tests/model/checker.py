"""Breadth-first search of every state, the invariants of docs/protocol.md, and the shortest trace to a violation."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from time import perf_counter

from tests.model.agent import Agent
from tests.model.environment import BOOT_FAILS, background_steps, fault_steps, free_steps
from tests.model.libvirt import Step, block_job_steps, call_steps, libvirtd_starts
from tests.model.world import Setting, World, clean, content, needed, start
from vmbackup.reconcile.record import Copy, Snapshot
from vmbackup.reconcile.terms import Do


@dataclass
class Result:
    """What was found."""

    setting: Setting
    states: int = 0
    seconds: float = 0.0
    violations: dict[str, list[str]] = field(default_factory=dict[str, list[str]])  # what: its shortest trace

    @property
    def sound(self) -> bool:
        return not self.violations

    def __str__(self) -> str:
        head = f"{self.setting}: {self.states:,} states, {self.seconds:.0f} s, {len(self.violations)} violations"
        tales = [f"{what}\n    " + "\n    ".join(trace) for what, trace in self.violations.items()]
        return "\n  ".join([head, *tales])


class Checker:
    """Explores one setting."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.agent = Agent(setting)
        self.first = start(setting, self.agent.fresh)
        self.parents: dict[World, tuple[World, str] | None] = {self.first: None}
        self.before: dict[World, list[World]] = {}  # by steps that need neither a fault nor the user
        self.result = Result(setting)

    def run(self, *, stop_at_first: bool = False) -> Result:
        """Explore all states, or until the first violation of I1, I2, I3, I5 or the key invariant; then look at I4."""
        began = perf_counter()
        todo = deque([self.first])
        while todo and not (stop_at_first and self.result.violations):
            world = todo.popleft()
            for step in self.progress(world):
                self.before.setdefault(step.world, []).append(world)
                self._reach(world, step, todo)
            for step in self.chance(world):
                self._reach(world, step, todo)
        if not todo:
            self._find_the_way_home()
        self.result.states = len(self.parents)
        self.result.seconds = perf_counter() - began
        return self.result

    def progress(self, world: World) -> Iterator[Step]:
        """What happens if there are no more faults, and guest and user do nothing."""
        if world.call and world.libvirtd:
            yield from (step for step in call_steps(world) if not step.fault)
        if not world.libvirtd:
            yield Step("libvirtd starts", libvirtd_starts(world))
        yield from block_job_steps(world)
        yield from background_steps(world)
        yield from self.agent.steps(world)

    def chance(self, world: World) -> Iterator[Step]:
        """Guest, user and faults."""
        yield from free_steps(world, self.setting)
        if world.faults < self.setting.faults:
            n = world.faults + 1
            faults = [*fault_steps(world, self.setting), *self.agent.faults(world)]
            if world.call and world.libvirtd:
                faults += [step for step in call_steps(world) if step.fault]
            for step in faults:
                yield Step("FAULT " + step.label, step.world._replace(faults=n))

    def _reach(self, world: World, step: Step, todo: deque[World]) -> None:
        what = self._violated(world, step)
        if what:
            if what not in self.result.violations:
                self.result.violations[what] = [*self.trace(world), f"{step.label}   <== {what}"]
            return  # what follows from a violation says nothing more
        if step.world not in self.parents:
            self.parents[step.world] = (world, step.label)
            todo.append(step.world)

    # ------------------------------------------------------------------------------------------ invariants
    def _violated(self, before: World, step: Step) -> str:
        """The invariant that this step violates; empty if none."""
        after = step.world
        if before.guest == "off":
            if after.guest != "off" or step.label == BOOT_FAILS:
                return _violated_by_boot(before)
        elif what := self._violated_while_on(before, after):
            return what
        decided = after.plan if before.plan is None else None
        if decided and decided[1].it.do is Do.QUARANTINE and all(d.writes == d.live for d in before.disks):
            return "ALARM quarantine, though libvirt and QEMU agree"
        if any(x.overlay is not None and y.overlay is None for x, y in zip(before.disks, after.disks, strict=True)):
            return _violated_by_unlink(before, after)
        if after.vmbackup == "released" and before.vmbackup != "released":
            return self._violated_by_release(before)
        if after.record is not before.record and _taken(after) and not _taken(before):
            return (
                ""
                if all(d.copied == d.snapshot for d in before.disks)
                else "I2 the copy is not the content at the snapshot"
            )
        return ""

    def _violated_while_on(self, before: World, after: World) -> str:
        writable = after.guest == "running" and not after.frozen
        for disk in after.disks:
            if after.guest != "off" and content(disk, disk.writes) != disk.acked:
                return "I1 the running image lacks acknowledged writes"
            if writable and disk.durable != disk.writes and not self.setting.spared:
                return "KEY the guest can write, and P on disk names another image"
        if before.guest == "paused" and before.call and before.call[0].it.do is Do.RESUME and after.guest == "running":
            return "GUARD a guest that its user had paused is resumed"
        return ""

    def _violated_by_release(self, world: World) -> str:
        record = world.record.it
        recorded = record.orphan or (self.setting.orphan and record.snapshot is Snapshot.NONE)
        if not recorded and not all(clean(disk, world.guest) for disk in world.disks):
            return "I5 finalizer released, the chain neither clean nor recorded as an orphan"
        if world.guest == "suspended" or world.frozen:
            return "I5 finalizer released with the guest suspended or frozen by us"
        return ""

    # ------------------------------------------------------------------------------------------ I4
    def _find_the_way_home(self) -> None:
        good = {world for world in self.parents if self.home(world)}
        todo = list(good)
        while todo:
            for world in self.before.get(todo.pop(), ()):
                if world not in good:
                    good.add(world)
                    todo.append(world)
        stuck = (world for world in self.parents if world not in good)
        if (world := next(stuck, None)) is not None:
            count = len(self.parents) - len(good)
            next_action = self.agent.decision(world)[0].it
            what = f"I4 no way home from {count} states, the first of them: {describe(world)}, next: {next_action}"
            self.result.violations[what] = self.trace(world)

    def home(self, world: World) -> bool:
        """Chain clean, or off with a P that holds everything, or quarantine; never left suspended or frozen."""
        if world.plan or world.guest == "suspended" or world.frozen:
            return False
        record = world.record.it
        if record.quarantined or (world.vmbackup == "released" and not record.orphan):
            return True
        if all(clean(disk, world.guest) for disk in world.disks) and record.finished and world.guest != "io-error":
            return True
        if record.gave_up and record.finished:
            return True
        return world.guest == "off" and all(content(d, d.persistent) == d.acked for d in world.disks)

    def trace(self, world: World) -> list[str]:
        """The steps to this state, decisions and what comes about by itself left out."""
        steps: list[str] = []
        while (parent := self.parents[world]) is not None:
            world, label = parent
            if not label.startswith(("decide", "config becomes")):
                steps.append(label)
        return steps[::-1]


def _taken(world: World) -> bool:
    return world.record.it.copy is Copy.TAKEN


def _violated_by_boot(world: World) -> str:
    if world.record.it.quarantined:
        return ""
    contents = [content(disk, disk.persistent) for disk in world.disks]
    if None in contents:
        return "I1 unbootable: P names an overlay that is gone"
    return "" if contents == [disk.acked for disk in world.disks] else "I1 boot from a stale image"


def _violated_by_unlink(before: World, after: World) -> str:
    for x, y in zip(before.disks, after.disks, strict=True):
        if x.overlay is None or y.overlay is not None:
            continue
        if x.writes == "O" and after.guest != "off":
            return "I3 unlink of the image that QEMU writes"
        if x.persistent == "O" or (x.live == "O" and before.guest != "off"):
            return "I3 unlink of an overlay that an XML names"
        if x.durable == "O":
            return "I3 unlink of an overlay that the XML on disk names"
        if needed(x):
            return "I3 unlink of an overlay with data that base lacks"
    return ""


def describe(world: World) -> str:
    """A state, for people."""
    disks = " ".join(
        f"[T={d.writes} L={d.live} P={d.persistent} file={d.durable} O={d.overlay} B={d.base} job={d.job}/{d.mirror}]"
        for d in world.disks
    )
    return f"guest {world.guest}, {disks}, plan {world.plan and world.plan[1].it.do}"
