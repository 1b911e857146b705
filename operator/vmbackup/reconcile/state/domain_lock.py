"""One writer for each domain on a node: an agent, a second agent started by mistake, or `vmbackup run`."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from vmbackup.errors import PermanentError

# Independent of --state-dir: otherwise two agents would not see each other.
DIRECTORY = Path("/run/vmbackup")


@contextmanager
def domain_lock(domain_uuid: str, wait: Callable[[], bool], directory: Path = DIRECTORY) -> Generator[bool]:
    """Hold the domain's lock. While another holds it, `wait` is called again and again, and waits a while.

    Yields whether the lock is held: False when `wait` returned False. The lock ends with the process; an orderly
    end removes its file. Raises PermanentError if the directory cannot be written.
    """
    path = directory / f"{domain_uuid}.lock"
    fd = _acquire(path)
    while fd is None and wait():
        fd = _acquire(path)
    try:
        yield fd is not None
    finally:
        if fd is not None:
            path.unlink(missing_ok=True)
            os.close(fd)


def is_locked(name: str, directory: Path = DIRECTORY) -> bool:
    """Whether a process, this one included, holds this lock now. Raises as `domain_lock` does."""
    with domain_lock(name, lambda: False, directory) as held:
        return not held


def _acquire(path: Path) -> int | None:
    """The open and locked file, or None while another process has it."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        text = f"{path.parent} cannot be written ({error.strerror}): it holds the lock of each domain"
        raise PermanentError(text, reason="LockUnwritable") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), path.stat()):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(fd)  # held by another, or the file of one that has just ended
    return None
