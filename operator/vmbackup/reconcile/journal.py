"""The write-ahead record on the node: one append-only file for each backup, its last whole line is the record.

A line is a checksum and the whole record as JSON, so a torn line is recognised and the one before it counts. What must
survive a power cut is written with `durable=True` (fdatasync). The rest survives the death of this process, which is
all it needs to: a power cut also ends every call in flight and every guest that we may have suspended or frozen.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from vmbackup.errors import PermanentError
from vmbackup.reconcile.record import Record

_SUFFIX = ".journal"
_NVRAM_SUFFIX = ".nvram"


class Journal:
    """The record of one backup, and its file. `record` is what was written last, or what is known in spite of it."""

    def __init__(self, path: Path, record: Record) -> None:
        """Start the journal of `record`, replacing whatever is at `path`; durable on return.

        Raises PermanentError where the state directory cannot be written.
        """
        self.path = path
        self.record = record
        self._given_up = False
        new = path.with_suffix(".new")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(new, "wb", opener=_private) as file:
                file.write(_line(record))
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
            sync_directory(path.parent)
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            self._length = os.fstat(self._fd).st_size
        except OSError as error:
            raise _unwritable(path, error) from error

    @classmethod
    def of(cls, directory: Path, uid: str) -> Journal | None:
        """Take up the journal of an earlier run; None if there is none. Raises PermanentError if it is garbled."""
        path = directory / f"{uid}{_SUFFIX}"
        record = _last_record(path)
        return None if record is None else cls(path, record)

    @classmethod
    def start(cls, directory: Path, record: Record) -> Journal:
        """Start the journal of a new backup."""
        return cls(directory / f"{record.uid}{_SUFFIX}", record)

    def write(self, record: Record, *, durable: bool) -> None:
        """Append the record. Raises PermanentError where that fails: then nothing may be done that relies on it."""
        if self._given_up:
            self.record = record
            return
        line = _line(record)
        try:
            if os.write(self._fd, line) < len(line):  # that is how a file system says that it has just become full
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if durable:
                os.fdatasync(self._fd)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._fd, self._length)  # the next line must not be glued to a torn one
            raise _unwritable(self.path, error) from error
        self._length += len(line)
        self.record = record

    def give_up(self, record: Record) -> None:
        """From now on only remember: the guest is suspended by us, and must not wait for a disk that is full."""
        self._given_up = True
        self.record = record

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._fd)

    def remove(self) -> None:
        """The backup left nothing behind: forget it."""
        forget(self.path.parent, self.record.uid)

    def keep_nvram(self) -> str:
        """Keep the guest's UEFI variables as they are now beside the journal, durably: where; empty if it has none.

        Raises OSError.
        """
        if not self.record.nvram:
            return ""
        kept = self.path.with_suffix(_NVRAM_SUFFIX)
        if kept != Path(self.record.nvram):  # else they are kept already
            with open(kept, "wb", opener=_private) as file:
                file.write(Path(self.record.nvram).read_bytes())
                file.flush()
                os.fsync(file.fileno())
        return str(kept)


def record_of(directory: Path, uid: str) -> Record | None:
    """The record of one backup, without taking it up; None if there is none. Raises PermanentError if garbled."""
    return _last_record(directory / f"{uid}{_SUFFIX}")


def forget(directory: Path, uid: str) -> None:
    """Remove the journal of a backup that left nothing behind, if there is one."""
    for suffix in (_SUFFIX, _NVRAM_SUFFIX):
        (directory / f"{uid}{suffix}").unlink(missing_ok=True)


def records(directory: Path) -> Iterator[Record]:
    """The records of all journals of this node that can be read."""
    for path in sorted(directory.glob(f"*{_SUFFIX}")):
        try:
            record = _last_record(path)
        except PermanentError:
            continue
        if record is not None:
            yield record


def _line(record: Record) -> bytes:
    text = msgspec.json.encode(record)
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _last_record(path: Path) -> Record | None:
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unwritable(path, error) from error
    for line in reversed(lines):
        checksum, _, text = line.partition(b" ")
        if checksum == b"%08x" % zlib.crc32(text):
            try:
                return msgspec.json.decode(text, type=Record)
            except msgspec.DecodeError as error:
                raise PermanentError(
                    f"the journal {path} is of another version ({error}): use the vmbackup that wrote it",
                    reason="JournalGarbled",
                ) from error
    raise PermanentError(
        f"the journal {path} has no whole line: look whether the domain is on an overlay (virsh domblklist), "
        "then move the file away",
        reason="JournalGarbled",
    )


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)  # it holds the domain's XML, which may hold passwords


def sync_directory(path: Path) -> None:
    """Make the entries of a directory durable. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _unwritable(path: Path, error: OSError) -> PermanentError:
    text = f"the journal {path} cannot be written ({error.strerror}): free space there, or choose another --state-dir"
    return PermanentError(text, reason="JournalUnwritable")
