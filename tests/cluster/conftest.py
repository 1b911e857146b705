"""Agents on a real API server and a real libvirtd, each with a node name and a store of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox import binaries
from sandbox.kube import KubeApi
from sandbox.libvirtd import Libvirtd
from sandbox.processes import Program
from tests.support.agents import SECONDS, SLOW, Agent, CatchBackup, VMBackup, agent_of, answers, free_port, make_agent
from tests.support.domains import Domain, DomainFactory
from tests.support.installed import MANIFESTS

STATE_METRICS = MANIFESTS / "components/monitoring/kube-state-metrics.yaml"
STATE_METRICS_ROLE = {
    "apiVersion": "rbac.authorization.k8s.io/v1",
    "kind": "ClusterRole",
    "metadata": {"name": "kube-state-metrics"},
    "rules": [
        {"apiGroups": ["vmbackup.dev"], "resources": ["vmbackups"], "verbs": ["get", "list", "watch"]},
        {
            "apiGroups": ["apiextensions.k8s.io"],
            "resources": ["customresourcedefinitions"],
            "verbs": ["get", "list", "watch"],
        },
    ],
}
"""What the head of that file asks for."""


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeApi]:
    """A real API server on which manifests/ is installed as docs/install.md has it, one for the whole run."""
    with KubeApi(tmp_path_factory.mktemp("installed")) as kube:
        kube.kubectl("apply", "-k", MANIFESTS)
        kube.kubectl(
            "wait", "--for=condition=Established", "--timeout=30s", "crd", "-l", "app.kubernetes.io/name=vmbackup"
        )
        yield kube


@pytest.fixture(scope="session")
def agent(kube: KubeApi, libvirtd: Libvirtd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """A running agent, one for all tests that leave it as it is."""
    shared = make_agent(kube, libvirtd, tmp_path_factory.mktemp("agent"))
    shared.start(max_concurrent_backups="3", orphan_policy="Report")  # other tests leave overlays, for a while
    yield shared
    shared.stop()


@pytest.fixture
def own_agent(kube: KubeApi, libvirtd: Libvirtd, tmp_path: Path) -> Iterator[Agent]:
    """An agent for this test only, not started yet."""
    with agent_of(kube, libvirtd, tmp_path) as own:
        yield own


@pytest.fixture
def second_agent(own_agent: Agent, kube: KubeApi, libvirtd: Libvirtd, tmp_path: Path) -> Iterator[Agent]:
    """Another agent for the node of `own_agent`, by mistake; not started yet. It has a state of its own."""
    second = Agent(kube, libvirtd, own_agent.node, tmp_path / "second", free_port())
    yield second
    second.stop()


@pytest.fixture
def copying(domain: DomainFactory) -> CatchBackup:
    """Catches a backup in the middle of copying 16 MiB, slowly; the guest holds 0x11 in them."""

    def catch(agent: Agent, **spec: Any) -> tuple[VMBackup, Domain]:
        guest = domain(size="64M")
        guest.write("vda", 0x11, length="16M")
        made = agent.apply(guest.name, **{"copy.bandwidth": SLOW, **spec})
        made.wait_for_copying()
        return made, guest

    return catch


@pytest.fixture
def vanished(copying: CatchBackup) -> CatchBackup:
    """Catches a backup whose agent was killed in the middle of its copy, and which is gone since, held by nobody."""

    def catch(agent: Agent, **spec: Any) -> tuple[VMBackup, Domain]:
        agent.start()
        made, guest = copying(agent, **spec)
        agent.kill()
        made.vanish()
        return made, guest

    return catch


@pytest.fixture
def committing(copying: CatchBackup) -> CatchBackup:
    """Catches a backup in the middle of committing 32 MiB, slowly; the guest wrote 0x22 there meanwhile."""

    def catch(agent: Agent, **spec: Any) -> tuple[VMBackup, Domain]:
        made, guest = copying(agent, **{"commit.bandwidth": SLOW, **spec})
        guest.write("vda", 0x22, offset="16M", length="32M")
        made.patch({"copy": {"bandwidth": None}})
        made.wait_for_phase("Committing")
        return made, guest

    return catch


@pytest.fixture
def state_metrics(kube: KubeApi, tmp_path: Path) -> Iterator[str]:
    """Address and port of a kube-state-metrics that has our configuration."""
    user = {"kind": "User", "name": "kube-state-metrics", "apiGroup": "rbac.authorization.k8s.io"}
    role = {"kind": "ClusterRole", "name": "kube-state-metrics", "apiGroup": "rbac.authorization.k8s.io"}
    binding = {**STATE_METRICS_ROLE, "kind": "ClusterRoleBinding", "subjects": [user], "roleRef": role}
    del binding["rules"]
    kube.apply(STATE_METRICS_ROLE, binding)
    port = free_port()
    program = Program("kube-state-metrics", tmp_path)
    program.start(
        [
            binaries.path("kube-state-metrics"),
            f"--kubeconfig={kube.kubeconfig_for('kube-state-metrics')}",
            f"--custom-resource-state-config-file={STATE_METRICS}",
            "--custom-resource-state-only",
            "--host=127.0.0.1",
            f"--port={port}",
            "--telemetry-host=127.0.0.1",
            f"--telemetry-port={free_port()}",
        ]
    )
    program.wait_until(lambda: answers(f"http://127.0.0.1:{port}/healthz"), seconds=SECONDS)
    yield f"127.0.0.1:{port}"
    program.stop()
