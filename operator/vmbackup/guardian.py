"""A process that outlives `vmbackup agent` and `vmbackup run`. If its starter dies, it resumes guests left suspended.

    python -m vmbackup.guardian LIBVIRT-URI LIBVIRT-CONFIG-DIR STATE-DIR LOCK-DIR

It waits for the end of the pipe on its standard input, which means that the starter has died (one that ends normally
kills it first). Then reconcile/rescue.py resumes and thaws the guests that it left, by the usual decisions. All modules
are imported before the wait, so that a suspended guest does not wait for imports or a disk that may have failed, and no
version that was installed meanwhile is mixed in.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from vmbackup.hypervisor.hypervisor import Hypervisor
from vmbackup.output import StderrLog
from vmbackup.reconcile.node import Node
from vmbackup.reconcile.rescue import release_guests
from vmbackup.telemetry.metrics import Metrics

_HASTE = -10  # nice value: a guest is suspended, and an overloaded machine may have killed the starter
_NAME = b"vmb-guardian"  # what ps and top show; at most 15 bytes


def main() -> None:
    """Wait for the end of the starter, then resume its guests."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for the starter
        signal.signal(number, signal.SIG_IGN)
    os.chdir("/")
    name = os.open("/proc/self/comm", os.O_WRONLY)
    os.write(name, _NAME)
    os.close(name)
    os.read(0, 1)  # blocks until the agent dies: nothing is ever written
    with suppress(OSError):  # it may not be allowed to
        os.setpriority(os.PRIO_PROCESS, 0, _HASTE)
    _let_guests_run(*sys.argv[1:])


def _let_guests_run(uri: str, config_dir: str, state_dir: str, lock_dir: str) -> None:
    form = "%(asctime)s %(levelname)s guardian: %(message)s"
    logging.basicConfig(level=logging.WARNING, format=form, handlers=[StderrLog()])
    hypervisor = Hypervisor(uri, config_dir=Path(config_dir))
    try:
        release_guests(Node(hypervisor, Path(state_dir), Metrics(), lock_dir=Path(lock_dir)))
    finally:
        hypervisor.close()


if __name__ == "__main__":
    main()
