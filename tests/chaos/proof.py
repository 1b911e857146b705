"""What must be true after anything that happened to a guest: nothing that it was told is safe is lost.

A `Witness` goes with one test guest (sandbox.guest), which it never stops: it suspends the guest for the moment in
which it copies the images, and proves on the copies. `Witness.prove` is the end of every scenario.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from sandbox import oracle
from sandbox.guest import Guest as WritingGuest
from sandbox.guest import make_disk
from sandbox.libvirtd import DiskSpec, Libvirtd
from sandbox.oracle import Bounds
from tests.support.backups import RunningBackup
from tests.support.domains import qemu_img
from tests.support.proof import copies, damaged, every_source, not_on_base, sources, wrong_digests
from tests.support.storage import run
from vmbackup.api.status import DiskState, Report
from vmbackup.protocol.terms import Action, Do
from vmbackup.reconcile.state.journal import Journal
from vmbackup.reconcile.steps import step

FILE_SYSTEM_MIB = 64
TAIL_MIB = 96  # behind the file system, where the test writes as it likes
_RESTED = ("running", "shut off", "crashed")


def make_guest(
    libvirtd: Libvirtd, directory: Path, name: str, *, images: Path | None = None, **options: Any
) -> WritingGuest:
    """Define and start a guest with a raw and a qcow2 disk, each with a tail behind its file system."""
    images = images or directory
    disks = [_with_tail(make_disk("vda", images / f"{name}-vda.raw", size_mib=FILE_SYSTEM_MIB, bulk_mib=8))]
    path = images / f"{name}-vdb.qcow2"
    disks.append(_with_tail(make_disk("vdb", path, image_format="qcow2", size_mib=FILE_SYSTEM_MIB, bulk_mib=8)))
    guest = WritingGuest(libvirtd.virsh, name, directory, disks, agent=True, **options)
    guest.define()
    guest.start()
    return guest


def _with_tail(disk: DiskSpec) -> DiskSpec:
    qemu_img("resize", "-q", "-f", disk.format, str(disk.path), f"+{TAIL_MIB}M")
    return disk


class Witness:
    """Knows what a guest has acknowledged and when its snapshots were taken, and proves that it is all there."""

    def __init__(self, libvirtd: Libvirtd, guest: WritingGuest) -> None:
        self.libvirtd = libvirtd
        self.guest = guest
        self.bases = {target: str(disk.path) for target, disk in guest.disks.items()}
        self._bounds: dict[str, Bounds] = {}
        self._tails: dict[str, tuple[int, int]] = {}

    @property
    def name(self) -> str:
        """Of the domain."""
        return self.guest.name

    # -- what happens to it

    def acknowledged(self) -> dict[str, int]:
        """The last number that is acknowledged, by target."""
        return {target: self.guest.acknowledged(target) for target in self.bases}

    def write_tail(self, target: str, pattern: int, mebibytes: int = 32) -> None:
        """Fill a part of the disk behind its file system, as the guest would: so much for a commit to do."""
        self.libvirtd.qemu_io(self.name, target, f"write -f -P {pattern:#x} {FILE_SYSTEM_MIB}M {mebibytes}M")
        self._tails[target] = pattern, mebibytes

    def overlays(self) -> list[Path]:
        """The files of our overlays, and those that are named like one."""
        return sorted({path for base in self.bases.values() for path in Path(base).parent.glob("*.vmb-*")})

    def state(self) -> str:
        """What libvirt says of the guest: running, paused, shut off, …"""
        return self.libvirtd.virsh("domstate", self.name).strip()

    def source(self, target: str, *, inactive: bool = False) -> str:
        """The image of a disk in the live XML, or in the persistent one."""
        return sources(self.libvirtd, self.name, inactive=inactive)[target]

    def watch_snapshots(self, patch: pytest.MonkeyPatch) -> None:
        """From now on note what is acknowledged around each snapshot that a backup in this process takes.

        It is taken at the latest when the guest is resumed after it, whatever became of the answer.
        """
        send = step.send

        def watched(journal: Journal, action: Action, call: Callable[[], object]) -> None:
            uid = journal.record.uid
            if journal.record.domain == self.name and action.do is Do.SNAPSHOT:
                self.snapshot_begins(uid)
            if journal.record.domain == self.name and action.do is Do.RESUME:
                self.snapshot_is_over(uid)
            send(journal, action, call)
            if journal.record.domain == self.name and action.do is Do.SNAPSHOT:
                self.snapshot_is_over(uid)

        patch.setattr(step, "send", watched)

    def snapshot_begins(self, uid: str) -> None:
        """The snapshot of this backup is taken from now on."""
        self._bounds[uid] = Bounds(self.acknowledged())

    def snapshot_is_over(self, uid: str) -> None:
        """The snapshot of this backup, if it was begun, is not taken any more."""
        bounds = self._bounds.get(uid)
        if bounds is not None and not bounds.at_most:
            self._bounds[uid] = Bounds.around(bounds.at_least, self.acknowledged())

    # -- what is proven of it

    def prove(self, *backups: RunningBackup, left: Collection[str] = ()) -> None:
        """Prove that nothing is lost. Raises AssertionError.

        Every acknowledged record is on the guest's images, which are sound; the guest never went back in time, and
        lives on if it is on. Its disks are home, but for those `left` on an overlay, which the last of the backups
        tells in every way there is. Each backup that claims to be complete restores to the moment of its snapshot.
        """
        state = self.state()
        assert state in _RESTED, f"{self.name} was left {state}"
        with tempfile.TemporaryDirectory(prefix="vmbackup-proof-") as scratch:
            tops = {target: self._top(target) for target in self.bases}
            with self._suspended(state):
                acknowledged = self.acknowledged()
                copies = {target: _copied(top, Path(scratch)) for target, top in tops.items()}
            for target, copy in copies.items():
                self._prove_image(target, copy, acknowledged[target])
        self.guest.assert_only_rising()
        self._prove_home([target for target in self.bases if target not in left])
        for target in left:
            self._prove_told(target, backups[-1])
        for backup in backups:
            self._prove_restorable(backup)
        if state == "running":
            self.guest.wait_for_more(2)

    def is_home(self) -> bool:
        """Whether all disks are on their base and nothing is left behind."""
        try:
            self._prove_home(self.bases)
        except AssertionError:
            return False
        return True

    def _prove_image(self, target: str, copy: Path, acknowledged: int) -> None:
        oracle.prove(copy, acknowledged_at_least=acknowledged, at_most=acknowledged + 1)
        killed = len(self.guest.starts(target)) > 1  # a QEMU that was killed leaves unused clusters
        assert not (wrong := list(damaged([copy], leaks=killed))), wrong
        if target in self._tails:
            pattern, mebibytes = self._tails[target]
            assert _holds(copy, pattern, mebibytes), f"{target}: what was written behind its file system is lost"

    def _prove_home(self, targets: Collection[str]) -> None:
        bases = {target: self.bases[target] for target in targets}
        assert not (wrong := list(not_on_base(every_source(self.libvirtd, self.name), bases))), wrong
        if len(targets) == len(self.bases):
            assert not self.overlays(), f"overlays are left: {self.overlays()}"

    def _prove_told(self, target: str, backup: RunningBackup) -> None:
        overlay = self._top(target)
        assert overlay in self.overlays(), f"{target} is on no overlay of ours: {overlay}"
        registry = backup.node.metrics.registry
        assert_told(self.name, target, overlay, backup.report, backup.told.events, registry)

    def _prove_restorable(self, backup: RunningBackup) -> None:
        uid = backup.key.uid
        folders = list(backup.store.rglob(f"*.{uid}/manifest.json"))
        if not backup.report.backup_complete:
            assert not folders, f"published though not complete: {folders}"
            return
        assert uid in self._bounds, "a backup is complete whose snapshot nobody has seen"
        assert_restorable(backup.folder, self._bounds[uid])

    def _top(self, target: str) -> Path:
        """The image that the guest writes, by QEMU's own word, or would start on."""
        return Path(self.written()[target] if self.state() == "running" else self.source(target))

    def written(self) -> dict[str, str]:
        """The image that QEMU writes, by target: libvirt may be wrong about it."""
        answer = self.libvirtd.virsh("qemu-monitor-command", self.name, '{"execute": "query-block"}')
        found: dict[str, str] = {}
        for device in json.loads(answer)["return"]:
            if number := re.search(r"virtio-disk(\d+)", device.get("qdev") or ""):
                found[f"vd{chr(ord('a') + int(number[1]))}"] = device["inserted"]["file"]
        return found

    @contextmanager
    def _suspended(self, state: str) -> Generator[None]:
        if state != "running":
            yield
            return
        self.libvirtd.virsh("suspend", self.name)
        try:
            yield
        finally:
            self.libvirtd.virsh("resume", self.name)


def assert_told(
    domain: str,
    target: str,
    overlay: Path,
    report: Report,
    events: Collection[tuple[str, str]],
    registry: CollectorRegistry,
) -> None:
    """Assert that status, condition, event and metric all tell of a disk that is on its overlay."""
    disk = {disk.target: disk for disk in report.disks}[target]
    assert disk.overlay == str(overlay), f"the status does not name {overlay}: {disk}"
    assert disk.state in (DiskState.ON_OVERLAY, DiskState.COMMITTING, DiskState.QUARANTINED), disk
    assert report.chain_clean is False, report
    assert report.chain_reason, report
    assert str(overlay) in report.chain_message, f"the condition does not name {overlay}: {report.chain_message}"
    assert any(str(overlay) in message for _, message in events), f"no event names {overlay}: {events}"
    labels = {"domain": domain, "target": target}
    for metric in ("vmbackup_overlay_bytes", "vmbackup_overlay_age_seconds"):
        assert registry.get_sample_value(metric, labels) is not None, f"{metric} does not tell of {domain} {target}"


def assert_restorable(folder: Path, bounds: Bounds) -> None:
    """Assert that a complete backup restores to exactly what the guest had written at its snapshot, all disks alike."""
    assert not (wrong := [*wrong_digests(folder), *damaged(copies(folder).values())]), wrong
    oracle.prove_snapshot(copies(folder), bounds)


def _copied(image: Path, scratch: Path) -> Path:
    """A copy of an image with all images below it. Nobody may write them meanwhile."""
    below: Path | None = None
    infos = json.loads(qemu_img("info", "-U", "--backing-chain", "--output=json", str(image)))
    for info in reversed(infos):
        name = Path(info["filename"])
        copy = scratch / name.name
        run("cp", "--reflink=auto", "--sparse=always", str(name), str(copy))
        if below is not None:
            qemu_img(
                "rebase", "-u", "-f", info["format"], "-b", str(below), "-F", info["backing-filename-format"], str(copy)
            )
        below = copy
    assert below is not None
    return below


def _holds(image: Path, pattern: int, mebibytes: int) -> bool:
    command = ["qemu-io", "-r", "-c", f"read -P {pattern:#x} {FILE_SYSTEM_MIB}M {mebibytes}M", str(image)]
    read = subprocess.run(command, capture_output=True, text=True, check=False)
    return read.returncode == 0 and "verification failed" not in read.stdout
