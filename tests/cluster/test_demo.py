"""The newcomer's two commands: `make demo` and `make demo-down`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def demo(command: str, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sandbox.demo", command],
        cwd=ROOT,
        env=os.environ | {"XDG_STATE_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )


def in_its_shell(home: Path, command: str) -> str:
    """What a command prints in a shell that has read the demo's env file."""
    script = f"set -e; source {home}/vmbackup-demo/env; {command}"
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout


def processes_that_mention(path: Path) -> list[str]:
    found: list[str] = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = file.read_text(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if str(path) in command:
            found.append(command)
    return found


@pytest.fixture
def home() -> Iterator[Path]:
    """A state directory, short enough for libvirt's sockets; whatever the demo started from it ends."""
    with tempfile.TemporaryDirectory(prefix="vmb-", dir="/tmp") as directory:
        yield Path(directory)
        demo("down", Path(directory))


@pytest.mark.timeout(600)
def test_the_demo_takes_a_backup_proves_it_stays_up_and_goes_without_a_trace(home: Path) -> None:
    first = demo("up", home)
    assert first.returncode == 0, first.stdout + first.stderr
    shown = first.stdout
    assert "s  Copying" in shown  # shorter phases may be over before kubectl shows them
    assert "s  Pivoted" in shown
    assert "copy of vda: sha256 as in the manifest, no errors found by fsck, records 1 to" in shown
    assert "virsh domblklist, after: the same" in shown
    assert "make demo-down" in shown

    assert "web-01-1" in in_its_shell(home, "kubectl get vmb")
    events = in_its_shell(home, "kubectl get events -o jsonpath={.items[*].reason}").split()
    assert {"Snapshotting", "Copying", "Committing", "Pivoted"} <= set(events)
    assert "web-01-vda.raw" in in_its_shell(home, "virsh domblklist web-01")
    in_its_shell(home, "vmbackup check web-01")
    port = (home / "vmbackup-demo" / "metrics-port").read_text()
    assert 'result="succeeded"' in in_its_shell(home, f"curl -sf http://127.0.0.1:{port}/metrics")

    started = time.monotonic()
    second = demo("up", home)
    assert second.returncode == 0, second.stdout + second.stderr
    assert time.monotonic() - started < 60
    assert "web-01-2" in in_its_shell(home, "kubectl get vmb")

    down = demo("down", home)
    assert down.returncode == 0, down.stdout + down.stderr
    assert list(home.iterdir()) == []
    assert processes_that_mention(home) == []
    assert "no demo is running" in demo("down", home).stdout
