"""Reads VMBackups with kubectl."""

from __future__ import annotations

from datetime import UTC, datetime

from kubectl_vmbackup.kubectl import Kubectl, PluginError
from vmbackup.api.names import GROUP
from vmbackup.api.resource import BackupResource

BACKUPS = f"vmbackups.{GROUP}"
STORES = f"vmbackupstores.{GROUP}"


def find(kubectl: Kubectl, name: str) -> BackupResource:
    """A VMBackup of the namespace. Raises PluginError if there is none."""
    body = kubectl.find(BACKUPS, name, "--show-managed-fields")
    if body is None:
        raise PluginError(f"there is no VMBackup {name} in this namespace: `kubectl get vmb -A` lists all; set its "
                          "namespace with -n")  # fmt: skip
    return BackupResource(body)


def every(kubectl: Kubectl, *words: str) -> list[BackupResource]:
    """The VMBackups of the namespace, or those selected by `words`."""
    return [BackupResource(body) for body in kubectl.items(BACKUPS, "--show-managed-fields", *words)]


def now() -> datetime:
    """This moment, UTC."""
    return datetime.now(UTC)
