"""Names and secrets of guests on their way through a real agent: names harm nobody, secrets stay where they belong."""

from __future__ import annotations

import json
import os
import shutil
import stat
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sandbox.kube import KubeApi
from sandbox.libvirtd import Libvirtd, domain_xml
from tests.support.agents import Agent, assert_home, assert_stored
from tests.support.domains import Domain, DomainFactory, make_disk, wait_until
from vmbackup.hypervisor.hypervisor import Hypervisor

PASSWORD = "hunter2?"  # 8 characters are the most that VNC takes

NAMES = [
    "$(touch pwned) `id`; {0} {} %s %n -rf",
    "a 'quoted' \"name\" <b>&amp; \\x",
    "json:{},format=raw",
    "Büro \u202e→ №1",
    "x" * 200,
]


@contextmanager
def named(libvirtd: Libvirtd, hypervisor: Hypervisor, name: str, directory: Path) -> Generator[Domain]:
    """A domain of this name, whose disk is in this directory."""
    directory.mkdir()
    disk = make_disk(directory, "vda", "qcow2", "8M")
    (directory / "domain.xml").write_text(domain_xml(name, [disk]))
    libvirtd.virsh("define", str(directory / "domain.xml"))
    guest = hypervisor.guest(name)
    libvirtd.virsh("start", guest.uuid, "--paused")
    try:
        yield Domain(libvirtd, guest, directory, {"vda": str(disk.path)})
    finally:
        libvirtd.virsh("destroy", guest.uuid)
        libvirtd.virsh("undefine", guest.uuid)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:12])
def test_a_domain_and_its_images_may_be_called_anything(
    name: str, agent: Agent, libvirtd: Libvirtd, hypervisor: Hypervisor, tmp_path: Path
) -> None:
    directory = tmp_path / name[:40]
    with named(libvirtd, hypervisor, name, directory) as guest:
        made = agent.apply(name)
        status = made.wait()
        folder = assert_stored(status)
        assert folder.name == f"{made.name}.{made.uid}"
        assert json.loads((folder / "manifest.json").read_text())["domain"] == name
        assert guest.live().source == guest.persistent().source == guest.bases["vda"]
        assert not list(directory.glob("*.vmb-*"))
        wait_until(lambda: made.events()[-1:] == ["Pivoted"], "its events")
        labels = {
            sample.labels.get("domain")
            for family in text_string_to_metric_families(agent.metrics())
            for sample in family.samples
        }
        assert name in labels
    assert not Path("pwned").exists()


def test_the_password_of_a_guest_and_the_token_of_the_agent_are_told_to_nobody(
    own_agent: Agent, kube: KubeApi, domain: DomainFactory, tmp_path: Path
) -> None:
    graphics = f"<graphics type='vnc' socket='{tmp_path}/vnc' passwd='{PASSWORD}'/>"
    guest = domain(size="8M", devices=graphics)
    guest.write("vda", 0x11)
    kube.kubectl("create", "serviceaccount", own_agent.node)
    kube.kubectl(
        "create",
        "clusterrolebinding",
        f"{own_agent.node}-admin",
        "--clusterrole=cluster-admin",
        f"--serviceaccount=default:{own_agent.node}",
    )
    token = kube.kubectl("create", "token", own_agent.node).strip()
    config = json.loads(kube.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": token}
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(json.dumps(config))

    calls = qemu_img_telling(own_agent, tmp_path)
    with command_lines() as lines:
        own_agent.start(kubeconfig=str(kubeconfig), log_level="debug")
        made = own_agent.apply(guest.name, **{"copy.bandwidth": "4Mi"})
        made.wait()
        assert_home(guest)
        folder = assert_stored(made.status)
        journal = next(own_agent.state_dir.glob("*.journal"))
        for private in (folder / "domain.xml", journal):
            assert stat.S_IMODE(private.stat().st_mode) == 0o600
            assert stat.S_IMODE(private.parent.stat().st_mode) == 0o700
            assert PASSWORD in private.read_text()  # the guest cannot be defined again without it
        refused = own_agent.apply("nobody")
        refused.wait("False")
        own_agent.stop()
    events = kube.kubectl("get", "events.v1.events.k8s.io", "-A", "-o", "json")
    told = {
        "log": own_agent.log,
        "status": kube.kubectl("get", "vmbackups", "-A", "-o", "json"),
        "events": events,
        "command lines": b"\n".join(lines).decode(errors="replace"),
        "qemu-img": calls.read_text(),
        "manifest": (folder / "manifest.json").read_text() + (folder / "README.txt").read_text(),
    }
    assert made.name in told["log"]
    assert "--node-name" in told["command lines"]
    assert guest.bases["vda"] in told["qemu-img"]
    assert {what for what, text in told.items() for secret in (PASSWORD, token) if secret in text} == set()


@contextmanager
def command_lines() -> Generator[set[bytes]]:
    """The command lines of all processes of this machine, but those that end too soon."""
    seen: set[bytes] = set()
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            for process in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    seen.add(process.read_bytes())
                except OSError:
                    continue

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield seen
    finally:
        over.set()
        looking.join()


def qemu_img_telling(agent: Agent, directory: Path) -> Path:
    """A file of what this agent says to each qemu-img, which ends sooner than anybody finds it."""
    real, calls, folder = shutil.which("qemu-img"), directory / "calls", directory / "bin"
    folder.mkdir()
    told = folder / "qemu-img"
    told.write_text(f'#!/bin/sh\nprintf \'%s \' "$@" >> {calls}\nexec {real} "$@"\n')
    told.chmod(0o755)
    agent.environment = {"PATH": f"{folder}:{os.environ['PATH']}"}
    return calls
