"""What 0.1.0 has written is read as before: journals, stored backups, an unfinished one, and the mark of a domain."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.support.images import MIB
from tests.support.storage import run
from vmbackup.api.identity import BackupId
from vmbackup.hypervisor.mark import Mark, MarkedDisk
from vmbackup.imaging import CopyControl
from vmbackup.reconcile.state.journal import Journal, record_of, records
from vmbackup.stores.base import DiskSource, GuestFacts, SourceImage, StoredBackup
from vmbackup.stores.directory.store import DirectoryStore

DATA = Path(__file__).parent.parent / "data" / "0.1.0"
MADE_IN = "/tmp/vmbackup-0.1.0"
RECORDS: dict[str, dict[str, Any]] = json.loads((DATA / "records.json").read_text())
WHOLE = BackupId("default", "nightly", "0f4a3e5c-whole")
UNFINISHED = BackupId("default", "nightly", "0f4a3e5c-unfinished")
FACTS = GuestFacts("web-01", "11111111-2222-3333-4444-555555555555", "<domain/>", None, 1_790_000_000.0)
CONTROL = CopyControl()


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Store and images at a place of their own, which the notes of the unfinished backup name."""
    shutil.copytree(DATA, tmp_path, dirs_exist_ok=True)
    for notes in (tmp_path / "store" / "default").glob(".*.json"):
        notes.write_text(notes.read_text().replace(MADE_IN, str(tmp_path)))
    return tmp_path


@pytest.fixture
def store(world: Path) -> DirectoryStore:
    return DirectoryStore(world / "store")


def found_in(new: Any, old: Any) -> Any:
    """As much of a record as 0.1.0 knows, as JSON."""
    if isinstance(old, dict):
        return {name: found_in(new[name], value) for name, value in old.items()}
    if isinstance(old, list) and len(new) == len(old):
        return [found_in(*pair) for pair in zip(new, old, strict=True)]
    return new


@pytest.mark.parametrize("uid", RECORDS)
def test_every_journal_has_the_record_that_was_written(world: Path, uid: str) -> None:
    record = record_of(world / "journals", uid)
    assert record is not None
    read = json.loads(json.dumps(asdict(record)))
    assert found_in(read, RECORDS[uid]) == RECORDS[uid]


def test_no_journal_is_passed_over() -> None:
    assert {record.uid for record in records(DATA / "journals")} == RECORDS.keys()


@pytest.mark.parametrize("uid", RECORDS)
def test_every_journal_is_carried_on(world: Path, uid: str) -> None:
    journal = Journal.of(world / "journals", uid)
    assert journal is not None
    journal.write(journal.record, durable=True)
    journal.close()
    assert record_of(world / "journals", uid) == journal.record


def test_the_published_backup_is_listed_and_its_images_are_as_they_were(store: DirectoryStore) -> None:
    (backup,) = store.list()
    assert isinstance(backup, StoredBackup)
    assert backup == store.open(backup.location, WHOLE.uid)
    assert store.published(WHOLE) == backup.location
    manifest = backup.manifest
    assert {disk.target: disk.virtual_bytes for disk in manifest.disks} == {"vda": 16384, "vdb": 16384, "vdc": 4608}
    for image in (*manifest.disks, *manifest.images):
        store.verify(backup, image.file, CONTROL)
    assert manifest.nvram is not None
    assert store.read(backup, manifest.nvram) == b"variables"


def test_the_published_backup_is_restored(store: DirectoryStore, world: Path, tmp_path: Path) -> None:
    (backup,) = store.list()
    assert isinstance(backup, StoredBackup)
    (tmp_path / "restored").mkdir()
    for image in (*backup.manifest.disks, *backup.manifest.images):
        store.fetch(backup, image.file, tmp_path / "restored" / image.file, CONTROL)
    for disk in backup.manifest.disks:
        run("qemu-img", "compare", f"{tmp_path}/restored/{disk.file}", f"{world}/guest/{disk.file}")


def test_publishing_it_again_returns_it_and_deleting_removes_it(store: DirectoryStore) -> None:
    published = store.publish(WHOLE, (), FACTS, CONTROL)
    assert published.digests.keys() == {"vda", "vdb", "vdc"}
    store.delete(published.location, WHOLE.uid)
    assert store.list() == ()


def test_the_unfinished_backup_is_carried_on(store: DirectoryStore, world: Path) -> None:
    assert [disk.target for disk in store.taken(UNFINISHED)] == ["vda", "vdc"]
    guest = world / "guest"
    chain = (SourceImage(str(guest / "vdb.qcow2"), "qcow2"), SourceImage(str(guest / "template.raw"), "raw"))
    store.take(UNFINISHED, DiskSource("vdb", chain, 16384), CONTROL)
    published = store.publish(UNFINISHED, store.taken(UNFINISHED), FACTS, CONTROL)
    folder = Path(published.location)
    assert [path.name for path in sorted(folder.glob("*backing*"))] == ["backing-1.raw"]
    for file in ("vda.qcow2", "vdb.qcow2", "vdc.raw"):
        run("qemu-img", "compare", f"{folder}/{file}", f"{guest}/{file}")
    assert sum(path.stat().st_size for path in folder.iterdir()) < MIB


def test_the_unfinished_backup_is_discarded(store: DirectoryStore, world: Path) -> None:
    store.discard(UNFINISHED)
    assert [path.name for path in (world / "store" / "default").iterdir()] == ["nightly.0f4a3e5c-whole"]


def test_the_mark_of_a_domain_is_understood() -> None:
    disks = (MarkedDisk("vda", "/images/a & b.qcow2", pivoting=True), MarkedDisk("vdb", "/images/vdb.qcow2"))
    assert Mark.of((DATA / "marked.xml").read_text()) == Mark("0f4a3e5c", frozen=True, disks=disks)
