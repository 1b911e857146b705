"""A hypervisor that is a node of a cluster, with what `kubectl apply -k manifests/` installs; run by `make e2e`."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from sandbox.guest import Guest, make_disk
from sandbox.host import IMAGES, HostLibvirtd
from sandbox.kube import KubeApi
from sandbox.node import Node
from tests.e2e.cluster import DOMAIN, NODE, Cluster

_clusters: list[Cluster] = []


@pytest.fixture(scope="session")
def host() -> Iterator[HostLibvirtd]:
    """The libvirtd of the hypervisor."""
    with HostLibvirtd() as running:
        yield running


@pytest.fixture(scope="session")
def guest(host: HostLibvirtd) -> Guest:
    """A guest that writes on two disks and does not stop for anything; it boots while the cluster comes up."""
    disks = [
        make_disk("vda", IMAGES / f"{DOMAIN}-vda.raw", size_mib=160, bulk_mib=64),
        make_disk("vdb", IMAGES / f"{DOMAIN}-vdb.qcow2", image_format="qcow2", size_mib=64, bulk_mib=8),
    ]
    for disk in disks:
        Path(disk.path).chmod(0o600)  # as virt-install makes them: nobody but QEMU's user may even read them
    made = Guest(host.virsh, DOMAIN, IMAGES, disks, dirty_kib_per_second=2048, agent=True, system=host.system())
    made.define()
    made.start()
    return made


@pytest.fixture(scope="session")
def cluster(host: HostLibvirtd, guest: Guest) -> Iterator[Cluster]:
    """A cluster whose one node is the hypervisor; the agent runs on it, as the manifests have it."""
    with Node(NODE) as node:
        running = Cluster(node, host, guest)
        _clusters.append(running)
        running.install()
        guest.wait_for_agent()
        guest.wait_for_more()
        yield running
        _clusters.remove(running)


@pytest.fixture(scope="session")
def user(cluster: Cluster) -> KubeApi:
    """The server as somebody sees it who may `edit` the namespace team-a, and nothing else."""
    return cluster.user("alice", namespace="team-a")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the cluster has to say, when a test fails."""
    report = yield
    if report.failed:
        for cluster in _clusters:
            with suppress(Exception):
                report.sections.append(("the cluster", cluster.diagnosis()))
    return report
