"""Copies and merges in the background when a file system hangs: one that is given up releases every image."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support.domains import wait_until
from tests.support.storage import run, sha256sum
from vmbackup.api.backup import BackupSpec, CopySpec
from vmbackup.api.status import Reason
from vmbackup.imaging import CopyControl
from vmbackup.imaging.copy import opened_image
from vmbackup.imaging.locks import is_locked
from vmbackup.imaging.merge import merge
from vmbackup.protocol.record import Copy, DiskRecord, Record, Snapshot
from vmbackup.protocol.terms import Do, Observation, Power
from vmbackup.reconcile.background import transfer
from vmbackup.reconcile.background.copying import Copying
from vmbackup.reconcile.background.merging import Merging
from vmbackup.reconcile.background.transfer import Transfer, at_work
from vmbackup.reconcile.observe import Observer
from vmbackup.reconcile.request import Request
from vmbackup.reconcile.steps.actions import STEPS, make_way
from vmbackup.reconcile.telling.summary import Progress, summarize
from vmbackup.stores.directory import store as directory
from vmbackup.stores.directory.store import DirectoryStore
from vmbackup.telemetry.metrics import Metrics


@pytest.fixture
def dead_store() -> Iterator[threading.Event]:
    """A store whose calls return once this is set."""
    answers = threading.Event()
    yield answers
    answers.set()


def test_a_cancelled_copy_that_hangs_in_its_store_releases_the_base(
    tmp_path: Path, dead_store: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_PATIENCE", 0.1)
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(4096))
    hangs = threading.Event()

    def copy(control: CopyControl) -> None:
        with opened_image(base) as fd, control.reading(fd):
            hangs.set()
            dead_store.wait()

    running = Transfer(copy, CopyControl(), lambda: None, "copy")
    assert hangs.wait(10)
    assert is_locked(base)
    running.cancel()
    assert not is_locked(base), "no commit could ever write the base"


@pytest.fixture
def disk(tmp_path: Path) -> DiskRecord:
    """A disk on its overlay, which holds a little."""
    base, overlay = tmp_path / "base.raw", tmp_path / "overlay.qcow2"
    base.write_bytes(b"\1" * (1 << 20))
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "raw", str(overlay))
    run("qemu-io", "-f", "qcow2", "-c", "write -P 2 0 64k", str(overlay))
    return DiskRecord("vda", base=str(base), overlay=str(overlay), format="raw", virtual_bytes=1 << 20)


def test_a_merge_that_hangs_when_it_is_given_up_releases_the_overlay_at_once_and_for_good(
    disk: DiskRecord, dead_store: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_PATIENCE", 0.1)
    hangs, fsync = threading.Event(), os.fsync

    def hanging(fd: int) -> None:
        if Path(f"/proc/self/fd/{fd}").readlink() == Path(disk.overlay):
            hangs.set()
            dead_store.wait()
        fsync(fd)

    monkeypatch.setattr(os, "fsync", hanging)
    merging = Merging(Observer(cast(Any, None), cast(Any, None)), lambda: None)
    assert merging.merge(disk, None) is None
    assert hangs.wait(20)
    assert is_locked(Path(disk.overlay))
    merging.let_go()
    assert not is_locked(Path(disk.overlay)), "the guest could not start"
    dead_store.set()
    wait_until(lambda: not at_work("merge-vda"), "it ends")
    assert not is_locked(Path(disk.overlay)), "the guest could not start until the agent ends"


def test_a_merged_overlay_of_which_nobody_knows_any_more_is_not_held(disk: DiskRecord) -> None:
    held = merge(Path(disk.overlay), Path(disk.base), "raw", None, CopyControl())
    assert is_locked(Path(disk.overlay))
    del held
    assert not is_locked(Path(disk.overlay))


@pytest.fixture
def copying() -> Iterator[Copying]:
    request = Request(BackupSpec.parse({"nodeName": "a", "domain": "web", "storeRef": {"name": "s"}}))
    copying = Copying(lambda: request, lambda: None, Metrics())
    yield copying
    copying.cancel()


@pytest.fixture
def slow_copying() -> Iterator[Copying]:
    spec = BackupSpec("a", "web", "s", copy=CopySpec(bandwidth=1024))  # slower than anybody may ask for
    copying = Copying(lambda: Request(spec), lambda: None, Metrics())
    yield copying
    copying.cancel()


def record_of(disk: DiskRecord) -> Record:
    return Record("6f0b1f9e", "tenant", "web", "web", "11111111-2222", disks=(disk,), snapshot_time=1.0)


def copied(copying: Copying, record: Record, store: DirectoryStore) -> Callable[[], bool]:
    def done() -> bool:
        found = copying.copy(record, lambda: store)
        return found is not None and found.copy is Copy.STORED

    return done


def test_after_a_copy_that_hangs_in_its_store_none_begins_before_that_one_has_ended(
    disk: DiskRecord, copying: Copying, dead_store: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_PATIENCE", 0.1)
    hangs, fsync_folder = threading.Event(), directory.fsync_folder

    def hanging(folder: Path) -> None:
        hangs.set()
        dead_store.wait()
        fsync_folder(folder)

    monkeypatch.setattr(directory, "fsync_folder", hanging)
    store, record = DirectoryStore(tmp_path / "store"), record_of(disk)
    assert copying.copy(record, lambda: store) is None
    assert hangs.wait(20)
    copying.cancel()
    notes = tmp_path / "store" / "tenant" / ".web.6f0b1f9e.taken.json"
    before = notes.read_bytes()
    assert copying.copy(record, lambda: store) is None
    assert copying.stuck
    told = summarize(replace(record, snapshot=Snapshot.DONE), None, None, Progress({}, {}, stuck=copying.stuck))
    assert (told.reason, "still blocked in the store" in told.message) == (Reason.COPYING, True)
    assert [thread.name for thread in threading.enumerate()].count("copy-6f0b1f9e") == 1

    dead_store.set()
    wait_until(lambda: not at_work("copy-6f0b1f9e"), "the first one ends")
    assert notes.read_bytes() == before, "what was given up is noted as taken"
    wait_until(copied(copying, record, store), "copied")
    assert not copying.stuck
    image = tmp_path / "store" / "tenant" / "web.6f0b1f9e" / "vda.raw"
    assert sha256sum(image) == sha256sum(Path(disk.base))


BESIDE_A_COPY = (
    Do.COPY, Do.WAIT, Do.THAW, Do.UNTHROTTLE, Do.RESUME, Do.CLEAR_GUARD, Do.REDEFINE, Do.SYNC_CONFIG
)  # fmt: skip


@pytest.mark.parametrize(("do", "goes_on"), [(do, do in BESIDE_A_COPY) for do in (*BESIDE_A_COPY, Do.COMMIT)])
def test_a_copy_goes_on_beside_steps_that_do_not_touch_images(
    disk: DiskRecord, slow_copying: Copying, tmp_path: Path, do: Do, goes_on: bool
) -> None:
    record, store = record_of(disk), DirectoryStore(tmp_path / "store")
    wait_until(lambda: slow_copying.copy(record, lambda: store) is None and is_locked(Path(disk.base)), "copying")
    run = SimpleNamespace(copying=slow_copying)
    make_way(cast(Any, run), STEPS[do], Observation(Power.RUNNING, (), call_in_flight=True))
    assert at_work("copy-6f0b1f9e") is goes_on
    assert is_locked(Path(disk.base)) is goes_on
