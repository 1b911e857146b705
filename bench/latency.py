"""How soon a new VMBackup is at its snapshot, how soon an idle one is deleted, and what memory an idle agent takes.

From the request to the API server until a watch shows it; the start-up of kubectl comes on top.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from kubernetes import watch
from kubernetes.client import CustomObjectsApi
from rich.console import Console
from rich.table import Table
from urllib3.exceptions import HTTPError

from sandbox.kube import KubeApi
from sandbox.libvirtd import Libvirtd, domain_xml
from tests.support.agents import Agent, manifest
from tests.support.domains import make_disk
from tests.support.manifests import store
from vmbackup.cluster.client import load_client

SNAPSHOT_MS, DELETE_MS, RSS_MB = 200, 2000, 90
CRDS = Path(__file__).parent.parent / "crds"
_RESOURCE = ("vmbackup.dev", "v1alpha1", "default", "vmbackups")
_LONGEST = 60.0  # seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=10, help="VMBackups, one after the other")


def run(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="vmb-") as folder:
        directory = Path(folder)
        with KubeApi(directory / "kube") as kube, Libvirtd(directory / "vm") as libvirtd:
            kube.apply_crds(CRDS)
            agent = Agent(kube, libvirtd, "bench", directory, _free_port())
            kube.apply(store("bench", directory={"path": str(directory / "store")}))
            _start_domain(libvirtd, directory)
            agent.start()
            idle = _settled_rss(agent)
            try:
                rounds = _Rounds(kube)
                for number in range(arguments.rounds):
                    rounds.one(f"bench-{number}")
                return _show(rounds, idle, _settled_rss(agent))
            finally:
                agent.stop()


class _Rounds:
    """Creates and deletes VMBackups, and sees what a watch shows of them, and when."""

    def __init__(self, kube: KubeApi) -> None:
        self.to_snapshot: list[float] = []
        self.to_deleted: list[float] = []
        self._api = CustomObjectsApi(load_client(str(kube.kubeconfig)))
        self._seen: dict[tuple[str, str], float] = {}
        self._news = threading.Condition()
        self._watching = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def one(self, name: str) -> None:
        body = manifest(name, "bench", "bench", "bench")
        started = time.monotonic()
        self._api.create_namespaced_custom_object(*_RESOURCE, body)
        self.to_snapshot.append(self._when(name, "Snapshotting") - started)
        self._when(name, "Ready")
        self._when(name, "Idle")
        started = time.monotonic()
        self._api.delete_namespaced_custom_object(*_RESOURCE, name)
        self.to_deleted.append(self._when(name, "DELETED") - started)

    def _when(self, name: str, what: str) -> float:
        with self._news:
            if not self._news.wait_for(lambda: (name, what) in self._seen, _LONGEST):
                raise TimeoutError(f"{name} is not {what} after {_LONGEST:.0f} s")
            return self._seen[name, what]

    def _watch(self) -> None:
        stream = cast("Callable[..., Iterable[dict[str, Any]]]", watch.Watch().stream)
        with suppress(HTTPError):  # the API server ends before this does
            for event in stream(self._api.list_namespaced_custom_object, *_RESOURCE):
                self._take_in(event)

    def _take_in(self, event: dict[str, Any]) -> None:
        now = time.monotonic()
        with self._news:
            for what in _happenings(event):
                self._seen.setdefault((event["object"]["metadata"]["name"], what), now)
            self._news.notify_all()


def _happenings(event: dict[str, Any]) -> list[str]:
    found = event["object"]
    status = found.get("status", {})
    ready = any(each["type"] == "Ready" and each["status"] == "True" for each in status.get("conditions", ()))
    happened = [event["type"], status.get("phase", "")]
    if status.get("phase") not in ("", "Pending"):
        happened.append("Snapshotting")  # a watch may skip it
    if ready:
        happened += ["Ready"] if found["metadata"].get("finalizers") else ["Ready", "Idle"]
    return happened


def _start_domain(libvirtd: Libvirtd, directory: Path) -> None:
    xml = directory / "domain.xml"
    xml.write_text(domain_xml("bench", [make_disk(directory, "vda", "raw", "8M")]))
    libvirtd.virsh("define", str(xml))
    libvirtd.virsh("start", "bench", "--paused")


def _settled_rss(agent: Agent) -> float:
    """What it takes once it has looked around and given back what it does not need, in MB."""
    deadline = time.monotonic() + 2 * float(agent.flags["relist-interval"])
    least = agent.rss_mb()
    while time.monotonic() < deadline:
        time.sleep(0.5)
        least = min(least, agent.rss_mb())
    return least


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _show(rounds: _Rounds, idle: float, after: float) -> int:
    table = Table("", "median", "longest", "wanted", title=f"{len(rounds.to_snapshot)} VMBackups of an 8 MiB disk")
    rows = (("create to Snapshotting", rounds.to_snapshot, SNAPSHOT_MS), ("delete, idle", rounds.to_deleted, DELETE_MS))
    for name, seconds, wanted in rows:
        median, longest = (f"{1000 * value:.0f} ms" for value in (statistics.median(seconds), max(seconds)))
        table.add_row(name, median, longest, f"below {wanted} ms")
    table.add_row("memory of an idle agent, at first", f"{idle:.0f} MB", "", f"below {RSS_MB} MB")
    table.add_row("memory of an idle agent, afterwards", f"{after:.0f} MB", "", f"below {RSS_MB} MB")
    Console().print(table)
    good = all(1000 * statistics.median(seconds) < wanted for _, seconds, wanted in rows) and after < RSS_MB
    return 0 if good else 1
