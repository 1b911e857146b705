"""Builds and fetches ahead of time what would else be built when it is first used, so that its progress can be seen.

python -m sandbox.prepare          what `make demo` needs
python -m sandbox.prepare tests    and what only tests need
"""

from __future__ import annotations

import sys

from sandbox import binaries, go
from sandbox.guest_os import guest_os
from sandbox.processes import SandboxError


def main() -> None:
    try:
        for program in ("etcd", "kube-apiserver", "kubectl", *(go.PROGRAMS if sys.argv[1:] == ["tests"] else ())):
            binaries.path(program)
        guest_os()
    except SandboxError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
