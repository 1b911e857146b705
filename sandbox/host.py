"""The libvirtd of a hypervisor as its administrator runs it (qemu:///system), inside sandbox.isolated."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Self

from sandbox import isolated
from sandbox.guest_os import GuestOS, guest_os
from sandbox.processes import Program

IMAGES = Path("/var/lib/libvirt/images")
_BOOT = Path("/var/lib/libvirt/boot")
URI = "qemu:///system"

# Inside the isolation there is no virtlogd, polkit, systemd or AppArmor. All else is Debian's default: guests run as
# libvirt-qemu, and libvirtd gives this user their images.
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
    """It and its guests end with the isolated command. As a context manager it ends earlier, and its guests go on."""

    def __init__(self) -> None:
        self.program = Program("libvirtd", isolated.directory())

    def __enter__(self) -> Self:
        Path("/etc/libvirt/libvirtd.conf").write_text(_LIBVIRTD_CONF)
        Path("/etc/libvirt/qemu.conf").write_text(_QEMU_CONF)
        self._hide_kvm()
        self.program.start(["libvirtd"])
        self.program.wait_until(self._answers, seconds=_START_SECONDS)
        IMAGES.mkdir(exist_ok=True)
        return self

    def system(self) -> GuestOS:
        """The test guest's operating system, in a place that QEMU's user may read: root's cache is not."""
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
        """Guests are emulated here. Where root may open /dev/kvm and QEMU's user may not, each call probes QEMU again.

        That takes ten seconds for each definition of a domain (libvirt 9.0), in which a guest may stay suspended.
        """
        if Path("/dev/kvm").exists():
            nothing = isolated.directory() / "no-kvm"
            nothing.touch(mode=0o600)
            subprocess.run(["mount", "--bind", nothing, "/dev/kvm"], check=True)

    def _answers(self) -> bool:
        with suppress(RuntimeError):
            self.virsh("uri")
            return True
        return False
