"""Builds and fetches ahead of time what would else be built when it is first used, so that its progress can be seen."""

from __future__ import annotations

import sys

from sandbox import binaries
from sandbox.guest_os import guest_os
from sandbox.processes import SandboxError


def main() -> None:
    try:
        for program in ("etcd", "kube-apiserver", "kubectl"):
            binaries.path(program)
        guest_os()
    except SandboxError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
