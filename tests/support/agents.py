"""An agent in a process of its own, and VMBackups as a user sees them: by kubectl, and on disk."""

from __future__ import annotations

import json
import re
import signal
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from sandbox.kube import KubeApi, KubectlError
from sandbox.libvirtd import Libvirtd
from sandbox.processes import Program
from tests.support.domains import Domain, wait_until, what_is_wrong_with
from tests.support.manifests import backup, store
from tests.support.proof import wrong_digests
from vmbackup.api.resource import condition
from vmbackup.protocol.record import Record
from vmbackup.reconcile.state import journal as journals

_numbers, _nodes = count(1), count(1)
SECONDS = 60  # for anything to happen on a loaded machine
SLOW = "1Mi"  # bytes per second: a copy of 16 MiB, or a commit of 32 MiB, can be caught in the middle


class Agent:
    """`vmbackup agent` for one node. Killed, stopped and started again at will; its state stays."""

    def __init__(self, kube: KubeApi, libvirtd: Libvirtd, node: str, directory: Path, port: int) -> None:
        self.kube, self.node, self.state_dir = kube, node, directory / "state"
        self.url = f"http://127.0.0.1:{port}"
        self.program = Program("agent", directory)
        self.environment: dict[str, str] = {}
        self.flags = {
            "node-name": node,
            "kubeconfig": str(kube.kubeconfig),
            "libvirt-uri": libvirtd.uri,
            "libvirt-config-dir": str(libvirtd.config_dir),
            "state-dir": str(self.state_dir),
            "metrics-port": str(port),
            "commit-backoff": "0.2",
            "relist-interval": "5",
        }

    def start(self, **flags: str) -> None:
        """Start it, and return when it serves."""
        wanted = self.flags | {name.replace("_", "-"): value for name, value in flags.items()}
        vmbackup = Path(sys.executable).with_name("vmbackup")
        command = [vmbackup, "agent", *(f"--{name}={value}" for name, value in wanted.items())]
        self.program.start(command, env=self.environment)
        self.program.wait_until(lambda: self.healthz() is not None, seconds=SECONDS)

    def apply(
        self,
        domain: str,
        *,
        name: str = "",
        namespace: str = "default",
        annotations: dict[str, str] | None = None,
        **spec: Any,
    ) -> VMBackup:
        """Apply a VMBackup of this node; `spec` by the dotted paths of tests/support/manifests.py."""
        made = VMBackup(self.kube, name or f"{self.node}-{next(_numbers)}", namespace)
        it = manifest(made.name, self.node, self.node, domain, namespace, **spec)
        it["metadata"]["annotations"] = annotations or {}
        self.kube.apply(it)
        return made

    def use_store(self, directory: Path) -> None:
        """Let its store be there."""
        self.kube.apply(store(self.node, directory={"path": str(directory)}))

    def records(self) -> list[Record]:
        """What its journals say."""
        return list(journals.records(self.state_dir))

    def kill(self) -> None:
        """SIGKILL."""
        self.program.kill()

    def stop(self) -> None:
        """SIGTERM, and wait for its end."""
        self.program.stop(seconds=30)

    @contextmanager
    def suspended(self) -> Generator[None]:
        """Stop the process, so that it sees the changes made meanwhile only afterwards, all at once."""
        self.program.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.program.signal(signal.SIGCONT)

    def healthz(self) -> tuple[int, str] | None:
        """Status code and text of /healthz; None while there is no answer."""
        return self._get("/healthz")

    def metrics(self) -> str:
        """What /metrics shows; nothing while there is no answer."""
        answer = self._get("/metrics")
        return answer[1] if answer else ""

    def metric(self, sample: str) -> float | None:
        """The value of a sample, given as it stands in /metrics; None if it is not there."""
        found = re.search(rf"^{re.escape(sample)} (.+)$", self.metrics(), re.MULTILINE)
        return float(found[1]) if found else None

    def rss_mb(self) -> float:
        """Its resident memory, in MB."""
        status = Path(f"/proc/{self.program.pid}/status").read_text()
        found = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
        assert found
        return int(found[1]) * 1024 / 1e6

    @property
    def log(self) -> str:
        return self.program.log.read_text()

    def _get(self, path: str) -> tuple[int, str] | None:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(self.url + path, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return None


@dataclass(frozen=True)
class VMBackup:
    """A VMBackup on the API server."""

    kube: KubeApi
    name: str
    namespace: str = "default"

    def get(self) -> dict[str, Any]:
        return self.kube.get("vmbackup", self.name, "-n", self.namespace)

    @property
    def status(self) -> dict[str, Any]:
        return self.get().get("status", {})

    @property
    def uid(self) -> str:
        return self.get()["metadata"]["uid"]

    def condition(self, kind: str) -> tuple[str, str]:
        """Status and reason of a condition."""
        found = condition(self.status, kind)
        return found.get("status", ""), found.get("reason", "")

    def chain_message(self) -> str:
        """What ChainClean says."""
        return condition(self.status, "ChainClean").get("message", "")

    def wait(self, ready: str = "True", seconds: float = SECONDS) -> dict[str, Any]:
        """`kubectl wait` until Ready is this; its status then."""
        try:
            self._kubectl("wait", f"--for=condition=Ready={ready}", f"--timeout={seconds}s")
        except KubectlError as error:
            raise AssertionError(f"{error}; it is {json.dumps(self.status, indent=1)}") from error
        return self.status

    def wait_for_phase(self, phase: str, seconds: float = SECONDS) -> None:
        self._kubectl("wait", f"--for=jsonpath={{.status.phase}}={phase}", f"--timeout={seconds}s")

    def wait_until_gone(self, seconds: float = SECONDS) -> None:
        self._kubectl("wait", "--for=delete", f"--timeout={seconds}s")

    def wait_for_copying(self) -> None:
        """Wait until it is in the middle of copying."""
        wait_until(lambda: self._copied() > 0, "bytes copied", SECONDS)

    def patch(self, spec: dict[str, Any]) -> None:
        self._kubectl("patch", "--type=merge", "-p", json.dumps({"spec": spec}))

    def retry(self, value: str) -> None:
        self.annotate(retry=value)

    def annotate(self, **annotations: str) -> None:
        self._kubectl("annotate", "--overwrite", *(f"vmbackup.dev/{name}={text}" for name, text in annotations.items()))

    def delete(self, *flags: str) -> None:
        self._kubectl("delete", *flags)

    def strip_finalizers(self) -> None:
        self._kubectl("patch", "--type=merge", "-p", '{"metadata": {"finalizers": null}}')

    def vanish(self) -> None:
        """Delete it without its finalizers."""
        self.strip_finalizers()
        self.delete()

    def exists(self) -> bool:
        return bool(self._kubectl("get", "--ignore-not-found", "-o", "name"))

    def events(self) -> list[str]:
        """The reasons of its events, oldest first."""
        found = self.kube.get("events.v1.events.k8s.io", "-n", self.namespace)["items"]
        mine = [event for event in found if event["regarding"].get("name") == self.name]
        return [event["reason"] for event in sorted(mine, key=lambda event: event["eventTime"])]

    def _copied(self) -> int:
        return self.status.get("progress", {}).get("copiedBytes", 0)

    def _kubectl(self, verb: str, *arguments: str) -> str:
        return self.kube.kubectl(verb, "-n", self.namespace, f"vmbackup/{self.name}", *arguments)


CatchBackup = Callable[..., tuple[VMBackup, Domain]]
"""Applies a VMBackup to an agent, and returns it and its guest in the middle of something."""


def manifest(name: str, node: str, store: str, domain: str, namespace: str = "default", **spec: Any) -> dict[str, Any]:
    return backup(name, namespace, **{"nodeName": node, "storeRef.name": store, "domain": domain, **spec})


def assert_stored(status: dict[str, Any]) -> Path:
    """The store holds a complete backup whose digests are those of its files; its folder."""
    folder = Path(status["location"])
    disks = json.loads((folder / "manifest.json").read_text())["disks"]
    assert disks
    assert not (wrong := list(wrong_digests(folder))), wrong
    assert {disk["target"]: disk["digest"] for disk in disks} == {
        disk["target"]: disk["digest"] for disk in status["disks"] if disk["state"] != "Skipped"
    }
    return folder


def assert_home(guest: Domain, pattern: int = 0x11) -> None:
    """The guest is on its own images, in both XMLs, no overlay is left, and it reads what it wrote."""
    for target, base in guest.bases.items():
        assert guest.live(target).source == guest.persistent(target).source == base
        assert not list(Path(base).parent.glob("*.vmb-*"))
        assert not what_is_wrong_with(Path(base))
    assert guest.holds("vda", pattern, offset="0" if pattern == 0x11 else "16M")


def make_agent(kube: KubeApi, libvirtd: Libvirtd, directory: Path) -> Agent:
    """An agent that is not started yet; its store has the name of its node."""
    node = f"node-{next(_nodes)}"
    kube.apply(store(node, directory={"path": str(directory / "store")}))
    return Agent(kube, libvirtd, node, directory, free_port())


@contextmanager
def agent_of(kube: KubeApi, libvirtd: Libvirtd, directory: Path) -> Generator[Agent]:
    """An agent that is not started yet, and does not outlast this."""
    made = make_agent(kube, libvirtd, directory)
    try:
        yield made
    finally:
        made.stop()


def free_port() -> int:
    """A free port of loopback."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def answers(url: str) -> bool:
    """Whether somebody serves it."""
    try:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10).close()
    except OSError:
        return False
    return True
