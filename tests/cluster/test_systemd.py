"""The unit of an agent outside the cluster, under a systemd of its own, with all of its restrictions but PrivateTmp."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from pathlib import Path

import pytest

from sandbox import systemd
from sandbox.image import ROOT
from sandbox.kube import KubeApi
from sandbox.libvirtd import Libvirtd
from tests.support.agents import SECONDS, Agent, assert_home, assert_stored
from tests.support.domains import DomainFactory, wait_until
from tests.support.kill_points import When, guardians
from vmbackup.protocol.terms import Power

UNIT = (ROOT / "packaging/systemd/vmbackup-agent.service").read_text()
GUARDIAN_SECONDS = 10  # on a busy machine; it takes one
Boot = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def boot(
    own_agent: Agent, kube: KubeApi, libvirtd: Libvirtd, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Boot:
    """Boot a systemd with the unit of `own_agent`; `service` is what is different in this test."""
    directories = [kube.directory, Path(libvirtd.directory), tmp_path, ROOT, Path(sys.prefix), Path(sys.base_prefix)]
    settings = {f"VMBACKUP_{name.upper().replace('-', '_')}": value for name, value in own_agent.flags.items()}
    files = {
        "/etc/systemd/system/vmbackup-agent.service": UNIT,
        "/etc/vmbackup/agent.env": "".join(f"{name}={value}\n" for name, value in settings.items()),
        "/opt/vmbackup/bin/vmbackup": f'#!/bin/sh\nexec {sys.executable} -m vmbackup.cli "$@"\n',
    }
    # The tests' directories are in /tmp; bound into a private one they would vanish with the agent.
    always = f"""
        PrivateTmp=no
        WorkingDirectory={ROOT}
        Environment=PYTHONPATH={os.environ.get("PYTHONPATH", ROOT / "operator")}
        StandardError=append:{tmp_path}/agent.log
    """
    numbers = count(1)

    @contextmanager
    def boot(service: str = "") -> Iterator[None]:
        changed = {"/etc/systemd/system/vmbackup-agent.service.d/test.conf": f"[Service]\n{always}\n{service}\n"}
        directory = tmp_path_factory.mktemp(f"systemd-{next(numbers)}-")
        with systemd.booted(directory, "vmbackup-agent.service", files | changed, directories) as program:
            program.wait_until(lambda: bool(guardians(own_agent.state_dir)), seconds=SECONDS)
            yield

    return boot


def test_the_unit_as_it_is_backs_up_a_guest_and_ends_in_good_order(
    own_agent: Agent, boot: Boot, domain: DomainFactory
) -> None:
    guest = domain()
    guest.write("vda", 0x11)
    with boot():
        assert_stored(own_agent.apply(guest.name).wait())
        assert_home(guest)
        assert guardians(own_agent.state_dir)
    assert not guardians(own_agent.state_dir)


def test_an_agent_that_is_killed_is_started_again(own_agent: Agent, boot: Boot) -> None:
    with boot("RestartSec=100ms"):
        (guardian,) = guardians(own_agent.state_dir)
        agent = starter_of(guardian)
        os.kill(agent, signal.SIGKILL)
        wait_until(lambda: guardians(own_agent.state_dir) not in ([], [guardian]), "another agent", SECONDS)
        wait_until(lambda: own_agent.healthz() is not None, "its health", SECONDS)


def test_systemd_does_not_stop_the_guardian_of_a_killed_agent_until_the_guest_runs(
    own_agent: Agent, boot: Boot, domain: DomainFactory, libvirtd: Libvirtd, tmp_path: Path
) -> None:
    guest = domain()
    guest.write("vda", 0x11)
    libvirtd.virsh("resume", guest.name)
    dying = f"{sys.executable} -m tests.support.kill_points {When.AFTER} 'journal call=None' 2 {tmp_path} agent"
    with boot(f"Restart=no\nTimeoutStopSec=100ms\nExecStart=\nExecStart={dying}"):
        made = own_agent.apply(guest.name)
        log = tmp_path / "agent.log"
        wait_until(lambda: "by a process that died" in log.read_text(), "the agent's death", SECONDS)
        wait_until(
            lambda: f"the guest {guest.name} runs again" in log.read_text(), "the guest resumed", GUARDIAN_SECONDS
        )
        assert guest.guest.state()[0] is Power.RUNNING
        wait_until(lambda: not guardians(own_agent.state_dir), "the guardian's end", GUARDIAN_SECONDS)
    with boot():
        assert_stored(made.wait())
        assert_home(guest)


def starter_of(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid:"))
