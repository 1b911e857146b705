"""A machine whose power can be cut: what was not durable is gone, and it boots as a hypervisor does.

Images, libvirt's configuration, and the agent's state with its store lie on an XFS each, so that what one of them makes
durable does not do so, by chance, for another; what belongs into /run lies elsewhere and is lost. A cut shuts them down
without a flush of their logs (`xfs_io -x -c shutdown`) and kills libvirtd and all guests. At the next boot the logs are
recovered, libvirtd starts, and guests start from their persistent XML before any agent runs.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from sandbox.libvirtd import Libvirtd, domain_xml
from tests.support.domains import make_disk, wait_until
from tests.support.kill_points import Boot, Driving, Interruption, Moment, Task
from tests.support.proof import copies, every_source, sources, wrong_digests, wrong_records
from tests.support.storage import make_xfs, run
from vmbackup.api.status import Report
from vmbackup.protocol.record import Copy, Guard, Record, Snapshot
from vmbackup.reconcile.state.journal import record_of

SLOW = {"bandwidth": "1Mi"}
"""The spec of a copy or commit that takes four seconds for what `fill` writes on a disk."""

_UPTIME = 30 * 86400.0  # seconds since the first boot, by CLOCK_BOOTTIME: much more than since any later one
_RECORDS, _BULK = (
    4 << 20,
    4 << 20,
)  # bytes of each disk: first its records, then what makes a copy or commit take a while


class Machine:
    """A hypervisor with its own libvirtd. What is not durable of `images`, `directory` and `state` is lost in a cut."""

    def __init__(self, directory: Path, folder: Path) -> None:
        """`directory`, for libvirt, is short, for sockets; `folder` is for what no cut touches."""
        self.directory = directory
        self.images = folder / "images"
        self.state = folder / "state"
        self._run = folder / "run"
        self.libvirtd = Libvirtd(directory)
        self.boot = Boot(str(uuid.uuid4()), time.clock_gettime(time.CLOCK_BOOTTIME) - _UPTIME)
        mountpoints = self.images, self.state, directory
        self._disks = {mountpoint: folder / f"{mountpoint.name}.img" for mountpoint in mountpoints}
        for mountpoint, disk in self._disks.items():
            mountpoint.mkdir(exist_ok=True)
            make_xfs(disk)

    def power_on(self) -> None:
        """Boot: recover the logs, find /run empty, start libvirtd; no guest, and no agent."""
        for mountpoint, disk in self._disks.items():
            run("mount", "-o", "loop", str(disk), str(mountpoint))
        shutil.rmtree(self._run, ignore_errors=True)
        self._run.mkdir(mode=0o700)
        if not self.libvirtd.runtime_dir.is_symlink():
            self.libvirtd.runtime_dir.symlink_to(self._run)
        self.libvirtd.pid_file.unlink(missing_ok=True)
        self.libvirtd.start()

    def sync(self) -> None:
        """Make durable what there is, as time does."""
        for mountpoint in self._disks:
            run("sync", "--file-system", str(mountpoint))

    def cut(self, *drivings: Driving) -> None:
        """Cut the power, while these run."""
        for driving in drivings:
            driving.kill()
        cut_off(self.libvirtd, self._disks)
        self.boot = booted_now()

    def end(self) -> None:
        """Nothing of it is left, but its disks."""
        self.libvirtd.stop()
        _unmount(self._disks)


def cut_off(libvirtd: Libvirtd, mountpoints: Collection[Path]) -> None:
    """Cut the power of these, and of all guests: what is not durable there is lost, and nothing is mounted any more."""
    pids = [*libvirtd.guest_pids().values(), *filter(None, [libvirtd.pid])]
    _signal(pids, signal.SIGSTOP)  # nobody sees the disks go before the power is gone
    for mountpoint in mountpoints:
        run("xfs_io", "-x", "-c", "shutdown", str(mountpoint))
    _signal(pids, signal.SIGKILL)
    _unmount(mountpoints)


def booted_now() -> Boot:
    """What a driver is to believe after a cut."""
    return Boot(str(uuid.uuid4()), time.clock_gettime(time.CLOCK_BOOTTIME))


def _unmount(mountpoints: Iterable[Path]) -> None:
    for mountpoint in mountpoints:
        wait_until(partial(_unmounted, mountpoint), f"{mountpoint} unmounted")


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _unmounted(mountpoint: Path) -> bool:
    """Whether it is not mounted any more; it is busy until the last process that used it is gone."""
    done = subprocess.run(["umount", str(mountpoint)], capture_output=True, text=True, check=False)
    return done.returncode == 0 or "not mounted" in done.stderr


@contextmanager
def machine(folder: Path) -> Iterator[Machine]:
    """A machine that is on."""
    directory = Path(tempfile.mkdtemp(prefix="vmb-"))
    made = Machine(directory, folder)
    try:
        made.power_on()
        yield made
    finally:
        made.end()
        directory.rmdir()


class PoweredGuest:
    """A guest without an OS on such a machine: it writes numbered records, and flushes each before the next."""

    def __init__(self, machine: Machine, folder: Path, name: str) -> None:
        """`folder` is for its diary: what the outside world has seen acknowledged is not lost in a cut."""
        self.machine = machine
        self.name = name
        self._directory = machine.state / name
        self._directory.mkdir()
        (self._directory / "diary").symlink_to(folder / f"{name}.diary")
        self.images = machine.images / name
        self.images.mkdir()
        disks = [make_disk(self.images, "vda", "raw", "8M"), make_disk(self.images, "vdb", "qcow2", "8M")]
        self.bases = {disk.target: str(disk.path) for disk in disks}
        xml = folder / f"{name}.xml"
        xml.write_text(domain_xml(name, disks))
        machine.libvirtd.virsh("define", str(xml))
        machine.libvirtd.virsh("start", name)
        self.fill(0x11)
        self.write(3)
        machine.sync()

    def fill(self, pattern: int) -> None:
        """Overwrite all that is behind the records: work for a copy or a commit."""
        self._on_every_disk(f"write -f -P {pattern:#x} {_RECORDS} {_BULK}")

    def write(self, records: int = 1) -> None:
        """Write records, each acknowledged once it is on every disk."""
        for _ in range(records):
            self.task("").diary.write_next(self._on_every_disk)

    def _on_every_disk(self, command: str) -> None:
        for target in self.bases:
            self.machine.libvirtd.qemu_io(self.name, target, command)

    def start(self) -> None:
        """Start it from its persistent XML, see that it has all that was acknowledged, and let it write."""
        self.machine.libvirtd.virsh("start", self.name)
        wrong = list(self._stale(sources(self.machine.libvirtd, self.name)))
        assert not wrong, f"{self.name} went back in time: {'; '.join(wrong)}"
        self.write(3)

    def task(self, uid: str, moment: Moment | None = None, **spec: Any) -> Task:
        """What a driver is to do for this guest; with a moment, it is held there."""
        return Task(
            uri=self.machine.libvirtd.uri,
            config_dir=self.machine.libvirtd.config_dir,
            directory=self._directory,
            domain=self.name,
            targets=tuple(self.bases),
            uid=uid,
            spec={"switchPolicy": "Guarded", **spec},
            moment=moment,
            interruption=Interruption.HOLD,
            boot=self.machine.boot,
        )

    def wrong(self, task: Task, report: Report) -> Iterator[str]:
        """All that is not as it must be once a backup has ended."""
        yield from self.not_at_home()
        if report.backup_complete:
            yield from self._wrong_copies(task, Path(report.location))

    def not_at_home(self) -> Iterator[str]:
        """All that shows that it does not run with every record on its own images."""
        if (state := self.machine.libvirtd.virsh("domstate", self.name)) != "running":
            yield f"the guest is {state}"
        if left := [path.name for path in self.images.glob("*.vmb-*")]:
            yield f"overlays are left: {left}"
        named = every_source(self.machine.libvirtd, self.name)
        if any(images != self.bases for images in named.values()):
            yield f"live XML, persistent XML and the one on disk name {named}"
        yield from self._stale(self.bases)

    def _wrong_copies(self, task: Task, folder: Path) -> Iterator[str]:
        stored = copies(folder)
        if stored.keys() != self.bases.keys():
            yield f"{folder} holds copies of {sorted(stored)}"
        yield from wrong_digests(folder)
        yield from wrong_records(stored, task.diary.snapshots(task.uid), _RECORDS)

    def _stale(self, images: Mapping[str, str]) -> Iterator[str]:
        acknowledged = self.task("").diary.acknowledged
        paths = {target: Path(image) for target, image in images.items()}
        yield from wrong_records(paths, (acknowledged, acknowledged + 1), _RECORDS)


def copying(record: Record) -> bool:
    """It is in the middle of its copy."""
    settled = all(disk.settled and disk.settled.durable for disk in record.disks)
    return record.snapshot is Snapshot.DONE and record.copy is Copy.OPEN and record.guard is Guard.NONE and settled


def committing(record: Record) -> bool:
    """It is in the middle of a commit."""
    return any(disk.commit_running for disk in record.disks) and record.guard is Guard.NONE


def wait_for_record(driving: Driving, like: Callable[[Record], bool]) -> None:
    """Wait until the journal of a running backup is like that."""

    def found() -> bool:
        record = record_of(driving.task.state_dir, driving.task.uid)
        return record is not None and like(record)

    wait_until(found, like.__name__)
