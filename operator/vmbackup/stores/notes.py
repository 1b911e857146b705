"""What was taken and not published yet, noted beside the partial folder for an agent that restarts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from vmbackup.errors import PermanentError
from vmbackup.imaging.errors import errors_of
from vmbackup.stores.base import TakenDisk, TakenImage
from vmbackup.stores.files import fsync_folder, read_file, write_private


def read(path: Path) -> tuple[TakenDisk, ...]:
    """The disks taken, none if there is no file. Raises PermanentError if it is not as `write` leaves it."""
    if not path.exists():
        return ()
    try:
        return tuple(
            TakenDisk(disk["target"], disk["virtual_bytes"], tuple(TakenImage(**image) for image in disk["images"]))
            for disk in json.loads(read_file(path))
        )
    except (ValueError, KeyError, TypeError) as error:
        raise PermanentError(f"{path} is damaged ({error}): delete it; the disks are then copied again") from error


def write(path: Path, taken: Sequence[TakenDisk]) -> None:
    """Replace the notes, durably."""
    write_private(path, json.dumps([asdict(disk) for disk in taken]).encode())
    with errors_of(path):
        fsync_folder(path.parent)
