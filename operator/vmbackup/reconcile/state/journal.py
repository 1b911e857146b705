"""The write-ahead record on the node: one append-only file for each backup, its last whole line is the record.

A line is a checksum and the whole record as JSON, so a torn line is recognised and the one before it counts. What must
survive a power cut is written with `durable=True` (fdatasync). The rest survives the death of this process, which is
all it needs to: a power cut also ends every call in flight and every guest that we may have suspended or frozen.

Records of other versions are read as far as they go: fields that are unknown here are left out, those that are missing
have their defaults.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from vmbackup.errors import Cause, PermanentError
from vmbackup.paths import read_trusted
from vmbackup.protocol.record import Guard, Record

_SUFFIX = ".journal"
_NVRAM_SUFFIX = ".nvram"
_NVRAM_BYTES = 64 << 20  # the largest variable stores have 4 MiB
_NEW_SUFFIX = ".new"
_GARBLED_SUFFIX = ".garbled"
_COMPACT_BYTES = 1 << 20  # a journal that has grown by so much is replaced by its last line, where there is room
_LINES_AT_REST = 8


class Journal:
    """The record of one backup, and its file. `record` was written last, or is newer if the file cannot be written."""

    def __init__(self, path: Path, record: Record, length: int) -> None:
        """`record` is the last whole line of the first `length` bytes at `path`; what follows there is torn."""
        self.path = path
        self.record = record
        self._length = length
        self._compact_at = _COMPACT_BYTES
        self._fd: int | None = None
        self._given_up = False

    @classmethod
    def of(cls, directory: Path, uid: str) -> Journal | None:
        """Take up the journal of an earlier run; None if there is none, or no whole line in it (see `set_aside`).

        Nothing is written, so this needs no room. Raises PermanentError if it is of another version.
        """
        path = directory / f"{uid}{_SUFFIX}"
        last = _last_line(path)
        return None if last is None else cls(path, *last)

    @classmethod
    def start(cls, directory: Path, record: Record) -> Journal:
        """Start the journal of a new backup, replacing whatever it had; durable on return.

        Raises PermanentError where the state directory cannot be written.
        """
        path = directory / f"{record.uid}{_SUFFIX}"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            return cls(path, record, _replace(path, record))
        except OSError as error:
            raise _unwritable(path, error) from error

    def write(self, record: Record, *, durable: bool) -> None:
        """Append the record. Raises PermanentError where that fails: then nothing may be done that relies on it."""
        if self._given_up:
            self.record = record
            return
        try:
            self._append(record, durable=durable)
        except OSError as error:
            self.close()  # the next line is not glued to a torn one: the file is cut again when it is opened
            raise _unwritable(self.path, error) from error
        ends = record.finished and not self.record.finished
        self.record = record
        if (ends or self._has_grown()) and record.guard is not Guard.OURS:  # no guest waits for it
            self._compact()

    def _has_grown(self) -> bool:
        """Beyond what it may: a node keeps many of backups that are over, and reads them whole again and again."""
        at_rest = self.record.finished
        return self._length >= (_LINES_AT_REST * len(_line(self.record)) if at_rest else self._compact_at)

    def _append(self, record: Record, *, durable: bool) -> None:
        file = self._open()
        if file is None:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._length = _replace(self.path, record)
            return
        line = _line(record)
        if os.write(file, line) < len(line):  # that is how a file system says that it has just become full
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if durable:
            os.fdatasync(file)
        self._length += len(line)

    def _open(self) -> int | None:
        """The file, without an incomplete last line; None if somebody has removed or emptied it."""
        if self._fd is None:
            try:
                self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            if os.fstat(self._fd).st_size > self._length:
                os.ftruncate(self._fd, self._length)
        status = os.fstat(self._fd)
        if status.st_nlink > 0 and status.st_size >= self._length:
            return self._fd
        self.close()
        return None

    def _compact(self) -> None:
        """Replace the file by its last line; where there is no room for that, it goes on growing."""
        with suppress(OSError):
            self._length = _replace(self.path, self.record)
            self.close()
        self._compact_at = self._length + _COMPACT_BYTES

    def give_up(self, record: Record) -> None:
        """Keep the record only in memory from now on: a guest that we have suspended must not wait for a full disk."""
        self._given_up = True
        self.record = record

    def close(self) -> None:
        """Close the file; the next write opens it again."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def remove(self) -> None:
        """Remove the journal: the backup left nothing behind."""
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
                file.write(read_trusted(Path(self.record.nvram), _NVRAM_BYTES))
                file.flush()
                os.fsync(file.fileno())
        return str(kept)


def record_of(directory: Path, uid: str) -> Record | None:
    """The record of one backup, without taking it up; None if there is none, or no whole line in its journal.

    Raises PermanentError if it is of another version, or cannot be read.
    """
    last = _last_line(directory / f"{uid}{_SUFFIX}")
    return None if last is None else last[0]


def set_aside(directory: Path, uid: str) -> Path | None:
    """Rename an unreadable journal, so that it is not read as a journal again. Returns its new path.

    None if there is none. Raises PermanentError if it cannot be renamed.
    """
    path = directory / f"{uid}{_SUFFIX}"
    aside = path.with_name(f"{path.name}{_GARBLED_SUFFIX}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unwritable(path, error) from error
    return aside


def forget(directory: Path, uid: str) -> None:
    """Remove the journal of a backup that left nothing behind, if there is one."""
    for suffix in (_SUFFIX, _NVRAM_SUFFIX, _NEW_SUFFIX):
        (directory / f"{uid}{suffix}").unlink(missing_ok=True)


def records(directory: Path) -> Iterator[Record]:
    """The records of all journals of this node that can be read."""
    for path in sorted(directory.glob(f"*{_SUFFIX}")):
        try:
            last = _last_line(path)
        except PermanentError:
            continue
        if last is not None:
            yield last[0]


def _line(record: Record) -> bytes:
    text = msgspec.json.encode(record)
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _last_line(path: Path) -> tuple[Record, int] | None:
    """The record in the last whole line, and how many bytes there are up to its end; None: no such line."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        text = f"the journal {path} cannot be read ({error.strerror}): fix that, or choose another --state-dir"
        raise PermanentError(text, reason="JournalUnreadable") from error
    end = len(content)
    while (end := content.rfind(b"\n", 0, end)) >= 0:
        checksum, _, text = content[content.rfind(b"\n", 0, end) + 1 : end].partition(b" ")
        if text and checksum == b"%08x" % zlib.crc32(text):
            return _decoded(path, text), end + 1
    return None


def _decoded(path: Path, text: bytes) -> Record:
    try:
        return msgspec.json.decode(text, type=Record)
    except msgspec.DecodeError as error:
        raise PermanentError(
            f"the journal {path} is of another version ({error}): use the vmbackup that wrote it",
            reason=Cause.JOURNAL_VERSION,
        ) from error


def _replace(path: Path, record: Record) -> int:
    """Put a journal of one line there, durably: its length. Raises OSError, with nothing changed."""
    new = path.with_suffix(_NEW_SUFFIX)
    line = _line(record)
    try:
        with open(new, "wb", opener=_private) as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)
    return len(line)


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
    return PermanentError(text, reason=Cause.JOURNAL_UNWRITABLE)
