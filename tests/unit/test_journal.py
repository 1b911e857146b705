"""The journal on the node: its last whole line counts, whatever became of the file, the disk or the version."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.storage import mounted
from vmbackup.errors import PermanentError
from vmbackup.protocol.record import Copy, DiskRecord, Guard, Record, Snapshot
from vmbackup.reconcile.state.journal import Journal, forget, record_of, records, set_aside

UID = "0f4a3e5c"
RECORD = Record(UID, "default", "web", disks=(DiskRecord("vda", base="/images/web.raw"),))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / f"{UID}.journal"


@pytest.fixture
def written(path: Path) -> Path:
    """A journal of two lines."""
    journal = Journal.start(path.parent, RECORD)
    journal.write(replace(RECORD, snapshot=Snapshot.INTENDED), durable=True)
    journal.close()
    return path


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A state directory on a file system without any room, which holds a journal."""
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=64k", "tmpfs") as root:
        Journal.start(root, replace(RECORD, domain_xml="x" * 4096 * 3)).close()
        with suppress(OSError), (root / "other").open("wb", buffering=0) as other:
            while other.write(bytes(4096)):
                pass
        yield root


def taken_up(path: Path) -> Journal:
    journal = Journal.of(path.parent, UID)
    assert journal is not None
    return journal


@pytest.mark.parametrize(
    "torn", [b"1", b"00000000 {", b"\0" * 5000, os.urandom(700), b"garbage\n", b"00000000 \n", b"\n\n"]
)
def test_what_is_torn_at_its_end_is_cut_off_and_the_line_before_it_counts(written: Path, torn: bytes) -> None:
    whole = written.read_bytes()
    written.write_bytes(whole + torn)
    journal = taken_up(written)
    assert journal.record.snapshot is Snapshot.INTENDED
    journal.write(replace(RECORD, snapshot=Snapshot.DONE), durable=False)
    journal.close()
    assert written.read_bytes().startswith(whole)
    assert record_of(written.parent, UID) == replace(RECORD, snapshot=Snapshot.DONE)


def test_a_last_line_that_was_cut_does_not_count(written: Path) -> None:
    written.write_bytes(written.read_bytes()[:-1])
    assert taken_up(written).record.snapshot is Snapshot.NONE


@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"garbage", os.urandom(4096), b"\n"])
def test_a_journal_without_a_whole_line_is_set_aside_and_another_takes_its_place(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert Journal.of(path.parent, UID) is None
    assert record_of(path.parent, UID) is None
    assert not list(records(path.parent))
    aside = set_aside(path.parent, UID)
    assert aside is not None
    assert aside.read_bytes() == content
    assert set_aside(path.parent, UID) is None
    Journal.start(path.parent, RECORD).close()
    assert list(records(path.parent)) == [RECORD]


def test_it_is_taken_up_where_there_is_no_room_at_all(full: Path) -> None:
    path = full / f"{UID}.journal"
    before = path.read_bytes()
    journal = taken_up(path)
    for _ in range(3):
        with pytest.raises(PermanentError, match=r"No space left on device.*free space there"):
            journal.write(replace(journal.record, location="y" * 4096), durable=False)
    assert path.read_bytes().startswith(before)
    assert taken_up(path).record.domain_xml
    assert not taken_up(path).record.location
    (full / "other").unlink()
    journal.write(replace(journal.record, location="here"), durable=True)
    assert taken_up(path).record.location == "here"


@pytest.mark.parametrize("guard", [Guard.NONE, Guard.OURS])
def test_a_long_one_is_cut_to_its_last_line_but_never_while_a_guest_waits(written: Path, guard: Guard) -> None:
    long = replace(RECORD, domain_xml="x" * 100_000)
    journal = taken_up(written)
    sizes: list[int] = []
    for number in range(60):
        journal.write(replace(long, guard=guard, location=str(number)), durable=False)
        sizes.append(written.stat().st_size)
        assert taken_up(written).record.location == str(number)
    assert (max(sizes) < 1_300_000) is (guard is Guard.NONE)
    journal.write(replace(long, location="the end"), durable=False)
    assert written.stat().st_size < 1_300_000
    assert taken_up(written).record.location == "the end"
    assert [each.name for each in written.parent.iterdir()] == [written.name]


def test_of_a_backup_that_is_over_one_line_is_left_however_long_it_took(written: Path) -> None:
    journal = taken_up(written)
    for number in range(60):
        journal.write(replace(RECORD, location=str(number)), durable=False)
    over = replace(RECORD, finished=True)
    journal.write(over, durable=True)
    assert written.read_bytes().count(b"\n") == 1
    journal.close()
    for _ in range(60):  # a restarted agent continues each of them
        again = taken_up(written)
        again.write(over, durable=False)
        again.close()
        assert written.read_bytes().count(b"\n") <= 8
    assert taken_up(written).record == over


@pytest.mark.parametrize("how", ["removed", "emptied", "removed with its directory"])
def test_one_that_somebody_removes_is_written_again(tmp_path: Path, how: str) -> None:
    directory = tmp_path / "state"
    journal = Journal.start(directory, RECORD)
    journal.write(RECORD, durable=True)
    if how == "emptied":
        os.truncate(journal.path, 0)
    else:
        journal.path.unlink()
    if how == "removed with its directory":
        directory.rmdir()
    for snapshot in (Snapshot.INTENDED, Snapshot.DONE):
        journal.write(replace(RECORD, snapshot=snapshot), durable=False)
        assert record_of(directory, UID) == replace(RECORD, snapshot=snapshot)


def line(record: dict[str, object]) -> bytes:
    text = json.dumps(record).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def test_the_record_of_a_newer_version_is_read_without_what_is_unknown(path: Path) -> None:
    disk = {"target": "vda", "overlay": "/images/o", "of_the_future": 1}
    path.write_bytes(line({"uid": UID, "namespace": "n", "name": "m", "disks": [disk], "guard": "ours", "new": [1]}))
    expected = Record(UID, "n", "m", disks=(DiskRecord("vda", overlay="/images/o"),), guard=Guard.OURS)
    assert taken_up(path).record == expected


def test_what_the_record_of_an_older_version_lacks_has_its_default(path: Path) -> None:
    path.write_bytes(line({"uid": UID, "namespace": "n", "name": "m"}))
    assert taken_up(path).record == Record(UID, "n", "m", copy=Copy.OPEN)


def test_one_that_cannot_be_read_for_its_version_is_neither_dropped_nor_read_from_an_earlier_line(
    written: Path,
) -> None:
    with written.open("ab") as file:
        file.write(line({"uid": UID, "namespace": "n", "name": "m", "snapshot": "of-the-future"}))
    content = written.read_bytes()
    for read in (Journal.of, record_of):
        with pytest.raises(PermanentError, match=r"another version.*use the vmbackup that wrote it"):
            read(written.parent, UID)
    assert written.read_bytes() == content


def test_nothing_of_a_forgotten_one_is_left(written: Path) -> None:
    written.with_suffix(".new").touch()  # as a power cut can leave it
    forget(written.parent, UID)
    assert not list(written.parent.iterdir())
