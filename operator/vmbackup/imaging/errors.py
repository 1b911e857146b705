"""Errors of the operating system as the kinds of vmbackup.errors, with their cure."""

from __future__ import annotations

import errno
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from vmbackup.errors import Cause, PermanentError, TransientError, VMBackupError
from vmbackup.paths import name_of

_NO_SPACE = "free space there, or choose another store"
_MEDIUM = "the medium or its connection is failing: see the kernel's log"
_ACCESS = "let the agent's user read and write there"
_CURES = {
    errno.ENOSPC: ("NoSpace", _NO_SPACE),
    errno.EDQUOT: ("NoSpace", f"raise the quota; {_NO_SPACE}"),
    errno.EFBIG: ("FileTooBig", "use a file system that takes files of this size"),
    errno.EROFS: ("ReadOnly", "mount the file system writable"),
    errno.EACCES: ("NoAccess", _ACCESS),
    errno.EPERM: ("NoAccess", _ACCESS),
    errno.EIO: ("IOError", _MEDIUM),
    errno.ENOENT: ("NotFound", "put it back, or correct the path"),
    errno.ELOOP: ("SymbolicLink", "replace the symbolic link by what it points to, or let root own it"),
    errno.EMLINK: ("HardLink", "it is a hard link, so another user may write to it: remove its other names"),
}
_TRANSIENT = frozenset(
    (
        errno.EAGAIN,
        errno.EBUSY,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EHOSTDOWN,
    )
)


def classified(error: OSError, path: Path | str) -> VMBackupError:
    """`error` as one of our kinds, naming the file and the cure."""
    number = error.errno or 0
    text = f"{name_of(path)}: {os.strerror(number) if number else error}"
    if number in _TRANSIENT:
        return TransientError(f"{text}; it will be tried again", reason=Cause.BUSY)
    reason, cure = _CURES.get(number, ("StorageError", "see the system's log"))
    return PermanentError(f"{text}: {cure}", reason=reason)


@contextmanager
def errors_of(path: Path | str) -> Generator[None]:
    """Turn an OSError of the block into one of our kinds, naming `path`."""
    try:
        yield
    except OSError as error:
        raise classified(error, path) from error
