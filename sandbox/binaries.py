"""Where the programs of the sandbox come from.

In this order: KUBEBUILDER_ASSETS (what setup-envtest leaves behind), PATH, our cache; and, for those that can be had
no other way, PyPI (`sandbox.tools`) or a build from pinned Go modules (`sandbox.go`) into that cache.
"""

from __future__ import annotations

import os
import shutil
from functools import cache
from pathlib import Path

from sandbox import go, tools
from sandbox.processes import SandboxError


@cache
def path(name: str) -> str:
    """The full path of a program. Installs or builds it when that is ours to do. Raises SandboxError."""
    found = find(name)
    if found:
        return found
    if name in go.PROGRAMS:
        return str(go.build(name))
    if name == "kubectl":
        tools.install()
        return str(tools.BIN / name)
    raise SandboxError(f"{name} is not installed: `make install` installs what the sandbox needs")


def find(name: str) -> str | None:
    """The full path of a program if it is there already, else None."""
    assets = Path(os.environ.get("KUBEBUILDER_ASSETS", "/nonexistent")) / name
    if os.access(assets, os.X_OK):
        return str(assets)
    if on_path := shutil.which(name):
        return on_path
    cached = go.path(name) if name in go.PROGRAMS else tools.BIN / name
    return str(cached) if os.access(cached, os.X_OK) else None
