"""A VMBackup as the API server shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from kubectl_vmbackup.kubectl import Kubectl, Object, PluginError, condition, entries, group
from vmbackup.api.spec import CANCEL_ANNOTATION, FINALIZER, GROUP, RETRY_ANNOTATION

BACKUPS = f"vmbackups.{GROUP}"
STORES = f"vmbackupstores.{GROUP}"


@dataclass(frozen=True)
class Backup:
    """One VMBackup."""

    body: Object

    @property
    def metadata(self) -> Object:
        """Its metadata."""
        return self.body["metadata"]

    @property
    def spec(self) -> Object:
        """Its spec."""
        return group(self.body, "spec")

    @property
    def status(self) -> Object:
        """Its status."""
        return group(self.body, "status")

    @property
    def name(self) -> str:
        """Its name."""
        return self.metadata["name"]

    @property
    def namespace(self) -> str:
        """Its namespace."""
        return self.metadata["namespace"]

    @property
    def node(self) -> str:
        """Its hypervisor."""
        return str(self.spec.get("nodeName", ""))

    @property
    def phase(self) -> str:
        """Where it is."""
        return str(self.status.get("phase", ""))

    @property
    def message(self) -> str:
        """What happens, or how it ended."""
        return str(self.status.get("message", ""))

    @property
    def seen(self) -> bool:
        """An agent has written its status."""
        return int(self.status.get("observedGeneration", -1)) >= 0

    @property
    def running(self) -> bool:
        """It has not ended."""
        return self.condition("Ready").get("status") not in ("True", "False")

    @property
    def ready(self) -> bool:
        """It can be restored, and every disk is home."""
        return self.is_true("Ready")

    @property
    def reason(self) -> str:
        """Why Ready is what it is."""
        return str(self.condition("Ready").get("reason", ""))

    @property
    def left_on_overlay(self) -> bool:
        """A disk is known to be away from its own image."""
        return self.condition("ChainClean").get("status") == "False"

    @property
    def terminating(self) -> bool:
        """It was deleted, and is there for its finalizers."""
        return bool(self.metadata.get("deletionTimestamp"))

    @property
    def deleted_at(self) -> datetime | None:
        """When it was deleted."""
        return moment(self.metadata.get("deletionTimestamp"))

    @property
    def finalizers(self) -> Sequence[str]:
        """What keeps it from vanishing."""
        return self.metadata.get("finalizers") or ()

    @property
    def held(self) -> bool:
        """The finalizer of the agent is on it."""
        return FINALIZER in self.finalizers

    @property
    def retry(self) -> str:
        """The retry that was asked for last."""
        return str(self._annotations.get(RETRY_ANNOTATION, ""))

    @property
    def handled_retry(self) -> str:
        """The retry that was acted on last."""
        return str(self.status.get("lastHandledRetry", ""))

    @property
    def cancelled(self) -> bool:
        """It was asked to give up its copy."""
        return self._annotations.get(CANCEL_ANNOTATION) == "true"

    @property
    def disks(self) -> Sequence[Object]:
        """What is known of each disk."""
        return entries(self.status, "disks")

    @property
    def last_write(self) -> datetime | None:
        """When its agent wrote its status last: needs --show-managed-fields."""
        managed = entries(self.metadata, "managedFields")
        writes = [moment(each.get("time")) for each in managed if each.get("subresource") == "status"]
        return max((write for write in writes if write), default=None)

    @property
    def _annotations(self) -> Object:
        return group(self.metadata, "annotations")

    def condition(self, kind: str) -> Object:
        """A condition; empty if there is none."""
        return condition(self.body, kind)

    def is_true(self, kind: str) -> bool:
        """Whether a condition is True."""
        return self.condition(kind).get("status") == "True"


def find(kubectl: Kubectl, name: str) -> Backup:
    """A VMBackup of the namespace. Raises PluginError if there is none."""
    body = kubectl.find(BACKUPS, name, "--show-managed-fields")
    if body is None:
        raise PluginError(f"there is no VMBackup {name} here: `kubectl get vmb -A` shows them all; name its "
                          "namespace with -n")  # fmt: skip
    return Backup(body)


def every(kubectl: Kubectl, *words: str) -> list[Backup]:
    """The VMBackups of the namespace, or those that `words` select."""
    return [Backup(body) for body in kubectl.items(BACKUPS, "--show-managed-fields", *words)]


def moment(text: Any) -> datetime | None:
    """A point in time, of an object."""
    return datetime.fromisoformat(str(text)) if text else None


def now() -> datetime:
    """This moment, UTC."""
    return datetime.now(UTC)
