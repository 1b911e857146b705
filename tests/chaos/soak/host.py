"""The machine of some guests of a soak: one libvirtd for them, small file systems, and what humans do with virsh."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self, TypeVar

from sandbox.libvirtd import CRASHED, Libvirtd
from tests.chaos.power import booted_now, cut_off
from tests.support.kill_points import Boot
from tests.support.storage import XFS_BYTES, make_xfs, mounted, run
from vmbackup.errors import TransientError, VMBackupError
from vmbackup.hypervisor.guest import Guest
from vmbackup.hypervisor.hypervisor import Hypervisor
from vmbackup.protocol.terms import Power
from vmbackup.reconcile.state.clock import boottime

Answer = TypeVar("Answer")

_AWAY = ("connect", "keepalive", "I/O error", "client socket", "cannot recv", "no domain with matching")
_TRY_SECONDS = 60.0


class Host:
    """A private libvirtd under `directory`. Without root there are no small file systems to be filled.

    `durable`: its file systems are disks, of which a power cut leaves what is durable.
    """

    def __init__(self, directory: Path, *, durable: bool = False) -> None:
        directory.mkdir()
        self.directory = directory
        self.boot: Boot | None = None  # None: that of the real machine
        self._durable = durable
        self._disks: dict[Path, Path] = {}
        self.libvirtd = Libvirtd(directory)
        self.disturbed = time.monotonic()  # when libvirtd, or what it needs, was last away
        self.disturbances = 0
        self._crashes_noticed = 0
        self._stack = ExitStack()
        self._up = threading.Event()
        self._starter = ThreadPoolExecutor(1)  # libvirtd ends with the thread that has started it
        self._one_at_a_time = threading.Lock()

    def __enter__(self) -> Self:
        with self._stack:  # undone here if anything fails
            self.place("libvirt/qemu", mebibytes=16)
            self._stack.callback(self.libvirtd.stop)
            self._starter.submit(self.libvirtd.start).result()
            self.hypervisor = Hypervisor(self.libvirtd.uri, config_dir=self.libvirtd.config_dir)
            self._stack.callback(self.hypervisor.close)
            self._stack = self._stack.pop_all()
        self._up.set()
        return self

    def __exit__(self, *_: object) -> None:
        self._up.set()
        self.libvirtd.cont()
        self._stack.close()
        self._starter.shutdown()

    def place(self, name: str, *, mebibytes: int = 0, reflink: bool = False) -> Path:
        """A new folder; for root it is a file system of its own where a size is given: tmpfs, or XFS with reflinks."""
        folder = self.directory / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        if os.geteuid() or not mebibytes:
            folder.mkdir()
        elif reflink or self._durable:
            image = folder.with_suffix(".xfs")
            make_xfs(image, max(mebibytes << 20, XFS_BYTES))
            self._stack.enter_context(mounted(folder, "-o", "loop", str(image)))
            self._disks[folder] = image
        else:
            self._stack.enter_context(mounted(folder, "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs"))
        return folder

    @contextmanager
    def away(self) -> Iterator[Libvirtd]:
        """For a fault of libvirtd: nobody else touches it, and nobody plays a human, meanwhile."""
        with self._one_at_a_time:
            self._up.clear()
            self.disturb()
            try:
                yield self.libvirtd
            finally:
                self.libvirtd.cont()
                self._starter.submit(self.libvirtd.start).result()
                self.disturb()
                self._up.set()

    def cut_power(self) -> None:
        """Cut it, and boot: the logs of the disks are recovered, /run is empty, libvirtd runs, and no guest."""
        with self.away() as libvirtd:
            cut_off(libvirtd, self._disks)
            for folder, image in self._disks.items():
                run("mount", "-o", "loop", str(image), str(folder))
            shutil.rmtree(libvirtd.runtime_dir)
            self.boot = booted_now()

    def sync(self) -> None:
        """Make durable what there is, as time does."""
        for folder in self._disks:
            run("sync", "--file-system", str(folder))

    def boottime(self) -> float:
        """CLOCK_BOOTTIME as the drivers see it, in seconds."""
        return boottime() - (self.boot.booted if self.boot else 0)

    def disturb(self) -> None:
        """Restart all measurements now: something outside the backup has delayed it."""
        self.disturbed = time.monotonic()
        self.disturbances += 1

    def virsh(self, *arguments: str) -> str:
        """What a human does, who tries again where libvirtd is away. Raises RuntimeError where it is refused."""
        deadline = time.monotonic() + _TRY_SECONDS
        while True:
            self._up.wait(_TRY_SECONDS)
            try:
                return self.libvirtd.virsh(*arguments)
            except RuntimeError as error:
                if time.monotonic() > deadline or not any(word in str(error) for word in _AWAY):
                    raise
                time.sleep(0.2)

    def patiently(self, ask: Callable[[], Answer]) -> Answer:
        """What libvirt answers, asked again where it is away. Raises VMBackupError."""
        deadline = time.monotonic() + _TRY_SECONDS
        while True:
            self._up.wait(_TRY_SECONDS)
            try:
                return ask()
            except TransientError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    @property
    def crashes(self) -> int:
        """How often libvirtd has crashed, not counting those that the soak has killed."""
        return self.libvirtd.log_file.read_text(errors="replace").count(CRASHED)

    def notice_crashes(self) -> None:
        """Restart all measurements also after a crash of libvirtd that the soak has not caused."""
        if (crashes := self.crashes) > self._crashes_noticed:
            self._crashes_noticed = crashes
            self.disturb()

    def state(self, guest: Guest) -> Power | None:
        """The state of a domain; None where libvirtd does not tell now."""
        self._up.wait(_TRY_SECONDS)
        try:
            return guest.state()[0]
        except VMBackupError:
            return None


def fill(folder: Path) -> Callable[[], None]:
    """Take all the room of a file system but a few KiB. Returns how to give it back."""
    filler = folder / ".filler"
    status = os.statvfs(folder)
    size = status.f_bavail * status.f_frsize - (16 << 10)
    with filler.open("wb") as file:
        while size > 0:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError:  # somebody else takes room too
                size = size * 9 // 10
            else:
                break
    return lambda: filler.unlink(missing_ok=True)
