"""`kubectl vmbackup cancel`: cancel the copy, bring the guest home, keep the object."""

from __future__ import annotations

from kubectl_vmbackup.backup import BACKUPS, find
from kubectl_vmbackup.kubectl import Kubectl, PluginError
from kubectl_vmbackup.view import outcome
from kubectl_vmbackup.waiting import wait
from vmbackup.api.names import CANCEL_ANNOTATION


def cancel(kubectl: Kubectl, name: str, *, waits: bool, timeout: float | None) -> int:
    """Cancel it; the exit code. Raises PluginError if there is nothing to cancel."""
    backup = find(kubectl, name)
    if backup.terminating:
        raise PluginError(f"{name} is being deleted, which cancels its copy too")
    if not backup.running:
        raise PluginError(f"{name} is over already: {backup.phase}, {backup.reason}")
    if backup.is_true("BackupComplete"):
        raise PluginError(f"{name} already has its copy, which is kept; its guest is being brought home, which cannot "
                          "be cancelled")  # fmt: skip
    kubectl.run("annotate", BACKUPS, name, "--overwrite", f"{CANCEL_ANNOTATION}=true")
    print(f"{name}: cancelled; its guest is brought home")
    if waits:
        print(outcome(wait(kubectl, name, lambda it: not it.running, timeout)))
    return 0
