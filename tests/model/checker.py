"""Visits every reachable state of a setting, checks the invariants of docs/protocol.md, and traces each violation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from time import perf_counter

from tests.model.agent import Agent
from tests.model.environment import background_steps, fault_steps, free_steps, guest_writes
from tests.model.invariants import Invariants
from tests.model.libvirt import base_swapped, block_job_steps, call_fails, call_steps, libvirtd_steps
from tests.model.search import WRITES, Search, fingerprint
from tests.model.trace import trace
from tests.model.user import user_steps
from tests.model.world import Disk, Kind, Setting, Step, World, ranked, start

NO_WAY_HOME = "I4 there is no way home"


@dataclass
class Result:
    """What was found."""

    setting: Setting
    states: int = 0
    seconds: float = 0.0
    violations: dict[str, str] = field(default_factory=dict[str, str])  # what is violated: its trace

    @property
    def sound(self) -> bool:
        return not self.violations

    def __str__(self) -> str:
        head = f"{self.setting}: {self.states:,} states, {self.seconds:.0f} s, {len(self.violations)} violations"
        return "\n".join([head, *self.violations.values()])


class Checker:
    """Explores one setting."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.agent = Agent(setting)
        self.invariants = Invariants(setting)
        self.first = start(setting, self.agent.fresh)
        self.search = Search(self.first)
        self.result = Result(setting)
        self._goes_home: set[int] = set()
        self._ranked: dict[Disk, Disk] = {}

    def run(self, *, stop_at_first: bool = False) -> Result:
        """Explore all states, or until the first violation."""
        began = perf_counter()
        for key, world in self.search:
            faults = self.search.faults < self.setting.faults
            writes = self.search.writes < self.setting.writes
            for step in self.steps(world, faults=faults, writes=writes):
                self._reach(key, world, step)
            self._must_go_home(key, world)
            if stop_at_first and self.result.violations:
                break
        self.result.states = len(self.search.came_from)
        self.result.seconds = perf_counter() - began
        return self.result

    def steps(self, world: World, *, faults: bool = True, writes: bool = True) -> Iterator[Step]:
        """Everything that may happen next."""
        yield from self.progress(world)
        yield from free_steps(world, lambda: self.agent.idle(world), self.setting.residual)
        if writes:
            yield from guest_writes(world)
        if faults:
            yield from fault_steps(world, self.setting)
            yield from self.agent.faults(world)
            if world.call and world.libvirtd:
                yield from call_fails(world)
                if self.setting.swaps:
                    yield from base_swapped(world)

    def progress(self, world: World) -> Iterator[Step]:
        """What happens if there are no more faults, and guest and user do nothing."""
        if world.call and world.libvirtd:
            yield from call_steps(world)
        yield from libvirtd_steps(world)
        yield from block_job_steps(world)
        yield from background_steps(world, self.setting)
        yield from self.agent.steps(world)
        yield from user_steps(world, lambda: self.agent.idle(world))

    def _reach(self, came_from: int, before: World, step: Step) -> None:
        if what := self.invariants.violated(before, step):
            if what not in self.result.violations:
                self.result.violations[what] = self._tale(came_from, what, step)
            return  # what follows from a violation says nothing more
        after = self._normal(before, step)
        faults = self.search.faults + (step.kind is Kind.FAULT)
        writes = self.search.writes + (step.kind is Kind.WRITE)
        self.search.found(fingerprint(after), after, faults, writes, came_from)

    def _normal(self, before: World, step: Step) -> World:
        """The world after a step, in the form in which equal worlds are equal."""
        after = step.world
        if after.disks is before.disks:
            return after
        return after._replace(disks=tuple([self._ranked.get(disk) or self._rank(disk) for disk in after.disks]))

    def _rank(self, disk: Disk) -> Disk:
        normal = self._ranked[disk] = ranked(disk)
        return self._ranked.setdefault(normal, normal)

    # ------------------------------------------------------------------------------------------ I4
    def _must_go_home(self, key: int, world: World) -> None:
        """I4: let everything take its course, always the same one, or else any other: it must lead home."""
        course: dict[int, None] = {}
        at = fingerprint(world)
        state = world
        while at not in self._goes_home and not self.invariants.home(state):
            step = next(self.progress(state), None)
            if step is None or at in course:
                return self._look_everywhere(key, world)
            if self.invariants.violated(state, step):
                return None  # what follows from a violation says nothing more
            course[at] = None
            state = self._normal(state, step)
            at = fingerprint(state)
        self._goes_home.update(course)
        self._goes_home.add(at)
        return None

    def _look_everywhere(self, key: int, world: World) -> None:
        todo = [world]
        seen = {fingerprint(world)}
        while todo:
            state = todo.pop()
            if self.invariants.home(state) or fingerprint(state) in self._goes_home:
                self._goes_home.add(fingerprint(world))
                return
            for step in self.progress(state):
                if self.invariants.violated(state, step):
                    continue
                after = self._normal(state, step)
                if fingerprint(after) not in seen:
                    seen.add(fingerprint(after))
                    todo.append(after)
        if NO_WAY_HOME not in self.result.violations:
            self.result.violations[NO_WAY_HOME] = self._tale(key, NO_WAY_HOME)

    # ------------------------------------------------------------------------------------------ tales
    def _tale(self, key: int, what: str, last: Step | None = None) -> str:
        """The way to a state, and perhaps a last step: found again by the keys along it."""
        world = self.first
        labels: list[str] = []
        for at in self.search.path(key):
            steps = ((step.label, self._normal(world, step)) for step in self.steps(world))
            label, world = next((label, after) for label, after in steps if fingerprint(after) == at & ~WRITES)
            labels.append(label)
        if last is not None:
            labels.append(last.label)
        after = world if last is None else last.world
        return trace(self.setting, what, labels, after, self.agent.decision(world)[0].it)
