"""Builds and fetches in advance, showing progress, what would otherwise be built on first use.

python -m sandbox.prepare          what `make demo` needs
python -m sandbox.prepare tests    and what `make test` needs
python -m sandbox.prepare chaos    and what `make chaos` needs
python -m sandbox.prepare node     and what `make e2e` needs
python -m sandbox.prepare engines  and what `make engines` needs
"""

from __future__ import annotations

import sys

from sandbox import binaries, go, image
from sandbox.guest_os import guest_os
from sandbox.processes import SandboxError

_MORE = {
    "tests": [name for name in go.PROGRAMS if name not in go.NODE + go.CHAOS],
    "chaos": go.CHAOS,
    "node": go.NODE,
    "engines": (),
}


def main() -> None:
    try:
        more = [program for world in sys.argv[1:] for program in _MORE[world]]
        for program in ("etcd", "kube-apiserver", "kubectl", *more):
            binaries.path(program)
        guest_os()
        if sys.argv[1:]:
            image.archive()
    except SandboxError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
