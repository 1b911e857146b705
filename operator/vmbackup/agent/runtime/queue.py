"""Admission queue: one backup per domain, a limit per node; backups that have begun come first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(eq=False)
class Ticket:
    """A place in the queue. `domain` is a UUID ('' if unknown); `begun`: its guest may already be on an overlay."""

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
        """The order in the queue, smallest first."""
        return (not self.begun, self.since, self.name)


class Queue:
    """Admits backups. Belongs to the event loop: no method may be called from another thread.

    `limit`: the number of backups that may run at a time. It does not delay backups that have begun, because a guest
    must not stay on its overlay while its node is busy.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: list[Ticket] = []
        self._running: list[Ticket] = []
        self._reserved: dict[str, str] = {}

    def reserve(self, domain: str, uid: str) -> None:
        """Reserve a domain for a backup that had begun before this process started, until it has run."""
        self._reserved.setdefault(domain, uid)

    def unreserve(self, uid: str) -> None:
        """End the reservation of this backup."""
        self._reserved = {domain: owner for domain, owner in self._reserved.items() if owner != uid}
        self._admit()

    def reserved(self, uid: str) -> bool:
        """Whether a domain is reserved for this backup."""
        return uid in self._reserved.values()

    async def enter(self, ticket: Ticket, tell: Callable[[str], None]) -> bool:
        """Return True once it may run, False if abandoned. `tell` is called with each new reason to wait."""
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
        """End the wait. Does nothing if it was already admitted."""
        ticket.abandoned = True
        ticket.news.set()

    def leave(self, ticket: Ticket) -> None:
        """Leave the queue, at the end of a run or of a wait."""
        self._waiting = [each for each in self._waiting if each is not ticket]
        self._running = [each for each in self._running if each is not ticket]
        self._admit()

    def park(self, ticket: Ticket) -> None:
        """Free its slot while it waits for its guest or a person. Its domain stays taken."""
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
        """The reason to wait; '' if there is none."""
        if ticket.domain:
            for other in self._running:
                if other.domain == ticket.domain:
                    return f"{other.name} is backing up the same domain"
            if self._reserved.get(ticket.domain, ticket.uid) != ticket.uid:
                return "an earlier backup of the same domain continues first"
        if not ticket.begun and sum(other.slot for other in self._running) >= self._limit:
            return f"the node is at its limit of concurrent backups: {self._limit} (--max-concurrent-backups)"
        return ""
