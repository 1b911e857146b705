"""Runs a command in namespaces of its own, as on a machine of its own, and lets nothing of it behind.

    sudo python -m sandbox.alone COMMAND…

What it starts is killed by the kernel when it ends, however it ends; its network is loopback and what it makes itself;
its mounts vanish, and so does what it writes below /etc, /var and /run. The directories of a hypervisor and of a
Kubernetes node (PLACES, and /run) are empty ones. So a libvirtd, a containerd or a kubelet that runs here already is
not met, and its files are not touched. Needs root.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sandbox.processes import SandboxError

PLACES = (
    *("/etc/cni", "/etc/libvirt", "/var/cache/libvirt", "/var/lib/cni", "/var/lib/containerd", "/var/lib/kubelet"),
    *("/var/lib/libvirt", "/var/lib/vmbackup", "/var/log"),
)
_VARIABLE = "VMBACKUP_SANDBOX_ALONE"
_CGROUPS = Path("/sys/fs/cgroup")
_TERMINATED = 128 + signal.SIGTERM
_END_SECONDS = 10


def directory() -> Path:
    """A directory for whatever runs alone, removed after its end. Raises SandboxError where nobody is alone."""
    if name := os.environ.get(_VARIABLE):
        return Path(name)
    raise SandboxError("this starts a whole node, and only where it meets nobody else's: run it by `make e2e`")


def cgroup() -> str:
    """The control group, in every hierarchy of the machine, for what runs alone; removed after its end."""
    return f"/vmbackup-{directory().name}"


def run(command: Sequence[str]) -> int:
    """Run a command alone; its exit code. Raises SandboxError where the machine does not let us."""
    if os.geteuid() != 0:
        raise SandboxError("only root can make namespaces, mounts and control groups: run it as root, or with sudo")
    with ExitStack() as world:
        own = Path(world.enter_context(tempfile.TemporaryDirectory(prefix="vmb-")))  # short, for socket paths
        world.enter_context(control_groups(f"vmbackup-{own.name}"))
        signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is for the command; its end is ours
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
        namespaces = ["--mount", "--propagation=slave", "--net", "--ipc", "--pid", "--mount-proc"]
        return subprocess.call(
            [
                *("setpriv", "--pdeathsig", "KILL", "--", "unshare", *namespaces, "--fork", "--kill-child", "--"),
                *(sys.executable, "-m", "sandbox.alone", "--inside", *command),
            ],
            env=os.environ | {_VARIABLE: str(own)},
        )


@contextmanager
def control_groups(name: str) -> Iterator[list[Path]]:
    """A control group of that name in each hierarchy; what is below it goes too, in the end."""
    hierarchies = [_CGROUPS] if (_CGROUPS / "cgroup.controllers").exists() else sorted(_CGROUPS.iterdir())
    groups = [hierarchy / name for hierarchy in hierarchies if (hierarchy / "cgroup.procs").exists()]
    if not groups:
        raise SandboxError(f"there are no control groups in {_CGROUPS}, and containers cannot do without: mount them")
    with ExitStack() as made:
        for group in groups:
            try:
                group.mkdir()
            except OSError as error:
                raise SandboxError(f"a control group cannot be made: {error}; containers need one") from None
            made.callback(_remove, group)
        yield groups


def _remove(group: Path) -> None:
    """Remove a control group and those below it, once the last of its processes is gone, which takes some ms."""
    deadline = time.monotonic() + _END_SECONDS
    while group.exists():
        try:
            for folder, _folders, _files in os.walk(group, topdown=False):
                Path(folder).rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _inside(command: Sequence[str]) -> int:
    """Process 1 of the namespaces: prepare them, run the command, and be the parent of what lost its own."""
    own = directory()
    _run("mount", "--make-rshared", "/")  # as on a machine where systemd has done it: the kubelet counts on it
    for layered in ("etc", "var"):
        upper, work = own / "written" / layered, own / "work" / layered
        upper.mkdir(parents=True)
        work.mkdir(parents=True)
        layers = f"lowerdir=/{layered},upperdir={upper},workdir={work}"
        _run("mount", "-t", "overlay", "-o", layers, "overlay", f"/{layered}")
    for place in PLACES:  # none of these may be on an overlay: containerd would lay its own on it
        mine = own / "places" / place.removeprefix("/")
        mine.mkdir(parents=True)
        Path(place).mkdir(parents=True, exist_ok=True)
        _run("mount", "--bind", str(mine), place)
    _run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    _run("ip", "link", "set", "lo", "up")
    signal.signal(signal.SIGINT, lambda *_: None)
    child = subprocess.Popen(command)
    while True:
        pid, status = os.wait()
        if pid == child.pid:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code  # as a shell has it


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=sys.stderr)


def main() -> int:
    try:
        return _inside(sys.argv[2:]) if sys.argv[1:2] == ["--inside"] else run(sys.argv[1:])
    except SandboxError as error:
        sys.exit(str(error))
    except subprocess.CalledProcessError as error:
        sys.exit(f"this machine does not let us be alone: {' '.join(error.cmd)} failed, and says why above")


if __name__ == "__main__":
    sys.exit(main())
