"""Waits for a state of a VMBackup."""

from __future__ import annotations

import time
from collections.abc import Callable

from kubectl_vmbackup.backup import find
from kubectl_vmbackup.kubectl import Kubectl, PluginError
from vmbackup.api.resource import BackupResource

_LOOK = 1.0  # seconds


def wait(kubectl: Kubectl, name: str, over: Callable[[BackupResource], bool], seconds: float | None) -> BackupResource:
    """The VMBackup once `over` is true of it. Raises PluginError after `seconds`; None: no limit."""
    until = None if seconds is None else time.monotonic() + seconds
    while not over(backup := find(kubectl, name)):
        if until is not None and time.monotonic() >= until:
            raise PluginError(f"{name}: still {backup.phase} ({backup.reason}) after {seconds:.0f} s; it continues")
        time.sleep(_LOOK)
    return backup
