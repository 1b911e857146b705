"""One writer for each domain on a node, whoever it is: an agent, another agent by mistake, `vmbackup run`."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from vmbackup.errors import PermanentError

# The same place whatever --state-dir says, or two agents would not see each other.
DIRECTORY = Path("/run/vmbackup")


@contextmanager
def domain_lock(domain_uuid: str, wait: Callable[[], bool], directory: Path = DIRECTORY) -> Generator[bool]:
    """Hold the domain's lock. While another holds it, `wait` is called again and again, and waits a while.

    Yields whether the lock is held: False when `wait` said so by returning False. It goes with the process.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(directory / f"{domain_uuid}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        text = f"{directory} cannot be written ({error.strerror}): it holds the lock of each domain"
        raise PermanentError(text, reason="LockUnwritable") from error
    try:
        held = _try(fd)
        while not held and wait():
            held = _try(fd)
        yield held
    finally:
        os.close(fd)


def _try(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
