"""The sweep of a node on which something does not answer: a mount, or one of the domains."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmbackup.agent.context import Context
from vmbackup.agent.leftovers import OrphanPolicy, Orphans
from vmbackup.agent.runtime import existing_files
from vmbackup.agent.runtime.existing_files import ExistingFiles
from vmbackup.agent.runtime.queue import Queue
from vmbackup.agent.runtime.threads import Threads
from vmbackup.agent.sweep import Sweep
from vmbackup.errors import TransientError
from vmbackup.hypervisor.guest import Guest
from vmbackup.protocol.record import DiskRecord, Record, Snapshot
from vmbackup.reconcile.leftovers.reader import Leftovers, read_all
from vmbackup.reconcile.node import Node
from vmbackup.reconcile.state.journal import Journal
from vmbackup.telemetry.metrics import Metrics

SPEC = {"nodeName": "a", "domain": "web", "storeRef": {"name": "s"}}


@pytest.fixture
def dead_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system whose server is away: who asks for one of its files is kept waiting until it is back."""
    mount, back, stat = tmp_path / "dead", Event(), Path.stat

    def hanging(path: Path, **how: Any) -> Any:
        if path.is_relative_to(mount):
            back.wait(10)
        return stat(path, **how)

    monkeypatch.setattr(Path, "stat", hanging)
    monkeypatch.setattr(existing_files, "_PATIENCE", 0.2)
    yield mount
    back.set()


def left_by(uid: str, folder: Path, **more: Any) -> Record:
    """A backup whose guest is on an overlay there."""
    disk = DiskRecord("vda", base=str(folder / "web.raw"), overlay=str(folder / f"web.vmb-{uid}-vda.qcow2"))
    return Record(uid, "tenant", "web", "web", f"uuid-of-{uid}", disks=(disk,), snapshot=Snapshot.DONE, **more)


def sweep_of(state_dir: Path, lock_dir: Path) -> tuple[Sweep, Metrics]:
    """That of a node without a domain, and of an API server without a VMBackup."""
    metrics = Metrics()
    node = Node(cast(Any, SimpleNamespace(guests=list)), state_dir, metrics, lock_dir=lock_dir)
    events = SimpleNamespace(warning=lambda *_: None)
    cluster = SimpleNamespace(of_node=lambda _plural, _node: [])
    policies = SimpleNamespace(look=lambda: None)
    context = Context(node, cast(Any, cluster), cast(Any, events), cast(Any, policies), Queue(1), Threads())
    registry = SimpleNamespace(uids=set(), unattended=lambda _: set(), vanished=lambda _: None, attends=lambda _: False)
    orphans = Orphans(context, "a", OrphanPolicy.REPORT)
    return Sweep(context, cast(Any, registry), orphans, "a", 300.0), metrics


def test_a_mount_that_is_dead_keeps_neither_the_event_loop_nor_the_start_of_an_agent_waiting(
    tmp_path: Path, dead_mount: Path
) -> None:
    state_dir = tmp_path / "state"
    for record in (
        left_by("begun", dead_mount, spec=SPEC),
        left_by("orphan", dead_mount, spec=SPEC, orphan=True),
        left_by("run", dead_mount),
    ):
        Journal.start(state_dir, record).close()

    async def sweep() -> tuple[float, float]:
        longest = 0.0

        async def beat() -> None:
            nonlocal longest
            while True:
                before = time.monotonic()
                await asyncio.sleep(0.01)
                longest = max(longest, time.monotonic() - before)

        beating = asyncio.create_task(beat())
        await asyncio.sleep(0)
        sweep, metrics = sweep_of(state_dir, tmp_path / "locks")
        await sweep.begin()
        await sweep.look()
        beating.cancel()
        return longest, metrics.registry.get_sample_value("vmbackup_orphan_overlays") or 0.0

    began = time.monotonic()
    longest, orphans = asyncio.run(sweep())
    assert longest < 5, "the event loop was blocked"
    assert time.monotonic() - began < 8, "it waited for the mount"
    assert orphans == 3, "what cannot be seen counts as there"


def test_where_a_mount_is_dead_one_thread_is_lost_and_no_other(tmp_path: Path, dead_mount: Path) -> None:
    asked: list[str] = []

    class Counted(Threads):
        async def run(self, function: Any, name: str, *, awaited: bool = True) -> Any:
            asked.append(name)
            return await super().run(function, name, awaited=awaited)

    async def ask() -> list[set[str]]:
        files = ExistingFiles(Counted())
        return [await files.of([str(dead_mount / "a"), str(tmp_path)]) for _ in range(3)]

    assert asyncio.run(ask()) == [{str(dead_mount / "a"), str(tmp_path)}] * 3
    assert asked == ["existing-files"]


def test_of_files_that_can_be_seen_those_that_are_there_are_told(tmp_path: Path) -> None:
    async def ask() -> set[str]:
        return await ExistingFiles(Threads()).of([str(tmp_path), str(tmp_path / "gone")])

    assert asyncio.run(ask()) == {str(tmp_path)}


class Domain:
    """One of which libvirt tells what it is told to."""

    def __init__(self, name: str, error: Exception | None = None) -> None:
        self.name = self.uuid = name
        self._error = error

    def live_xml(self) -> str | None:
        if self._error is not None:
            raise self._error
        return "<domain id='1'/>"

    def persistent_xml(self) -> str | None:
        return "<domain/>"


def looked_at(*domains: Domain) -> list[Leftovers]:
    return list(read_all(cast("list[Guest]", domains)))


def test_a_domain_that_cannot_be_looked_at_hides_no_other(caplog: pytest.LogCaptureFixture) -> None:
    sick = Domain("sick", TransientError("sick: reading the live XML: no monitor", reason="HypervisorError"))
    seen = looked_at(Domain("one"), sick, Domain("other"))
    assert [(look.guest.name, look.live is not None) for look in seen] == [
        ("one", True),
        ("sick", False),
        ("other", True),
    ]
    assert "sick: reading the live XML: no monitor" in caplog.text


def test_while_libvirtd_is_away_what_was_seen_last_counts_on() -> None:
    with pytest.raises(TransientError, match="no libvirtd"):
        looked_at(Domain("one"), Domain("two", TransientError("no libvirtd", reason="HypervisorAway")))
