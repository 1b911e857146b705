"""How long a writing guest is on its overlay, and suspended, where the store can clone: both on one XFS."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sandbox.guest import Guest, make_disk
from sandbox.libvirtd import Libvirtd
from tests.support import storage
from vmbackup.api.backup import BackupSpec
from vmbackup.api.identity import BackupId
from vmbackup.api.status import Outcome, Report
from vmbackup.api.store import StoreSpec
from vmbackup.hypervisor.hypervisor import Hypervisor
from vmbackup.reconcile.backup import Backup
from vmbackup.reconcile.node import Node
from vmbackup.reconcile.request import Request
from vmbackup.stores.registry import open_store
from vmbackup.telemetry.metrics import Metrics

TARGET_SECONDS = 0.5
XFS_BYTES = 2 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=8, help="backups of the same guest")
    parser.add_argument("--bulk", type=int, default=256, help="MiB of data on its disk besides its records")


def run(arguments: argparse.Namespace) -> int:
    watches = _on_xfs(arguments)
    windows = [watch.on_overlay for watch in watches]
    pauses = [pause for watch in watches for pause in watch.suspended]
    table = Table("", "median", "longest", title=f"{len(windows)} backups of a writing guest, {arguments.bulk} MiB")
    for name, values in (("on its overlay", windows), ("suspended, each time", pauses)):
        table.add_row(name, f"{statistics.median(values) * 1000:.0f} ms", f"{max(values) * 1000:.0f} ms")
    Console().print(table)
    return 0 if statistics.median(windows) < TARGET_SECONDS else 1


def _rounds(libvirtd: Libvirtd, guest: Guest, directory: Path, rounds: int) -> list[_Watch]:
    hypervisor = Hypervisor(libvirtd.uri, config_dir=libvirtd.config_dir)
    request = Request(BackupSpec.parse({"nodeName": "bench", "domain": guest.name, "storeRef": {"name": "store"}}))
    store = open_store(StoreSpec.parse({"directory": {"path": str(directory / "store")}}))
    watches: list[_Watch] = []
    for _ in range(rounds):
        watch = _Watch()
        metrics = _SuspensionMetrics(watch)
        node = Node(hypervisor, directory / "state", metrics, lock_dir=directory / "locks")
        key = BackupId("bench", "window", str(uuid.uuid4()))
        Backup(node, key, request=lambda: request, open_store=lambda: store, reporter=watch).run()
        if watch.outcome is not Outcome.SUCCEEDED:
            raise RuntimeError(f"the backup did not succeed: {watch.last}")
        watches.append(watch)
    hypervisor.close()
    return watches


@dataclass
class _Watch:
    """A reporter with a stop-watch: from the first report with an overlay to the first without."""

    on_overlay: float = 0.0
    suspended: list[float] = field(default_factory=list[float])
    last: Report = field(default_factory=Report)
    _since: float | None = None

    @property
    def outcome(self) -> Outcome | None:
        return self.last.outcome

    def report(self, report: Report) -> None:
        now = time.monotonic()
        if report.chain_clean is False and self._since is None:
            self._since = now
        elif report.chain_clean and self._since is not None:
            self.on_overlay, self._since = now - self._since, None
        self.last = report

    def event(self, reason: str, message: str, *, warning: bool = False) -> None:
        return


class _SuspensionMetrics(Metrics):
    """Real metrics, with a stop-watch. pyright compares the methods with those of Metrics."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch
        self._at: float | None = None

    def suspended(self, domain: str, since: float, limit: float = 0.0) -> None:
        super().suspended(domain, since, limit)
        self._at = time.monotonic()

    def resumed(self, domain: str) -> None:
        super().resumed(domain)
        if self._at is not None:
            self._watch.suspended.append(time.monotonic() - self._at)
            self._at = None


def _on_xfs(arguments: argparse.Namespace) -> list[_Watch]:
    with tempfile.TemporaryDirectory(prefix="vmb-") as folder, Libvirtd(folder) as libvirtd:
        directory = Path(folder)
        image = directory / "xfs.img"
        with image.open("wb") as file:
            file.truncate(XFS_BYTES)
        storage.run("mkfs.xfs", "-q", str(image))
        with storage.mounted(directory / "xfs", "-o", "loop", str(image)) as xfs:
            size = arguments.bulk + 128
            disk = make_disk("vda", xfs / "vda.raw", size_mib=size, bulk_mib=arguments.bulk)
            guest = Guest(libvirtd.virsh, "bench", directory, [disk], dirty_kib_per_second=1024)
            guest.define()
            guest.start()
            guest.wait_for(5)
            try:
                return _rounds(libvirtd, guest, xfs, arguments.rounds)
            finally:
                guest.destroy()
