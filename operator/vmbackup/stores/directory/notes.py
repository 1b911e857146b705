"""Notes beside the partial folder: the disks that were taken and not published yet, for an agent that restarts."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vmbackup.errors import PermanentError
from vmbackup.imaging.errors import errors_of
from vmbackup.paths import name_of
from vmbackup.stores.base import TakenDisk, TakenImage
from vmbackup.stores.directory.files import fsync_folder, read_file, write_private
from vmbackup.stores.manifest import FILE


def read(path: Path) -> tuple[TakenDisk, ...]:
    """The disks taken; none if there is no file. Raises PermanentError if the notes are damaged."""
    if not os.path.lexists(path):
        return ()
    try:
        return tuple(
            TakenDisk(disk["target"], disk["virtual_bytes"], tuple(_image(**image) for image in disk["images"]))
            for disk in json.loads(read_file(path))
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PermanentError(
            f"{name_of(path)} is damaged ({error}): delete it; the disks are then copied again"
        ) from error


def _image(**values: Any) -> TakenImage:
    image = TakenImage(**values)
    if not FILE.fullmatch(image.file):
        raise ValueError(f"{image.file!r} is no file of this folder")
    return image


def write(path: Path, taken: Sequence[TakenDisk]) -> None:
    """Replace the notes, durably."""
    write_private(path, json.dumps([asdict(disk) for disk in taken]).encode())
    with errors_of(path):
        fsync_folder(path.parent)
