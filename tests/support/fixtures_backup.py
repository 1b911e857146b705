"""Runs backups as an agent does, without a cluster: the real driver on real libvirt."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.backups import BackupFactory, RunningBackup, make_node, spec_of
from vmbackup.api.identity import BackupId
from vmbackup.hypervisor.hypervisor import Hypervisor
from vmbackup.reconcile.node import Node
from vmbackup.reconcile.state import clock


@pytest.fixture
def node(hypervisor: Hypervisor, tmp_path: Path) -> Node:
    """A node of its own: state, locks and metrics. Failed commits are tried again soon."""
    return make_node(hypervisor, tmp_path / "state", tmp_path / "locks")


@pytest.fixture
def short_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backups of this process wait 1 s for a call that was left unanswered, not the 31 s of PROTOCOL R4.

    For tests that prove something else, and in which libvirt is dead or idle, so that no such call can still come.
    """
    monkeypatch.setattr(clock, "BARRIER_SECONDS", 1.0)


@pytest.fixture
def backup(node: Node, tmp_path: Path) -> Iterator[BackupFactory]:
    """Start backups; those that still run after the test are told to stop."""
    started: list[RunningBackup] = []

    def start(
        domain: str, *, again: RunningBackup | None = None, retry: str = "", store: Path | None = None, **spec: Any
    ) -> RunningBackup:
        name = f"backup-{len(started) + 1}"
        key = again.key if again else BackupId("tests", name, str(uuid.uuid4()))
        started.append(RunningBackup(node, key, spec_of(domain, **spec), store or tmp_path / "store", retry=retry))
        return started[-1]

    yield start
    for running in started:
        running.ask(stop=True)
