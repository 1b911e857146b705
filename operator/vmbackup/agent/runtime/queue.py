"""Who may run: one backup a domain, so many a node, and those that have begun before all others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(eq=False)
class Ticket:
    """A place in the queue. `domain` is a UUID ('' if not known); `begun`: its guest may be on an overlay already."""

    uid: str
    name: str
    domain: str
    begun: bool
    since: str  # creationTimestamp: first come, first served
    admitted: bool = False
    abandoned: bool = False
    news: asyncio.Event = field(default_factory=asyncio.Event)
    slot: bool = False  # counts towards the limit of the node

    @property
    def rank(self) -> tuple[bool, str, str]:
        """Its place: the smallest first."""
        return (not self.begun, self.since, self.name)


class Queue:
    """Admits backups. Belongs to the event loop: none of this may be called from another thread.

    `limit`: how many that have not begun yet are admitted beside those that run. Begun ones are never kept waiting for
    it, since a guest must not stay on its overlay because its node is busy.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: list[Ticket] = []
        self._running: list[Ticket] = []
        self._reserved: dict[str, str] = {}

    def reserve(self, domain: str, uid: str) -> None:
        """Keep a domain for a backup that had begun before this process did, until it comes and has run."""
        self._reserved.setdefault(domain, uid)

    def unreserve(self, uid: str) -> None:
        """That backup does not need its domain any more."""
        self._reserved = {domain: owner for domain, owner in self._reserved.items() if owner != uid}
        self._admit()

    def reserved(self, uid: str) -> bool:
        """Whether a domain is kept for this backup."""
        return uid in self._reserved.values()

    async def enter(self, ticket: Ticket, tell: Callable[[str], None]) -> bool:
        """Return once it may run; `tell` is given what it waits for, each time that changes. False: abandoned."""
        self._waiting.append(ticket)
        self._waiting.sort(key=lambda each: each.rank)
        self._admit()
        told = ""
        try:
            while not (ticket.admitted or ticket.abandoned):
                if (why := self._obstacle(ticket)) != told:
                    told = why
                    tell(why)
                ticket.news.clear()
                await ticket.news.wait()
        finally:
            if not ticket.admitted:
                self.leave(ticket)
        return ticket.admitted

    def abandon(self, ticket: Ticket) -> None:
        """It need not wait any longer. Nothing happens if it was admitted already."""
        ticket.abandoned = True
        ticket.news.set()

    def leave(self, ticket: Ticket) -> None:
        """It is done, or waits no longer."""
        self._waiting = [each for each in self._waiting if each is not ticket]
        self._running = [each for each in self._running if each is not ticket]
        self._admit()

    def park(self, ticket: Ticket) -> None:
        """It waits for its guest or a human: others may run meanwhile, though not on its domain."""
        if ticket.slot:
            ticket.slot = False
            self._admit()

    def _admit(self) -> None:
        for ticket in list(self._waiting):
            if not self._obstacle(ticket):
                ticket.admitted = ticket.slot = True
                self._waiting.remove(ticket)
                self._running.append(ticket)
            ticket.news.set()

    def _obstacle(self, ticket: Ticket) -> str:
        """What keeps it from running; '' if nothing does."""
        if ticket.domain:
            for other in self._running:
                if other.domain == ticket.domain:
                    return f"{other.name} is backing up the same domain"
            if self._reserved.get(ticket.domain, ticket.uid) != ticket.uid:
                return "an earlier backup of the same domain is carried on first"
        if not ticket.begun and sum(other.slot for other in self._running) >= self._limit:
            return f"the node backs up as many domains at a time as it may: {self._limit} (--max-concurrent-backups)"
        return ""
