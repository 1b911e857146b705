"""The parts of the demo: starting them, their files, and removing all of it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path

from sandbox import binaries
from sandbox.guest import Guest, make_disk
from sandbox.kube import KubeApi
from sandbox.libvirtd import DiskSpec, Libvirtd
from sandbox.processes import Program, SandboxError

NODE = "node-a"  # as in manifests/samples
DOMAIN = "web-01"

_ROOT = Path(__file__).parent.parent.parent
_SAMPLES = _ROOT / "manifests" / "samples"
_SAMPLE_STORE_PATH = "/var/lib/vmbackup/store"
_SAMPLE_NAME = "web-01-1"
_LONGEST = 37  # bytes of the state directory: the sockets of libvirt are far below it, and their paths limited
_METRICS_PORT = 9777


class World:
    """Everything that the demo starts, under one directory that it may remove as a whole."""

    def __init__(self) -> None:
        self.state = _state_directory()
        self.store = self.state / "store"
        self.env_file = self.state / "env"
        self.kube = KubeApi(self.state / "kube", detached=True)
        self.libvirtd = Libvirtd(self.state / "vm", detached=True)
        self.agent = Program("agent", self.state)
        self._images = self.state / "images"
        self._agent_state = self.state / "agent"

    def exists(self) -> bool:
        return self.state.exists()

    def start_guest(self) -> Guest:
        """A persistent domain with two disks, which writes all the time; it takes some seconds to boot."""
        if os.geteuid() != 0:
            raise SandboxError("the agent keeps its locks in /run/vmbackup, so the demo needs root: `sudo make demo`")
        self.state.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self.state.stat().st_uid != os.getuid():
            raise SandboxError(f"{self.state} belongs to another user: set XDG_STATE_HOME to a directory of your own")
        self._images.mkdir(exist_ok=True)
        self.libvirtd.start()
        disks = [self._disk("vda", "raw", size_mib=512, bulk_mib=256), self._disk("vdb", "qcow2", size_mib=128)]
        guest = Guest(self.libvirtd.virsh, DOMAIN, self.state, disks, dirty_kib_per_second=512, agent=True)
        if DOMAIN not in self.libvirtd.virsh("list", "--name", "--all").split():
            guest.define()
        if DOMAIN not in self.libvirtd.virsh("list", "--name").split():
            guest.start()
        return guest

    def _disk(self, target: str, image_format: str, *, size_mib: int, bulk_mib: int = 0) -> DiskSpec:
        path = self._images / f"{DOMAIN}-{target}.{image_format}"
        if path.exists():
            return DiskSpec(target, path, image_format)
        new = path.with_suffix(".new")
        make_disk(target, new, image_format=image_format, size_mib=size_mib, bulk_mib=bulk_mib)
        new.rename(path)
        return DiskSpec(target, path, image_format)

    def start_kube(self) -> None:
        """The API server, with our resources and the store."""
        self.kube.start()
        self.kube.apply_crds(_ROOT / "crds")
        store = (_SAMPLES / "store.yaml").read_text()
        if _SAMPLE_STORE_PATH not in store:
            raise SandboxError(f"manifests/samples/store.yaml no longer names {_SAMPLE_STORE_PATH}")
        self.kube.kubectl("apply", "-f", "-", stdin=store.replace(_SAMPLE_STORE_PATH, str(self.store)))

    def start_agent(self) -> None:
        """The agent. It is restarted, so that it runs the current code."""
        self.agent.stop(seconds=30)  # it brings a running backup to a safe point
        self.store.mkdir(exist_ok=True)
        port_file = self.state / "metrics-port"
        port_file.write_text(str(_free_port(_METRICS_PORT)))
        self.agent.start(
            [
                Path(sys.executable).with_name("vmbackup"),
                "agent",
                f"--node-name={NODE}",
                f"--libvirt-uri={self.libvirtd.uri}",
                f"--libvirt-config-dir={self.libvirtd.config_dir}",
                f"--kubeconfig={self.kube.kubeconfig}",
                f"--metrics-port={port_file.read_text()}",
                f"--state-dir={self._agent_state}",
            ],
            detached=True,
        )
        self.agent.wait_until(lambda: _answers(f"{self.metrics_url}/healthz"), seconds=60)
        self._write_env()

    @property
    def metrics_url(self) -> str:
        """Of the agent, without a path."""
        return f"http://127.0.0.1:{(self.state / 'metrics-port').read_text()}"

    def next_name(self) -> str:
        """A name that no VMBackup has yet."""
        taken = self.kube.kubectl("get", "vmbackups", "-o", "name").split()
        numbers = [int(match[1]) for name in taken if (match := re.fullmatch(rf".*/{DOMAIN}-(\d+)", name))]
        return f"{DOMAIN}-{max(numbers, default=0) + 1}"

    def apply_backup(self, name: str) -> None:
        """Apply the sample VMBackup under this name."""
        sample = (_SAMPLES / "vmbackup.yaml").read_text()
        self.kube.kubectl("apply", "-f", "-", stdin=sample.replace(_SAMPLE_NAME, name))

    def backup_folder(self, name: str) -> Path:
        """Where the directory store keeps a backup of the namespace `default`."""
        uid = self.kube.get("vmbackup", name)["metadata"]["uid"]
        return self.store / "default" / f"{name}.{uid}"

    def disks_in_use(self) -> str:
        """The output of `virsh domblklist`: the image that each disk writes."""
        return "\n".join(line.strip() for line in self.libvirtd.virsh("domblklist", DOMAIN).splitlines())

    def remove(self) -> None:
        """Stop everything, and remove the directory."""
        self.agent.stop()
        self.libvirtd.stop()
        self.kube.stop()
        shutil.rmtree(self.state)

    def _write_env(self) -> None:
        programs = {str(Path(sys.executable).parent), str(Path(binaries.path("kubectl")).parent)}
        values = {
            "KUBECONFIG": self.kube.kubeconfig,
            "LIBVIRT_DEFAULT_URI": self.libvirtd.uri,
            "VMBACKUP_LIBVIRT_URI": self.libvirtd.uri,
            "VMBACKUP_LIBVIRT_CONFIG_DIR": self.libvirtd.config_dir,
            "VMBACKUP_STATE_DIR": self._agent_state,
        }
        lines = [f"export {name}={shlex.quote(str(value))}\n" for name, value in values.items()]
        lines.append(f"export PATH={shlex.quote(':'.join(sorted(programs)))}:$PATH\n")
        self.env_file.write_text("".join(lines))


def _state_directory() -> Path:
    """$XDG_STATE_HOME/vmbackup-demo; a short directory of our own where that is too long for libvirt's sockets."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "vmbackup-demo"
    if len(os.fsencode(state)) <= _LONGEST:
        return state
    return Path(f"/var/tmp/vmbackup-demo-{os.getuid()}")


def _free_port(wanted: int) -> int:
    """`wanted` on loopback if it is free, else any that is."""
    for port in (wanted, 0):
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
            return one.getsockname()[1]
    raise SandboxError("no free port on loopback")


def _answers(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        direct.open(url, timeout=5).close()
    except (urllib.error.URLError, OSError):
        return False
    return True
