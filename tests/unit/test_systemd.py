"""The unit of an agent outside a cluster. tests/cluster/test_systemd.py starts it under a systemd."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sandbox.image import ROOT
from vmbackup.commands.agent import VERB

UNIT = ROOT / "packaging/systemd/vmbackup-agent.service"


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The unit with a program that is there."""
    unit = tmp_path / UNIT.name
    there = shutil.which("true") or "/bin/true"
    unit.write_text(UNIT.read_text().replace("/opt/vmbackup/bin/vmbackup", there))
    return unit


def test_systemd_finds_nothing_wrong_with_it(installed: Path):
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", installed], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_an_agent_that_is_taken_over_finds_little_to_do(installed: Path):
    """By systemd's own measure: 0 is sealed off, 10 is open."""
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=31", installed]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout.splitlines()[-1]


def test_its_settings_are_flags_of_the_agent():
    known = {flag.variable for flag in VERB.flags}
    named = set(re.findall(r"^#?(VMBACKUP_\w+)=", (UNIT.parent / "agent.env").read_text(), re.MULTILINE))
    assert "VMBACKUP_NODE_NAME" in named
    assert named <= known
