"""Folders and small files of a directory store: private, durable, never through symbolic links."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from vmbackup.errors import PermanentError
from vmbackup.imaging.errors import classified, errors_of
from vmbackup.paths import held, name_of, open_plain

FOLDER_MODE = 0o700  # only the administrator may read guests' disks
FILE_MODE = 0o600


@contextmanager
def opened_folder(root: Path, *names: str, make: bool = False) -> Generator[Path]:
    """As paths.held. `make` creates missing folders, only for the administrator. Errors of opening are ours."""
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(held(root, *names, make_mode=FOLDER_MODE if make else None))
        except NotADirectoryError as error:
            path = name_of(root.joinpath(*names))
            raise PermanentError(
                f"{path} is a symbolic link or not a folder: move it away", reason="NotAFolder"
            ) from error
        except OSError as error:
            raise classified(error, root.joinpath(*names)) from error
        yield folder


def fsync_folder(path: Path) -> None:
    """Make the entries of a folder durable. Raises OSError."""
    _fsync(path, os.O_DIRECTORY)  # a path of `held` is a link of /proc


def fsync_file(path: Path) -> None:
    """Make the content of a file durable. Raises OSError."""
    _fsync(path, os.O_NOFOLLOW)


def _fsync(path: Path, flags: int) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_private(path: Path, content: bytes) -> None:
    """Write a small file in one step, durable but for its directory entry: the old content or the new one."""
    new = path.with_name(f"{path.name}.new")
    with errors_of(path):
        new.unlink(missing_ok=True)
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(fd)
        new.rename(path)


def read_file(path: Path) -> bytes:
    """The content of a small file, never through a symbolic link. Errors are ours, naming the file."""
    with errors_of(path), os.fdopen(open_plain(path), "rb") as file:
        return file.read()
