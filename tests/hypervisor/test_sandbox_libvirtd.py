"""The sandbox's libvirtd leaves nothing behind, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from sandbox.libvirtd import CRASHED, Libvirtd, domain_xml
from tests.support.domains import wait_until

STARTER = """
import sys, time
from sandbox.libvirtd import Libvirtd
with Libvirtd(sys.argv[1]) as libvirtd:
    libvirtd.virsh("create", sys.argv[2], "--paused")
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vmb-") as path:
        yield Path(path)
        Libvirtd(path).stop()


@pytest.fixture
def xml(tmp_path: Path) -> str:
    file = tmp_path / "domain.xml"
    file.write_text(domain_xml("guest", []))
    return str(file)


def processes(directory: Path) -> list[int]:
    """All processes whose command line names the directory, zombies aside."""
    files = Path("/proc").glob("[0-9]*/cmdline")
    found: list[int] = []
    for file in files:
        try:
            if os.fsencode(directory) in file.read_bytes() and int(file.parent.name) != os.getpid():
                found.append(int(file.parent.name))
        except OSError:
            continue
    return found


def test_it_ends_with_its_starter_and_so_do_its_guests(directory: Path, xml: str) -> None:
    command = [sys.executable, "-c", STARTER, str(directory), xml]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == "ready\n"
        assert Libvirtd(directory).guest_pids().keys() == {"guest"}
        starter.send_signal(signal.SIGKILL)
    wait_until(lambda: not processes(directory), "the end of libvirtd, its guest and their supervisor")


def test_a_detached_one_runs_on_until_any_process_stops_it(directory: Path, xml: str) -> None:
    command = [sys.executable, "-m", "sandbox.libvirtd"]
    for _ in range(2):
        subprocess.run([*command, "start", str(directory)], check=True, capture_output=True)
    mine = Libvirtd(directory)
    mine.virsh("create", xml, "--paused")
    mine.kill()
    assert mine.guest_pids(), "its guests run on without it"
    subprocess.run([*command, "start", str(directory)], check=True, capture_output=True)
    assert mine.virsh("list", "--name") == "guest"
    subprocess.run([*command, "stop", str(directory)], check=True)
    wait_until(lambda: not processes(directory), "the end of libvirtd, its guest and their supervisor")


def test_one_that_crashes_is_started_again_and_its_guests_run_on(directory: Path, xml: str) -> None:
    with Libvirtd(directory) as libvirtd:
        libvirtd.virsh("create", xml, "--paused")
        before = libvirtd.pid
        assert before
        os.kill(before, signal.SIGSEGV)
        wait_until(lambda: libvirtd.pid not in (None, before), "another one")
        wait_until(lambda: answers(libvirtd), "its answer")
        assert libvirtd.virsh("list", "--name") == "guest"
        assert f"{CRASHED} SIGSEGV" in libvirtd.log_file.read_text()
    wait_until(lambda: not processes(directory), "the end of libvirtd, its guest and their supervisor")


def answers(libvirtd: Libvirtd) -> bool:
    with suppress(RuntimeError):
        return bool(libvirtd.virsh("uri"))
    return False


def test_a_directory_too_long_for_sockets_is_refused() -> None:
    with pytest.raises(ValueError, match="too long for sockets"):
        Libvirtd("/tmp/" + "x" * 40)
