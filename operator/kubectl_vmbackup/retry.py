"""`kubectl vmbackup retry`: bring home a guest that was left on its overlay, or create the same backup again."""

from __future__ import annotations

import json

from kubectl_vmbackup.backup import BACKUPS, find, now
from kubectl_vmbackup.kubectl import FAILED, Kubectl, PluginError
from kubectl_vmbackup.view import outcome
from kubectl_vmbackup.waiting import wait
from vmbackup.api.names import RETRY_ANNOTATION
from vmbackup.api.resource import BackupResource

_LONGEST_PREFIX = 190  # a VMBackup's name may have 200 characters, and the API server adds 5


def retry(kubectl: Kubectl, name: str, *, new: bool, waits: bool, timeout: float | None) -> int:
    """Retry it; the exit code. Raises PluginError if there is nothing to retry."""
    backup = find(kubectl, name)
    if backup.terminating:
        raise PluginError(f"{name} is being deleted; its guest is brought home first")
    if backup.running:
        raise PluginError(f"{name} is still {backup.phase}: there is nothing to try again yet")
    return _again(kubectl, backup, waits, timeout) if new else _home(kubectl, backup, waits, timeout)


def _home(kubectl: Kubectl, backup: BackupResource, waits: bool, timeout: float | None) -> int:
    if backup.ready:
        raise PluginError(f"{backup.name} is Ready: there is nothing to try again; --new creates another one like it")
    if not backup.left_on_overlay:
        raise PluginError(
            f"{backup.name} has no copy, and its guest is home: that moment can no longer be copied; "
            "--new creates another one like it, of the present moment"
        )
    value = now().isoformat(timespec="milliseconds")
    kubectl.run("annotate", BACKUPS, backup.name, "--overwrite", f"{RETRY_ANNOTATION}={value}")
    print(f"{backup.name}: the guest is being brought home again; the attempt counter was reset")
    if not waits:
        return 0
    return _tell(wait(kubectl, backup.name, lambda it: it.handled_retry == value and not it.running, timeout))


def _again(kubectl: Kubectl, backup: BackupResource, waits: bool, timeout: float | None) -> int:
    if backup.left_on_overlay:
        print(f"{backup.name} has left its guest on an overlay, which is merged first")
    body = {
        "apiVersion": backup.body["apiVersion"],
        "kind": backup.body["kind"],
        "metadata": {"generateName": f"{backup.name[:_LONGEST_PREFIX]}-", "namespace": backup.namespace},
        "spec": backup.spec,
    }
    made = json.loads(kubectl.run("create", "-f", "-", "-o", "json", stdin=json.dumps(body)))["metadata"]["name"]
    print(f"{made}: created, with the spec of {backup.name}")
    return _tell(wait(kubectl, made, lambda it: not it.running, timeout)) if waits else 0


def _tell(backup: BackupResource) -> int:
    print(outcome(backup))
    return 0 if backup.ready else FAILED
