"""The libvirtd of a hypervisor as its administrator runs it (qemu:///system), for what runs alone (sandbox.alone)."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Self

from sandbox import alone
from sandbox.guest_os import GuestOS, guest_os
from sandbox.processes import Program

IMAGES = Path("/var/lib/libvirt/images")
_BOOT = Path("/var/lib/libvirt/boot")
URI = "qemu:///system"

# Alone there is no virtlogd, no polkit, no systemd and no AppArmor. All else is as Debian has it: guests run as
# libvirt-qemu, which gets their images from libvirtd.
_LIBVIRTD_CONF = 'auth_unix_rw = "none"\n'
_QEMU_CONF = """
security_driver = "none"
stdio_handler = "file"
namespaces = []
cgroup_controllers = []
remember_owner = 0
max_core = 0
"""
_START_SECONDS = 60


class HostLibvirtd:
    """It and its guests end with whoever is alone; as a context manager it ends before, and its guests run on."""

    def __init__(self) -> None:
        self.program = Program("libvirtd", alone.directory())

    def __enter__(self) -> Self:
        Path("/etc/libvirt/libvirtd.conf").write_text(_LIBVIRTD_CONF)
        Path("/etc/libvirt/qemu.conf").write_text(_QEMU_CONF)
        self._hide_kvm()
        self.program.start(["libvirtd"])
        self.program.wait_until(self._answers, seconds=_START_SECONDS)
        IMAGES.mkdir(exist_ok=True)
        return self

    def system(self) -> GuestOS:
        """The test guest's operating system, where QEMU's user may read it: not in root's cache."""
        _BOOT.mkdir(exist_ok=True)
        cached = guest_os()
        return GuestOS(*(Path(shutil.copy(file, _BOOT)) for file in (cached.kernel, cached.initramfs)))

    def __exit__(self, *_: object) -> None:
        self.program.stop()

    def virsh(self, *arguments: str) -> str:
        """Run virsh and return what it prints. Raises RuntimeError with its error message."""
        command = ["virsh", "--quiet", "--connect", URI, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"virsh {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def _hide_kvm(self) -> None:
        """Guests are emulated here; and where root may open /dev/kvm and QEMU's user not, each call probes QEMU again.

        Ten seconds for each definition of a domain, measured with libvirt 9.0; and a guest may stand still meanwhile.
        """
        if Path("/dev/kvm").exists():
            nothing = alone.directory() / "no-kvm"
            nothing.touch(mode=0o600)
            subprocess.run(["mount", "--bind", nothing, "/dev/kvm"], check=True)

    def _answers(self) -> bool:
        with suppress(RuntimeError):
            self.virsh("uri")
            return True
        return False
