"""An isolated command sees nothing of this machine's hypervisor or node, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.support.domains import wait_until

# A process that nobody waits for, in a control group below ours, with a mount and a file in /var.
_MESS = """
set -e
group=/sys/fs/cgroup/*/vmbackup-$(basename $VMBACKUP_SANDBOX_ISOLATED)
for one in $group; do mkdir $one/pod; done
setsid sleep 1000 &
echo $! | tee $(ls -d $group | head -1)/pod/cgroup.procs >/dev/null
mount -t tmpfs tmpfs /var/lib/kubelet
touch /var/lib/vmbackup-was-here
ip link add vmb-bridge type bridge
echo $VMBACKUP_SANDBOX_ISOLATED $(ls /etc/libvirt /var/lib/libvirt | wc -w)
"""


def _command(script: str) -> list[str]:
    return [sys.executable, "-m", "sandbox.isolated", "bash", "-c", script]


def _left_behind(directory: str) -> list[str]:
    """Whatever still tells of that run."""
    groups = [str(group) for group in Path("/sys/fs/cgroup").rglob(f"vmbackup-{Path(directory).name}")]
    mounts = [line for line in Path("/proc/self/mounts").read_text().splitlines() if directory in line]
    processes: list[str] = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"VMBACKUP_SANDBOX_ISOLATED={directory}\0" in environment.read_text(errors="replace"):
                processes.append(environment.parent.name)
        except OSError:
            continue
    paths = [Path(directory), Path("/var/lib/vmbackup-was-here"), Path("/sys/class/net/vmb-bridge")]
    return [*groups, *mounts, *processes, *(str(path) for path in paths if path.exists())]


def test_an_isolated_command_leaves_nothing_behind_and_its_exit_code_is_known() -> None:
    done = subprocess.run(_command(f"{_MESS}\nexit 3"), capture_output=True, text=True, check=False)

    assert done.returncode == 3, done.stderr
    directory, found = done.stdout.split()
    assert found == "2"  # the names of the two directories, as ls heads them: they are empty
    assert _left_behind(directory) == []


def test_it_leaves_nothing_behind_when_it_is_terminated() -> None:
    command = _command(f"{_MESS}\nsleep 1000")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as running:
        assert running.stdout is not None
        directory = running.stdout.readline().split()[0]
        assert _left_behind(directory)

        running.send_signal(signal.SIGTERM)

        assert running.wait(30) == 128 + signal.SIGTERM
    wait_until(lambda: _left_behind(directory) == [], "nothing is left")
