"""Runs a command in namespaces of its own, as on a machine of its own, and leaves nothing of it behind.

    sudo python -m sandbox.isolated COMMAND…

When the command ends, for whatever reason, the kernel kills every process that it started. Its network has loopback
and the interfaces that it creates. Its mounts vanish, and so does everything that it writes below /etc, /var and /run.
The directories of a hypervisor and of a Kubernetes node (PLACES, and /run) are empty. So it cannot reach a libvirtd,
containerd or kubelet of this machine, nor touch their files. Needs root.
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
_VARIABLE = "VMBACKUP_SANDBOX_ISOLATED"
_CGROUPS = Path("/sys/fs/cgroup")
_TERMINATED = 128 + signal.SIGTERM
_END_SECONDS = 10


def directory() -> Path:
    """A directory for the isolated command, removed when it has ended. Raises SandboxError outside of `run`."""
    if name := os.environ.get(_VARIABLE):
        return Path(name)
    raise SandboxError("this starts a whole node and must be isolated from this machine: run it with `make e2e`")


def cgroup() -> str:
    """The control group of the isolated command, in every hierarchy; removed when it has ended."""
    return f"/vmbackup-{directory().name}"


def run(command: Sequence[str]) -> int:
    """Run a command isolated; returns its exit code. Raises SandboxError where the machine does not permit it."""
    if os.geteuid() != 0:
        raise SandboxError("only root can create namespaces, mounts and control groups: run it as root, or with sudo")
    with ExitStack() as world:
        own = Path(world.enter_context(tempfile.TemporaryDirectory(prefix="vmb-")))  # short, for socket paths
        world.enter_context(control_groups(f"vmbackup-{own.name}"))
        signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is for the command; we end when it has ended
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
        namespaces = ["--mount", "--propagation=slave", "--net", "--ipc", "--pid", "--mount-proc"]
        return subprocess.call(
            [
                *("setpriv", "--pdeathsig", "KILL", "--", "unshare", *namespaces, "--fork", "--kill-child", "--"),
                *(sys.executable, "-m", "sandbox.isolated", "--inside", *command),
            ],
            env=os.environ | {_VARIABLE: str(own)},
        )


@contextmanager
def control_groups(name: str) -> Iterator[list[Path]]:
    """A control group of that name in each hierarchy. At the end it is removed, with those below it."""
    hierarchies = [_CGROUPS] if (_CGROUPS / "cgroup.controllers").exists() else sorted(_CGROUPS.iterdir())
    groups = [hierarchy / name for hierarchy in hierarchies if (hierarchy / "cgroup.procs").exists()]
    if not groups:
        raise SandboxError(f"{_CGROUPS} has no control groups, and containers need them: mount them")
    with ExitStack() as made:
        for group in groups:
            try:
                group.mkdir()
            except OSError as error:
                raise SandboxError(f"cannot create a control group: {error}; containers need one") from None
            made.callback(_remove, group)
        yield groups


def _remove(group: Path) -> None:
    """Remove a control group and those below it, once its last process is gone, which takes some milliseconds."""
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
    """Process 1 of the namespaces: prepare them, run the command, and reap orphaned processes."""
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
        sys.exit(f"cannot isolate the command: {' '.join(error.cmd)} failed; its message is above")


if __name__ == "__main__":
    sys.exit(main())
