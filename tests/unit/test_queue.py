"""Who may run: one backup a domain, so many a node, and those that have begun before all others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from vmbackup.agent.runtime.queue import Queue, Ticket


def ticket(name: str, domain: str = "", *, begun: bool = False, since: str = "1") -> Ticket:
    return Ticket(uid=name, name=name, domain=domain or f"domain of {name}", begun=begun, since=since)


class Crowd:
    """Tickets that stand in a queue."""

    def __init__(self, limit: int) -> None:
        self.queue = Queue(limit)
        self.told: dict[str, list[str]] = {}
        self._tasks: dict[str, asyncio.Task[bool]] = {}

    async def join(self, *tickets: Ticket) -> None:
        for each in tickets:
            told = self.told.setdefault(each.name, [])
            self._tasks[each.name] = asyncio.create_task(self.queue.enter(each, told.append))
        await self.settle()

    async def settle(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    @property
    def admitted(self) -> set[str]:
        return {name for name, task in self._tasks.items() if task.done() and task.result()}

    @property
    def gone(self) -> set[str]:
        return {name for name, task in self._tasks.items() if task.done() and not task.result()}

    def __getattr__(self, name: str) -> Any:
        """leave, park, reserve, …, and time for it to take effect."""
        method: Callable[..., None] = getattr(self.queue, name)

        async def call(*arguments: Any) -> None:
            method(*arguments)
            await self.settle()

        return call


def played(scene: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def test() -> None:
        asyncio.run(scene())

    test.__name__ = scene.__name__
    return test


@played
async def test_no_more_are_admitted_than_the_node_may_run() -> None:
    crowd = Crowd(2)
    a, b, c = (ticket(name) for name in "abc")
    await crowd.join(a, b, c)
    assert crowd.admitted == {"a", "b"}
    assert "2 (--max-concurrent-backups)" in crowd.told["c"][-1]
    await crowd.leave(a)
    assert crowd.admitted == {"a", "b", "c"}


@played
async def test_one_domain_is_backed_up_once_at_a_time_and_others_overtake() -> None:
    crowd = Crowd(2)
    a, b, c = ticket("a", "web"), ticket("b", "web"), ticket("c")
    await crowd.join(a, b, c)
    assert crowd.admitted == {"a", "c"}
    assert crowd.told["b"] == ["a is backing up the same domain"]
    await crowd.leave(a)
    assert crowd.admitted == {"a", "b", "c"}


@played
async def test_first_come_first_served_whatever_the_order_they_are_heard_of() -> None:
    crowd = Crowd(1)
    running = ticket("running")
    await crowd.join(running, ticket("late", since="3"), ticket("early", since="2"))
    await crowd.leave(running)
    assert crowd.admitted == {"running", "early"}


@played
async def test_one_that_has_begun_goes_first_and_does_not_wait_for_the_node() -> None:
    crowd = Crowd(1)
    a, waiting, begun = ticket("a", "web"), ticket("waiting", "web"), ticket("begun", "db", begun=True, since="9")
    await crowd.join(a, waiting, begun)
    assert crowd.admitted == {"a", "begun"}


@played
async def test_one_that_has_begun_still_waits_for_its_domain() -> None:
    crowd = Crowd(1)
    a, begun = ticket("a", "web"), ticket("begun", "web", begun=True)
    await crowd.join(a, begun)
    assert crowd.admitted == {"a"}


@played
async def test_a_parked_one_leaves_its_place_on_the_node_but_not_its_domain() -> None:
    crowd = Crowd(1)
    a, same, other = ticket("a", "web"), ticket("same", "web"), ticket("other")
    await crowd.join(a, same, other)
    await crowd.park(a)
    assert crowd.admitted == {"a", "other"}


@played
async def test_a_domain_is_kept_for_the_backup_that_had_begun_on_it_before_the_restart() -> None:
    crowd = Crowd(2)
    await crowd.reserve("web", "begun")
    begun, other = ticket("begun", "web", begun=True), ticket("other", "web")
    await crowd.join(other)
    assert crowd.admitted == set()
    await crowd.join(begun)
    assert crowd.admitted == {"begun"}
    await crowd.leave(begun)
    assert crowd.admitted == {"begun"}
    await crowd.unreserve("begun")
    assert crowd.admitted == {"begun", "other"}


@played
async def test_one_that_gives_up_waiting_is_not_admitted_later() -> None:
    crowd = Crowd(1)
    a, b = ticket("a"), ticket("b")
    await crowd.join(a, b)
    await crowd.abandon(b)
    assert crowd.gone == {"b"}
    await crowd.leave(a)
    assert crowd.admitted == {"a"}


@played
async def test_one_whose_domain_is_not_known_waits_only_for_the_node() -> None:
    crowd = Crowd(2)
    unknown = [Ticket(uid=name, name=name, domain="", begun=False, since="1") for name in "abc"]
    await crowd.join(*unknown)
    assert crowd.admitted == {"a", "b"}
