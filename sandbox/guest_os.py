"""The test guest's operating system: Debian's cloud kernel and an initramfs of busybox, a few modules and our writer.

Built once and kept in the user's cache; built again when one of its inputs changes. Nothing is installed: packages are
downloaded with apt and unpacked beside it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sandbox.processes import SandboxError
from sandbox.tools import CACHE, locked

_SOURCES = Path(__file__).with_name("guest-os")
_KERNEL_PACKAGE = "linux-image-cloud-amd64"
_AGENT_PACKAGE = "qemu-guest-agent"
# In the order of their dependencies. ext4 and the serial line are built into the kernel.
_MODULES = (
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci",
    "drivers/block/virtio_blk",
    "drivers/char/virtio_console",
    "drivers/input/evdev",
    "drivers/acpi/button",
)


@dataclass(frozen=True)
class GuestOS:
    """What a domain boots: `<kernel>` and `<initrd>`."""

    kernel: Path
    initramfs: Path


def guest_os() -> GuestOS:
    """The test guest's operating system, from the cache or built now (seconds; the first time a download of 27 MB).

    Raises SandboxError if a package or a tool is not available.
    """
    cache = CACHE / "guest"
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / "lock"):
        kernel = _unpacked(_KERNEL_PACKAGE, cache)
        agent = _unpacked(_AGENT_PACKAGE, cache)
        initramfs = cache / f"initramfs-{_fingerprint(kernel)}.cpio"
        if not initramfs.exists():
            _build_initramfs(initramfs, kernel, agent)
    return GuestOS(_only(kernel, "boot/vmlinuz-*"), initramfs)


def _unpacked(package: str, cache: Path) -> Path:
    """The directory with the files of a Debian package (of a metapackage: of its dependencies)."""
    target = cache / package
    if not target.is_dir():
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            files = Path(temporary) / "files"
            try:
                _download(package, temporary)
            except SandboxError:  # no package lists yet, or older ones than the archive
                _run("apt-get", "update")
                _download(package, temporary)
            for deb in Path(temporary).glob("*.deb"):
                _run("dpkg-deb", "-x", str(deb), str(files))
            files.rename(target)
    return target


def _download(package: str, directory: str) -> None:
    depends = _run("apt-cache", "depends", "--important", package)
    real = re.findall(r"^ *Depends: (linux-image-\S+)$", depends, re.MULTILINE) or [package]
    _run("apt-get", "download", *real, directory=directory)


def _fingerprint(kernel: Path) -> str:
    inputs = [*sorted(_SOURCES.iterdir()), Path(__file__), _busybox()]
    digest = hashlib.sha256(_only(kernel, "boot/vmlinuz-*").name.encode())
    for path in inputs:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _build_initramfs(target: Path, kernel: Path, agent: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        root = Path(temporary) / "root"
        for folder in (
            "bin",
            "dev",
            "etc/acpi/PWRF",
            "lib",
            "lib64",
            "mnt",
            "modules",
            "proc",
            "run",
            "sbin",
            "sys",
            "var",
        ):
            (root / folder).mkdir(parents=True)
        (root / "var/run").symlink_to("/run")
        shutil.copy2(_busybox(), root / "bin/busybox")
        _install_program(_SOURCES / "init", root / "init")
        for caller in ("etc/acpi/PWRF/00000080", "sbin/shutdown"):  # acpid and the guest agent
            _install_program(_SOURCES / "power-off", root / caller)
        _run(
            "gcc",
            "-O2",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-static",
            "-s",
            "-o",
            f"{root}/bin/writer",
            f"{_SOURCES}/writer.c",
        )
        _install_modules(root, kernel)
        _install_agent(root, agent)
        packed = Path(temporary) / "packed"
        packed.write_bytes(_cpio(root))  # an emulated guest is slow to decompress
        packed.rename(target)


def _install_program(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    target.chmod(0o755)


def _install_modules(root: Path, kernel: Path) -> None:
    modules = _only(kernel, "lib/modules/*") / "kernel"
    for module in _MODULES:
        shutil.copy2(modules / f"{module}.ko", root / "modules")
    (root / "modules/order").write_text("".join(f"{Path(module).name}\n" for module in _MODULES))


def _install_agent(root: Path, agent: Path) -> None:
    """The agent with the shared libraries that this machine, of the same Debian release, has for it."""
    shutil.copy2(agent / "usr/sbin/qemu-ga", root / "bin")
    listed = _run("ldd", str(agent / "usr/sbin/qemu-ga"))
    if missing := re.findall(r"(\S+) => not found", listed):
        raise SandboxError(f"the guest agent needs {', '.join(missing)}: install qemu-system-x86, which has them")
    for library in re.findall(r"(/\S+) \(0x", listed):
        shutil.copy2(library, root / ("lib64" if "/ld-" in library else "lib"))


def _cpio(root: Path) -> bytes:
    names = "".join(f"{path.relative_to(root)}\n" for path in sorted(root.rglob("*")))
    command = ["cpio", "--quiet", "--create", "--format=newc", "--owner=0:0", "--reproducible"]
    return subprocess.run(command, cwd=root, input=names.encode(), capture_output=True, check=True).stdout


def _busybox() -> Path:
    found = shutil.which("busybox", path=os.environ.get("PATH", os.defpath) + ":/bin:/usr/bin")
    if not found:
        raise SandboxError("busybox is missing: install Debian's busybox-static")
    return Path(found)


def _only(directory: Path, pattern: str) -> Path:
    found = list(directory.glob(pattern))
    if len(found) != 1:
        raise SandboxError(f"{directory} holds {len(found)} of {pattern}: remove it; it will be fetched again")
    return found[0]


def _run(*command: str, directory: str | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise SandboxError(f"{command[0]} is missing: {error}") from error
    if done.returncode:
        raise SandboxError(f"{' '.join(command)} failed ({done.returncode}): {done.stderr.strip()}")
    return done.stdout
