"""A guest that tells what it has durably written: a real Linux under QEMU's emulation, on libvirt.

On every disk it appends numbered, checksummed records to a journal, and acknowledges a number over the serial line only
once its fsync has returned (guest-os/writer.c). So the host knows at any time what must not be lost, and sandbox.oracle
proves what an image holds. After a reboot it goes on behind the last record that it finds: a guest that was sent back
in time shows itself by acknowledging a number twice.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from uuid import NAMESPACE_DNS, uuid5

from sandbox.guest_os import GuestOS, guest_os
from sandbox.libvirtd import DiskSpec, domain_xml
from sandbox.oracle import BLOCK_BYTES, ProofError, sealed_block

# A line cut off by a power cut ends in " booted", which the next boot says first: it is no acknowledgement.
_NUMBER = re.compile(r"(vd[a-z]) (start )?(\d+)")
_FAILURE = re.compile(r"vd[a-z] failed .*")
_POLL_SECONDS = 0.02
BOOT_SECONDS = 120.0
"""Long enough for an emulated guest on a busy machine; it takes about 5 s on an idle one."""


def make_disk(
    target: str, path: Path, *, image_format: str = "raw", size_mib: int = 128, bulk_mib: int = 0
) -> DiskSpec:
    """Create an image with an ext4 file system, and in it a bulk file of random data, which makes copies take a while.

    The journal grows by RECORD_BYTES a record: 36 MiB an hour at 20 records a second.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        content = Path(temporary, "content")
        content.mkdir()
        if bulk_mib:
            with (content / "bulk").open("wb") as bulk:
                for _ in range(bulk_mib << 8):
                    bulk.write(sealed_block(os.urandom(BLOCK_BYTES)))
        raw = path if image_format == "raw" else Path(temporary, "raw")
        options = [
            "-q",
            "-F",
            "-m",
            "0",
            "-N",
            "256",
            "-b",
            str(BLOCK_BYTES),
            "-J",
            "size=4",
            "-E",
            "lazy_itable_init=0",
        ]
        _run("mkfs.ext4", *options, "-d", str(content), str(raw), f"{size_mib}M")
        if raw != path:
            _run("qemu-img", "convert", "-f", "raw", "-O", image_format, str(raw), str(path))
    return DiskSpec(target, path, image_format)


class Guest:
    """A test guest: a domain `name` with `disks` (vda, vdb, …, each with an ext4 file system: `make_disk`).

    `virsh` runs a virsh command on the libvirtd that is to run it (Libvirtd.virsh). `directory` receives its serial
    logs. `records_per_second` and `dirty_kib_per_second` (of the bulk file, overwritten at random) are per disk.
    With `agent` the guest agent runs in it, so that its file systems can be frozen. `system`: what it boots
    instead of guest_os(), where QEMU may not read that.
    """

    def __init__(
        self,
        virsh: Callable[..., str],
        name: str,
        directory: Path,
        disks: Sequence[DiskSpec],
        *,
        records_per_second: float = 20,
        dirty_kib_per_second: float = 0,
        agent: bool = False,
        memory_mib: int = 128,
        system: GuestOS | None = None,
    ) -> None:
        self.name = name
        self.directory = directory
        self.disks = {disk.target: disk for disk in disks}
        self.console_log = directory / f"{name}.console.log"
        self.serial_log = directory / f"{name}.serial.log"
        self._virsh = virsh
        self._xml_file = directory / f"{name}.xml"
        # no_timer_check: emulated on a busy machine a guest may see no timer tick for long, and its kernel panics then.
        # cryptomgr.notests: its kernel's own tests are a tenth of the time that it takes to boot.
        kernel = "console=ttyS0 quiet no_timer_check cryptomgr.notests"
        self._arguments = f"{kernel} vmb.rate={records_per_second} vmb.dirty={dirty_kib_per_second}"
        self._agent = agent
        self._memory_mib = memory_mib
        self._system = system
        self._read_bytes = 0
        self._acknowledged: dict[str, list[int]] = {target: [] for target in self.disks}
        self._starts: dict[str, list[int]] = {target: [] for target in self.disks}
        self._failures: list[str] = []
        self._reading = threading.Lock()

    # The domain

    def xml(self) -> str:
        """The domain's XML. Reset, panic and the like do what libvirt does by default: restart, destroy."""
        system = self._system or guest_os()
        serials = "".join(
            f"<serial type='file'><source path='{log}' append='on'/><target port='{port}'/></serial>"
            for port, log in enumerate((self.console_log, self.serial_log))
        )
        channel = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
        return domain_xml(
            self.name,
            self.disks.values(),
            uuid=str(uuid5(NAMESPACE_DNS, self.name)),
            memory_mib=self._memory_mib,
            os_xml=f"<kernel>{system.kernel}</kernel><initrd>{system.initramfs}</initrd>"
            f"<cmdline>{self._arguments}</cmdline>",
            devices=serials + (channel if self._agent else ""),
        )

    def define(self) -> None:
        """Define it as a persistent domain, or redefine it; `start` starts it."""
        self._xml_file.write_text(self.xml())
        self._virsh("define", str(self._xml_file))

    def start(self) -> None:
        """Start the persistent domain."""
        self._virsh("start", self.name)

    def create(self) -> None:
        """Start it as a transient domain."""
        self._xml_file.write_text(self.xml())
        self._virsh("create", str(self._xml_file))

    def destroy(self) -> None:
        """Pull its power plug."""
        self._virsh("destroy", self.name)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Suspends it, so that its images can be copied consistently."""
        self._virsh("suspend", self.name)
        try:
            yield
        finally:
            self._virsh("resume", self.name)

    def shut_down(self, *, seconds: float = BOOT_SECONDS) -> None:
        """Ask it to shut down (the agent if there is one, else the power button), and wait until it is off."""
        self._virsh("shutdown", self.name)
        self._wait_until(lambda: self.name not in self._virsh("list", "--name").split(), "off", seconds)

    def wait_for_agent(self, *, seconds: float = BOOT_SECONDS) -> None:
        """Wait until the guest agent answers."""
        self._wait_until(self._agent_answers, "with its agent up", seconds)

    def _agent_answers(self) -> bool:
        try:
            self._virsh("qemu-agent-command", self.name, '{"execute": "guest-ping"}')
        except RuntimeError:
            return False
        return True

    # What it has acknowledged

    def acknowledged(self, target: str) -> int:
        """The highest number that the guest has acknowledged for a disk; 0 before the first."""
        return max(self.history(target), default=0)

    def history(self, target: str) -> list[int]:
        """All numbers that it has acknowledged for a disk, over all boots, in this order."""
        self._read_serial_log()
        return list(self._acknowledged[target])

    def starts(self, target: str) -> list[int]:
        """The first number to write on a disk, for each boot."""
        self._read_serial_log()
        return list(self._starts[target])

    def assert_only_rising(self) -> None:
        """Raise ProofError if the guest acknowledged a number twice or a lower number later: it went back in time."""
        for target in self.disks:
            history = self.history(target)
            for before, after in pairwise(history):
                if after <= before:
                    raise ProofError(
                        f"{self.name} {target}: {after} was acknowledged after {before}: the guest went back in time"
                    )

    def wait_for(self, number: int, *, target: str = "", seconds: float = BOOT_SECONDS) -> None:
        """Wait until the guest has acknowledged a number, for one disk or for all. Raises ProofError if it does not."""
        targets = [target] if target else list(self.disks)
        self._wait_until(
            lambda: all(self.acknowledged(each) >= number for each in targets), f"at record {number}", seconds
        )

    def wait_for_more(self, records: int = 5, *, seconds: float = BOOT_SECONDS) -> None:
        """Wait until the guest has acknowledged that many more records for each disk: it lives and can write."""
        wanted = {target: len(self.history(target)) + records for target in self.disks}
        self._wait_until(
            lambda: all(len(self.history(target)) >= count for target, count in wanted.items()),
            f"after {records} more records",
            seconds,
        )

    def _read_serial_log(self) -> None:
        """Read the new lines of the guest's console. Raises ProofError if it reports an error."""
        with self._reading:  # by a test and by the backup that it watches
            self._take_in_what_is_new()
        if self._failures:
            raise ProofError(f"{self.name}: the guest reports: {'; '.join(self._failures)}")

    def _take_in_what_is_new(self) -> None:
        if not self.serial_log.exists():
            return
        with self.serial_log.open("rb") as log:
            log.seek(self._read_bytes)
            complete, newline, _ = log.read().rpartition(b"\n")
        self._read_bytes += len(complete) + len(newline)
        for line in complete.decode(errors="replace").splitlines():
            if number := _NUMBER.fullmatch(line):
                (self._starts if number[2] else self._acknowledged)[number[1]].append(int(number[3]))
            elif _FAILURE.fullmatch(line):
                self._failures.append(line)

    def _wait_until(self, reached: Callable[[], bool], state: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not reached():
            if time.monotonic() > deadline:
                now = {target: self.acknowledged(target) for target in self.disks}
                console = self.console_log.read_text(errors="replace")[-2000:] if self.console_log.exists() else ""
                raise ProofError(f"{self.name} is not {state} after {seconds:.0f} s: {now}\n{console}")
            time.sleep(_POLL_SECONDS)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
