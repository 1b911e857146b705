"""Which states were seen, and how each was first reached: 62 bits of a hash for each, so that tens of millions fit.

A state does not count what it took to get there. Whatever can follow after many faults can follow after fewer, so a
state is looked at again only if it is reached with fewer guest writes than ever; faults come in rising order anyway.
(Two states with the same 62 bits would be taken for one: with 30 million states the odds of any are 1 in 5,000.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

S = TypeVar("S")
WRITES = 3  # the two lowest bits of a key: guest writes so far
_STATE = (1 << 62) - 1 - WRITES


def fingerprint(state: object) -> int:
    """A state, without what it took to get there."""
    return hash(state) & _STATE


class Search(Generic[S]):
    """The states still to be looked at, those with the fewest faults first, then those with the fewest writes."""

    def __init__(self, first: S) -> None:
        self.came_from: dict[int, int] = {}  # key: the key that it was first reached from
        self.faults = self.writes = 0
        self._now: deque[tuple[int, S]] = deque()
        self._later: dict[tuple[int, int], dict[int, tuple[int, S]]] = {}
        self.found(fingerprint(first), first, self.faults, self.writes)

    def __iter__(self) -> Iterator[tuple[int, S]]:
        """Every state once it is its turn, with its key."""
        while self._now or self._take_up_later():
            if self._now:
                yield self._now.popleft()

    def found(self, key: int, state: S, faults: int, writes: int, came_from: int = 0) -> None:
        """A step leads to this state."""
        if any((key | w) in self.came_from for w in range(writes + 1)):
            return
        key |= writes
        if (faults, writes) == (self.faults, self.writes):
            self.came_from[key] = came_from
            self._now.append((key, state))
        else:
            self._later.setdefault((faults, writes), {}).setdefault(key, (came_from, state))

    def _take_up_later(self) -> bool:
        if not self._later:
            return False
        self.faults, self.writes = min(self._later)
        for key, (came_from, state) in self._later.pop((self.faults, self.writes)).items():
            self.found(key & _STATE, state, self.faults, self.writes, came_from)
        return True

    def path(self, key: int) -> list[int]:
        """The keys from the first state (left out) to this one."""
        keys: list[int] = []
        while came_from := self.came_from[key]:
            keys.append(key)
            key = came_from
        return keys[::-1]
