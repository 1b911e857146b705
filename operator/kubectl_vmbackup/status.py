"""`kubectl vmbackup status`: one VMBackup in full, or all in a table."""

from __future__ import annotations

from collections.abc import Sequence

from kubectl_vmbackup import view
from kubectl_vmbackup.backup import every, find, now
from kubectl_vmbackup.kubectl import Kubectl, KubectlError, Object
from vmbackup.api.resource import BackupResource


def status(kubectl: Kubectl, names: Sequence[str], *, all_namespaces: bool) -> int:
    """Print it. Returns the exit code; raises PluginError."""
    if names:
        shown = [find(kubectl, name) for name in names]
        print("\n\n".join(view.details(backup, _events(kubectl, backup), now()) for backup in shown))
        return 0
    backups = every(kubectl, *(["-A"] if all_namespaces else []))
    backups.sort(key=lambda backup: (backup.namespace, str(backup.metadata.get("creationTimestamp")), backup.name))
    if backups:
        print(view.table(backups, now(), namespaces=all_namespaces))
    else:
        print("There is no VMBackup" + ("." if all_namespaces else " in this namespace; -A shows those of all."))
    return 0


def _events(kubectl: Kubectl, backup: BackupResource) -> Sequence[Object]:
    """Its events; none without permission to read them."""
    selector = f"--field-selector=involvedObject.uid={backup.metadata['uid']}"
    try:
        return kubectl.items("events", "-n", backup.namespace, selector)
    except KubectlError as error:
        if not error.forbidden:
            raise
        return ()
