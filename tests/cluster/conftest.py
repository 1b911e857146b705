"""An agent on a real API server and a real libvirtd, with a node name and a store of its own for each test."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from sandbox.kube import KubeApi
from sandbox.libvirtd import Libvirtd
from tests.agents import Agent, Apply, VMBackup, manifest
from tests.manifests import store

_numbers = count(1)


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def stopped_agent(kube: KubeApi, libvirtd: Libvirtd, tmp_path: Path, store_path: Path) -> Iterator[Agent]:
    """An agent that is not started yet, and its store."""
    node = f"node-{next(_numbers)}"
    kube.apply(store(node, directory={"path": str(store_path)}))
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    agent = Agent(kube, libvirtd, node, tmp_path, port)
    yield agent
    agent.stop()


@pytest.fixture
def agent(stopped_agent: Agent) -> Agent:
    """A running agent."""
    stopped_agent.start()
    return stopped_agent


@pytest.fixture
def apply(kube: KubeApi, stopped_agent: Agent) -> Apply:
    """Apply VMBackups of this test's agent."""
    node = stopped_agent.node

    def make(domain: str, **spec: Any) -> VMBackup:
        made = VMBackup(kube, f"{node}-{next(_numbers)}")
        kube.apply(manifest(made.name, node, node, domain, **spec))
        return made

    return make
