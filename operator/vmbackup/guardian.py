"""The process that outlives `vmbackup agent` and `vmbackup run`: should its starter die, it lets suspended guests run.

    python -m vmbackup.guardian LIBVIRT-URI LIBVIRT-CONFIG-DIR STATE-DIR LOCK-DIR

It waits for the end of the pipe that is its standard input. Then the starter is dead, however it died (one that ends in
good order kills it before), and what it left suspended or frozen runs again by the same decisions as ever
(reconcile/rescue.py). All that this takes is imported before it waits: a guest that stands still need not wait for it,
nor for a disk that may have failed, nor for a version that was installed meanwhile.
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

_HASTE = -10  # nice value: a guest stands still, and what killed the starter may be a machine that is overloaded
_NAME = b"vmb-guardian"  # what ps and top show; at most 15 bytes


def main() -> None:
    """Wait for the end of the starter; then do what is due."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they are meant for the starter
        signal.signal(number, signal.SIG_IGN)
    os.chdir("/")
    name = os.open("/proc/self/comm", os.O_WRONLY)
    os.write(name, _NAME)
    os.close(name)
    os.read(0, 1)  # nobody writes
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
