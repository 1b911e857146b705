"""Fixtures that start a part of the world once for all tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.kube import KubeApi

pytest_plugins = [
    "tests.support.fixtures_storage",
    "tests.support.fixtures_hypervisor",
    "tests.support.fixtures_backup",
]

# A shell that starts us in the background has us ignore SIGINT, and what the tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

CRDS = Path(__file__).parent.parent / "crds"


@pytest.fixture(scope="session")
def bare_kube(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeApi]:
    """A real API server, one for the whole run, on which nothing of ours is installed."""
    with KubeApi(tmp_path_factory.mktemp("kube")) as kube:
        yield kube


@pytest.fixture(scope="session")
def kube(bare_kube: KubeApi) -> KubeApi:
    """A real API server that serves our resources. Tests share it: give each its own namespace or node name."""
    bare_kube.apply_crds(CRDS)
    return bare_kube
