"""A full copy into a directory, digest included, against `cp --sparse=always` + fsync to the same place, cold cache."""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vmbackup.api.quantity import parse_quantity
from vmbackup.imaging import CopyControl
from vmbackup.imaging.copy import copy_file, digest_file

TARGET_RATIO = 1.1
CHUNK = 4 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=parse_quantity, default=4 << 30, help="bytes of data, default 4Gi")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, in turns")
    parser.add_argument("--source", type=Path, default=Path(tempfile.gettempdir()), help="folder to copy from")
    parser.add_argument("--target", type=Path, default=Path(tempfile.gettempdir()), help="folder to copy to")


def run(arguments: argparse.Namespace) -> int:
    contenders: dict[str, Callable[[Path, Path], None]] = {"cp + fsync": _cp, "vmbackup": _vmbackup}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with (
        tempfile.TemporaryDirectory(dir=arguments.source, prefix="bench-") as source_folder,
        tempfile.TemporaryDirectory(dir=arguments.target, prefix="bench-") as target_folder,
    ):
        source, target = Path(source_folder, "source.img"), Path(target_folder, "target.img")
        _write_data(source, arguments.size)
        digest = digest_file(source, CopyControl())
        for number in range(arguments.rounds):
            # In turns, and each first as often as the other: the disk's pace drifts.
            for name in list(contenders)[:: 1 if number % 2 == 0 else -1]:
                _cool_down()
                started = time.perf_counter()
                contenders[name](source, target)
                seconds[name].append(time.perf_counter() - started)
                if digest_file(target, CopyControl()) != digest:
                    raise SystemExit(f"{name}: the copy differs from its source")
                target.unlink()
    return _show(seconds, arguments.size)


def _cp(source: Path, target: Path) -> None:
    subprocess.run(["cp", "--sparse=always", "--reflink=never", source, target], check=True)
    subprocess.run(["sync", target], check=True)


def _vmbackup(source: Path, target: Path) -> None:
    copy_file(source, target, CopyControl())


def _write_data(path: Path, size: int) -> None:
    with path.open("wb") as file:
        for done in range(0, size, CHUNK):
            file.write(os.urandom(min(CHUNK, size - done)))
        os.fsync(file.fileno())


def _cool_down() -> None:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        raise SystemExit("cold runs need root: /proc/sys/vm/drop_caches cannot be written") from None


def _show(seconds: dict[str, list[float]], size: int) -> int:
    medians = {name: statistics.median(runs) for name, runs in seconds.items()}
    ratio = medians["vmbackup"] / medians["cp + fsync"]
    table = Table(title=f"{size / 2**30:g} GiB of data, cold cache, seconds ({os.cpu_count()} CPUs)")
    for column in ("", "median", "MiB/s", "runs"):
        table.add_column(column, justify="left" if column in ("", "runs") else "right")
    for name, median in medians.items():
        runs = " ".join(f"{run:.2f}" for run in seconds[name])
        table.add_row(name, f"{median:.2f}", f"{size / 2**20 / median:.0f}", runs)
    console = Console(width=max(80, shutil.get_terminal_size().columns))
    console.print(table)
    console.print(f"vmbackup takes {ratio:.2f} x cp; at most {TARGET_RATIO} is wanted")
    return 0 if ratio <= TARGET_RATIO else 1
