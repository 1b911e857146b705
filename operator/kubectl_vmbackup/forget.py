"""`kubectl vmbackup forget`: remove the finalizer of a VMBackup whose node is gone for good.

The finalizer guarantees that the guest is home before the object disappears, and only the agent can bring it home. This
command is for agents that will never return; it refuses while the node or its agent shows a sign of life.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import datetime, timedelta

from kubectl_vmbackup import node
from kubectl_vmbackup.advice import span
from kubectl_vmbackup.backup import BACKUPS, find, now
from kubectl_vmbackup.kubectl import USAGE, Kubectl, PluginError
from kubectl_vmbackup.node import Signs
from kubectl_vmbackup.view import printable
from vmbackup.api.names import FINALIZER
from vmbackup.api.resource import BackupResource


def forget(kubectl: Kubectl, name: str, *, yes: bool, force: bool, silent_for: timedelta) -> int:
    """Forget it; the exit code. Raises PluginError if its node may be alive, or the user did not confirm."""
    backup = find(kubectl, name)
    if not backup.held:
        raise PluginError(f"{name} has no finalizer of vmbackup: kubectl delete vmb {name} -n {backup.namespace}")
    alive = signs_of_life(backup, node.look(kubectl, backup.node), now(), silent_for)
    if alive and not force:
        reasons = "".join(f"\n  {each}" for each in alive)
        raise PluginError(f"{name} is not forgotten, since {backup.node} or its agent may be alive:{reasons}")
    print(printable("\n".join([*(f"ignored: {each}" for each in alive), *what_remains(backup)])))
    if not yes:
        _ask(name)
    if not backup.terminating:
        kubectl.run("delete", BACKUPS, name, "--wait=false")
    others = [each for each in backup.finalizers if each != FINALIZER]
    patch = [
        {"op": "test", "path": "/metadata/uid", "value": backup.metadata["uid"]},
        {"op": "test", "path": "/metadata/finalizers", "value": backup.finalizers},
        {"op": "replace", "path": "/metadata/finalizers", "value": others},
    ]
    kubectl.run("patch", BACKUPS, name, "--type=json", "-p", json.dumps(patch))
    print(f"{name}: forgotten" + (f"; it remains for the finalizers {', '.join(others)}" if others else ""))
    return 0


def signs_of_life(backup: BackupResource, signs: Signs, at: datetime, silent_for: timedelta) -> Sequence[str]:
    """Signs that the agent may still return, each with what to do about it. Pure."""
    found: list[str] = []
    least = span(silent_for)
    if signs.exists is None:
        found.append("you may not see nodes: ask somebody who may (kubectl auth can-i get nodes)")
    elif signs.ready:
        found.append("the node is Ready: fix its agent instead, or delete the Node once the machine is gone")
    elif signs.exists and signs.since is not None and at - signs.since < silent_for:
        found.append(f"the node is not Ready for {span(at - signs.since)} only: wait {least}")
    if signs.pods is None:
        found.append("you may not see pods: ask somebody who may (kubectl auth can-i list pods -A)")
    elif signs.agent_ready:
        found.append(f"its agent is ready: the pod {signs.agent_ready}")
    last = max((write for write in (signs.last_write, backup.last_write) if write), default=None)
    if last is not None and at - last < silent_for:
        found.append(f"its agent wrote a status {span(at - last)} ago: wait {least}")
    if backup.deleted_at is None:
        command = f"kubectl delete vmb {backup.name} -n {backup.namespace} --wait=false"
        if not signs.exists:  # an agent outside the cluster has no Node, and an idle one writes nothing
            found.append(f"its agent was not asked to release it yet: {command}; wait {least}")
    elif at - backup.deleted_at < silent_for:
        found.append(f"it was deleted {span(at - backup.deleted_at)} ago only: wait {least}")
    return found


def what_remains(backup: BackupResource) -> list[str]:
    """Things that remain on the node and in the store, and what to do with them. Pure."""
    lines = [f"{backup.name} of the domain {backup.spec.get('domain')} on {backup.node} will disappear. What remains:"]
    overlays = [disk for disk in backup.disks if disk.get("overlay")]
    if backup.left_on_overlay or overlays:
        lines.append(f"  on {backup.node}, if its disks come back: an overlay that holds the guest's newest data")
        lines += [f"    {disk['target']}: {disk['overlay']}, on {disk.get('base', '')}" for disk in overlays]
        lines.append("  delete none of them; an agent that starts there merges them automatically; without one boot")
        lines.append("  the guest from its overlay, and: virsh blockcommit DOMAIN TARGET --shallow --active --pivot")
    elif backup.is_true("ChainClean"):
        lines.append("  no overlay: the guest is on its own images")
    else:
        lines.append(
            "  perhaps an overlay: the state of the guest's disks was never reported (*.vmb-*.qcow2, delete none)"
        )
    if location := backup.status.get("location"):
        lines.append(f"  the copy, unchanged: {location}; forgetting deletes nothing in a store")
    else:
        lines.append("  perhaps a partial copy in the store, which its agent would have removed")
    lines.append("  on the node, the journal of this backup: an agent that returns reads it")
    return lines


def _ask(name: str) -> None:
    if not sys.stdin.isatty():
        raise PluginError("no terminal to ask on: set --yes to confirm", USAGE)
    print(f"Type its name to forget it ({name}): ", end="", flush=True)
    if sys.stdin.readline().strip() != name:
        raise PluginError(f"{name} is not forgotten")
