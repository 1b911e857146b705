"""A private libvirtd with real QEMU guests, for the demo, the tests and the bench: it never touches the host's own.

libvirtd runs in session mode with its own XDG directories, all under one directory, without systemd. Session mode means
"not root" to libvirt, so root runs it in a user namespace in which root has another number; files stay root's.

    python -m sandbox.libvirtd start DIRECTORY      # runs on until stopped, by any process
    python -m sandbox.libvirtd stop DIRECTORY       # ends it and all its guests
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from xml.sax.saxutils import escape, quoteattr

_QEMU_CONF = 'stdio_handler = "file"\nsecurity_driver = "none"\nremember_owner = 0\nmax_core = 0\n'
_LONGEST_DIRECTORY = 40  # the guest agent's socket is 67 bytes deeper than the directory, and a socket path has 107
_START_SECONDS = 60
_END_SECONDS = 20
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)
CRASHED = "libvirtd has crashed and is started again:"
"""The line in its log ends with the signal."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


class Libvirtd:
    """A libvirtd and its guests under `directory`, which is kept short: socket paths are limited to 107 bytes.

    As a context manager it starts on entry, and ends with all its guests on exit, or with the thread that started it.
    With `detached` it outlives its starter, and `Libvirtd(directory).stop()` in any process ends it. With a `host_uuid`
    of its own it is another host to libvirt, which a guest can be migrated to.
    """

    def __init__(self, directory: Path | str, *, detached: bool = False, host_uuid: str = "") -> None:
        self.directory = Path(directory).absolute()
        if len(os.fsencode(self.directory)) > _LONGEST_DIRECTORY:
            raise ValueError(f"{self.directory} is too long for sockets: at most {_LONGEST_DIRECTORY} bytes")
        self.detached = detached
        self.host_uuid = host_uuid
        self.runtime_dir = self.directory / "run"
        self.config_dir = self.directory / "libvirt/qemu"
        self.socket = self.runtime_dir / "libvirt/libvirt-sock"
        self.uri = f"qemu+unix:///session?socket={self.socket}"
        self.pid_file = self.directory / "libvirtd.pid"
        self.log_file = self.directory / "libvirtd.log"
        self._supervisors: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which libvirtd and its clients find everything under the directory."""
        return {
            **os.environ,
            "HOME": str(self.directory),
            "XDG_CONFIG_HOME": str(self.directory),
            "XDG_CACHE_HOME": str(self.directory / "cache"),
            "XDG_DATA_HOME": str(self.directory / "data"),
            "XDG_RUNTIME_DIR": str(self.runtime_dir),
        }

    @property
    def pid(self) -> int | None:
        """The process of the libvirtd that runs now."""
        pid = _read_pid(self.pid_file)
        return pid if pid and str(self.pid_file) in _command_line(pid) else None

    def start(self) -> None:
        """Start libvirtd, also again after `kill`, and return when it answers."""
        if self.pid:
            return
        self.config_dir.mkdir(parents=True, exist_ok=True)
        self.runtime_dir.mkdir(mode=0o700, exist_ok=True)
        (self.directory / "libvirt/qemu.conf").write_text(_QEMU_CONF)
        if self.host_uuid:
            (self.directory / "libvirt/libvirtd.conf").write_text(f'host_uuid = "{self.host_uuid}"\n')
        # -P: the modules beside this file are none of Python's own
        command = [sys.executable, "-P", __file__, "supervise", str(self.directory)]
        with self.log_file.open("ab") as log:
            supervisor = subprocess.Popen(
                [*command, "--detached"] if self.detached else command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
            )
        self._supervisors.append(supervisor)
        self._wait_until_it_answers(supervisor)

    def supervise(self) -> None:
        """Run libvirtd as the parent of its guests until all have ended; SIGTERM, or the end of our starter, ends them.

        One that crashes is started again, as systemd does: libvirt 9.0 writes to what it has freed where a definition
        is changed in the middle of a snapshot, and may die of it then or later. One that is killed is not.

        libvirt waits for the end of a guest's process, that is until its parent has noticed: where that is a process
        number 1 that reaps them every two seconds, or never, each stop of a guest would take as long.
        """
        prctl = ctypes.CDLL(None).prctl
        prctl(_PR_SET_CHILD_SUBREAPER, 1)
        signal.signal(signal.SIGTERM, lambda *_: self.stop())
        command = ["libvirtd", "--pid-file", str(self.pid_file)]
        if not self.detached:
            prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            command = ["setpriv", "--pdeathsig", "KILL", *command]
        if os.geteuid() == 0:
            command = ["unshare", "--user", "--map-user=1000", "--map-group=1000", *command]
        path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
        environment = {**self.environment, "PATH": path}
        libvirtd = subprocess.Popen(command, env=environment)
        with suppress(ChildProcessError):
            while True:
                pid, status = os.wait()
                ended_by = -os.waitstatus_to_exitcode(status)
                if pid == libvirtd.pid and ended_by in _CRASHES:
                    print(CRASHED, signal.Signals(ended_by).name, file=sys.stderr, flush=True)
                    libvirtd = subprocess.Popen(command, env=environment)

    def _wait_until_it_answers(self, supervisor: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if supervisor.poll() is not None:
                raise RuntimeError(f"libvirtd has exited: see {self.log_file}")
            # RuntimeError: the one that was just killed may still have had its socket
            with suppress(OSError, RuntimeError), socket.socket(socket.AF_UNIX) as client:
                client.connect(str(self.socket))
                self.virsh("uri")
                return
            time.sleep(0.02)
        raise TimeoutError(f"libvirtd does not answer after {_START_SECONDS} s: see {self.log_file}")

    def kill(self) -> None:
        """SIGKILL libvirtd; its guests run on. Returns when it is gone."""
        if pid := self.pid:
            os.kill(pid, signal.SIGKILL)
            _wait_for_end(pid)

    def stop_signal(self) -> None:
        """SIGSTOP libvirtd: it does not answer until `cont`."""
        self._signal(signal.SIGSTOP)

    def cont(self) -> None:
        """SIGCONT libvirtd."""
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """Stop libvirtd, no matter who started it, and destroy all its guests. Does nothing if it is not running."""
        self.kill()
        for pid in self._processes_of_guests():
            _kill(pid)
        for supervisor in self._supervisors:
            supervisor.wait(_END_SECONDS)
        self._supervisors.clear()

    def guest_pids(self) -> dict[str, int]:
        """The QEMU process of each running domain, by the domain's name."""
        pids = {file.stem: _read_pid(file) for file in (self.runtime_dir / "libvirt/qemu/run").glob("*.pid")}
        return {name: pid for name, pid in pids.items() if pid and self._ours in _command_line(pid)}

    def kill_guest(self, name: str) -> None:
        """SIGKILL the QEMU process of a domain, as a crash of QEMU would."""
        pid = self.guest_pids()[name]
        os.kill(pid, signal.SIGKILL)
        _wait_for_end(pid)

    def kill_guests_that_libvirt_has_lost(self) -> int:
        """SIGKILL the QEMU of every domain that libvirt believes to be off; returns how many."""
        running = [f"guest={name}," for name in self.virsh("list", "--name").split()]
        lost = [pid for pid, line in self._processes_of_guests().items() if not any(name in line for name in running)]
        for pid in lost:
            _kill(pid)
        return len(lost)

    def _processes_of_guests(self) -> dict[int, str]:
        """Every QEMU process of ours, known to libvirt or not, and its command line."""
        pids = [int(process.name) for process in Path("/proc").iterdir() if process.name.isdigit()]
        return {pid: line for pid in pids if self._ours in (line := _command_line(pid))}

    @property
    def _ours(self) -> str:
        """What the command line of each of our guests has."""
        return f"{self.config_dir}/lib/domain-"

    def virsh(self, *arguments: str) -> str:
        """Run virsh and return what it prints. Raises RuntimeError with its error message."""
        command = ["virsh", "--quiet", "--connect", self.uri, *arguments]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"virsh {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def qemu_io(self, domain: str, target: str, command: str) -> str:
        """Run a qemu-io command, such as `write -P 0x11 0 64k`, on what the disk's device sees: a guest without an OS.

        It works on virtio disks. Returns what qemu-io says: QEMU writes that to its log, not to the monitor. Raises
        RuntimeError if it reports an error, also where `read -P` finds something else.
        """
        log = self.directory / f"cache/libvirt/qemu/log/{domain}.log"
        before = log.stat().st_size
        number = ord(target[-1]) - ord("a")
        hmp = f'qemu-io -d /machine/peripheral/virtio-disk{number}/virtio-backend "{command}"'
        answer = self.virsh("qemu-monitor-command", domain, "--hmp", hmp)
        with log.open("rb") as file:
            file.seek(before)
            answer += file.read().decode(errors="replace")
        if any(word in answer for word in ("failed", "rror", "not found", "not supported")):
            raise RuntimeError(f"{domain} {target}: {command}: {answer}")
        return answer

    def qmp(self, domain: str, *commands: tuple[str, dict[str, Any]]) -> list[Any]:
        """Speak to a domain's QEMU behind libvirtd's back, while it is dead: else it holds the monitor.

        This is how a libvirtd that was killed within a call is acted. Returns the answers; raises RuntimeError.
        """
        (path,) = self.config_dir.glob(f"lib/domain-*-{domain}/monitor.sock")
        answers: list[Any] = []
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.connect(str(path))
            with monitor.makefile("rw") as stream:
                for name, arguments in (("qmp_capabilities", {}), *commands):
                    print(json.dumps({"execute": name, "arguments": arguments}), file=stream, flush=True)
                    answer = next(line for line in map(json.loads, stream) if "return" in line or "error" in line)
                    if "error" in answer:
                        raise RuntimeError(f"{domain}: {name}: {answer['error']['desc']}")
                    answers.append(answer["return"])
        return answers[1:]

    def _signal(self, number: signal.Signals) -> None:
        if pid := self.pid:
            os.kill(pid, number)


@dataclass(frozen=True)
class DiskSpec:
    """A disk for `domain_xml`. `inner` is XML for inside <disk>, such as <readonly/>."""

    target: str
    path: Path | str
    format: str = "raw"
    kind: str = "file"
    device: str = "disk"
    bus: str = "virtio"
    inner: str = ""

    def xml(self) -> str:
        attribute = "dev" if self.kind == "block" else "file"
        return (
            f"<disk type='{self.kind}' device='{self.device}'><driver name='qemu' type='{self.format}'/>"
            f"<source {attribute}={quoteattr(str(self.path))}/>"
            f"<target dev='{self.target}' bus='{self.bus}'/>{self.inner}</disk>"
        )


def domain_xml(
    name: str,
    disks: Iterable[DiskSpec],
    *,
    uuid: str = "",
    memory_mib: int = 32,
    os_xml: str = "",
    devices: str = "",
    extra: str = "",
) -> str:
    """The XML of an emulated (TCG) domain, as small as QEMU allows.

    Without an OS and started paused it costs no CPU, yet takes snapshots and block jobs. `os_xml` goes into <os>
    (kernel, initrd, …), `devices` into <devices> (serial, channel, …), `extra` at the end of <domain>.
    """
    return (
        f"<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>{escape(name)}</name>"
        f"{f'<uuid>{uuid}</uuid>' if uuid else ''}"
        f"<memory unit='MiB'>{memory_mib}</memory><vcpu>1</vcpu>"
        f"<os><type arch='x86_64' machine='pc'>hvm</type>{os_xml}</os><features><acpi/></features>"
        f"<devices>{''.join(disk.xml() for disk in disks)}"
        f"<controller type='usb' model='none'/><memballoon model='none'/>{devices}</devices>{extra}</domain>"
    )


def _read_pid(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    _wait_for_end(pid)


def _wait_for_end(pid: int) -> None:
    """Wait for the end of a process that may be no child of ours; a zombie has ended."""
    deadline = time.monotonic() + _END_SECONDS
    while _command_line(pid):
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} does not end")
        time.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description="A private libvirtd that runs on until stopped.")
    parser.add_argument("action", choices=["start", "stop", "supervise"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--detached", action="store_true", help="supervise: outlive the starter")
    arguments = parser.parse_args()
    if arguments.action == "supervise":
        Libvirtd(arguments.directory, detached=arguments.detached).supervise()
    elif arguments.action == "stop":
        Libvirtd(arguments.directory).stop()
    else:
        libvirtd = Libvirtd(arguments.directory, detached=True)
        libvirtd.start()
        print(libvirtd.uri)


if __name__ == "__main__":
    main()
