"""Domains without an OS for tests: started paused they cost no CPU, yet have real disks, snapshots and block jobs.

And Linux guests that write (`at_work`).
"""

from __future__ import annotations

import json
import subprocess
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from sandbox.guest import Guest as WritingGuest
from sandbox.libvirtd import DiskSpec, Libvirtd
from vmbackup.hypervisor import chain
from vmbackup.hypervisor.chain import Disk
from vmbackup.hypervisor.guest import Guest
from vmbackup.protocol.terms import Mirror

_LEAKS = 3  # the exit code of qemu-img check for clusters that nothing refers to, and nothing worse


@dataclass(frozen=True)
class Domain:
    """A guest whose disks a test writes and reads itself. `bases` are its images by target, before any backup."""

    libvirtd: Libvirtd
    guest: Guest
    directory: Path
    bases: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.guest.name

    def write(self, target: str, pattern: int, offset: str = "0", length: str = "1M") -> None:
        """Fill a part of a disk, as the guest would."""
        self.libvirtd.qemu_io(self.name, target, f"write -P {pattern:#x} {offset} {length}")

    def holds(self, target: str, pattern: int, offset: str = "0", length: str = "1M") -> bool:
        """Whether the guest reads this pattern there."""
        try:
            self.libvirtd.qemu_io(self.name, target, f"read -P {pattern:#x} {offset} {length}")
        except RuntimeError as error:
            if "Pattern verification failed" in str(error):
                return False
            raise
        return True

    def live(self, target: str = "vda") -> Disk:
        """The disk in the live XML."""
        return _disk(self.guest.live_xml(), target)

    def persistent(self, target: str = "vda") -> Disk:
        """The disk in the persistent XML."""
        return _disk(self.guest.persistent_xml(), target)

    def overlay(self, target: str = "vda", uid8: str = "01234567") -> str:
        """Where an overlay of this disk goes."""
        return chain.overlay_path(replace(self.live(target), source=self.bases[target]), uid8)

    def snapshot(self, *targets: str, uid8: str = "01234567") -> dict[str, str]:
        """Put an overlay on some disks (default: all); returns the overlays."""
        overlays = {target: self.overlay(target, uid8) for target in targets or self.bases}
        every = [disk.target for disk in chain.disks(self.guest.live_xml() or "")]
        self.guest.snapshot(overlays, [target for target in every if target not in overlays])
        return overlays

    def wait_ready(self, target: str = "vda") -> None:
        """Wait until the commit of a disk is READY."""
        wait_until(lambda: self.live(target).mirror is Mirror.READY, f"{self.name} {target} READY")


class DomainFactory(Protocol):
    """Makes domains; `disks` maps a target to raw, qcow2 or chain (a qcow2 with a template below it)."""

    def __call__(
        self,
        disks: Mapping[str, str] | None = None,
        *,
        persistent: bool = True,
        start: bool = True,
        directory: Path | None = None,
        size: str = "64M",
        more_disks: tuple[DiskSpec, ...] = (),
        devices: str = "",
        os_xml: str = "",
        extra: str = "",
    ) -> Domain: ...


GuestFactory = Callable[[int], list[Domain]]
"""Makes so many running guests with a raw and a qcow2 disk."""


def make_disk(directory: Path, target: str, kind: str, size: str = "64M") -> DiskSpec:
    """Make an empty image: raw, qcow2, or chain (a qcow2 with a template below it)."""
    image_format = "raw" if kind == "raw" else "qcow2"
    path = directory / f"{target}.{image_format}"
    backing: list[str] = []
    if kind == "chain":
        template = directory / f"{target}-template.qcow2"
        qemu_img("create", "-f", "qcow2", str(template), size)
        backing = ["-b", str(template), "-F", "qcow2"]
    qemu_img("create", "-f", image_format, *backing, str(path), size)
    return DiskSpec(target, path, image_format)


@contextmanager
def at_work(guest: WritingGuest, libvirtd: Libvirtd) -> Generator[WritingGuest]:
    """Start a guest that has an agent: it has begun to write, and the agent answers. It is gone afterwards."""
    guest.define()
    guest.start()
    try:
        guest.wait_for(3)
        guest.wait_for_agent()
        yield guest
    finally:
        if guest.name in libvirtd.guest_pids():
            guest.destroy()
        libvirtd.virsh("undefine", guest.name)


def qemu_img(*arguments: str) -> str:
    """Run qemu-img and return what it prints."""
    return subprocess.run(["qemu-img", *arguments], check=True, capture_output=True, text=True).stdout


def what_is_wrong_with(image: Path, *, leaks: bool = False) -> str:
    """What `qemu-img check` finds in an image, which may be in use; '' for nothing, or for a raw one.

    `leaks`: clusters that nothing refers to are nothing wrong, as after a QEMU that was killed.
    """
    if json.loads(qemu_img("info", "-U", "--output=json", str(image)))["format"] == "raw":
        return ""
    done = subprocess.run(["qemu-img", "check", "-U", str(image)], capture_output=True, text=True, check=False)
    fine = (0, _LEAKS) if leaks else (0,)
    return "" if done.returncode in fine else f"{image}: qemu-img check: {done.stdout}{done.stderr}"


def starts(guest: Domain, *flags: str) -> bool:
    """Start a guest; False where somebody has locked its images, be it for a moment."""
    try:
        guest.libvirtd.virsh("start", guest.name, *flags)
    except RuntimeError as error:
        if "lock" in str(error):
            return False
        raise
    return True


def naming(definition: str, target: str, image: Path) -> str:
    """A definition in which a human has named this qcow2 image, as he is advised to."""
    domain = ET.fromstring(definition)
    (disk,) = (disk for disk in domain.iterfind("devices/disk") if disk.find(f"target[@dev='{target}']") is not None)
    for backing in disk.findall("backingStore"):
        disk.remove(backing)
    for element, attribute, value in (("driver", "type", "qcow2"), ("source", "file", str(image))):
        found = disk.find(element)
        assert found is not None
        found.set(attribute, value)
    return ET.tostring(domain, "unicode")


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
    """Poll until the condition holds. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds} s")
        time.sleep(0.01)


def _disk(xml: str | None, target: str) -> Disk:
    assert xml is not None
    return next(disk for disk in chain.disks(xml) if disk.target == target)
