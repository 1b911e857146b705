"""A VMBackup as the API server shows it: one view for the agent, a controller and the kubectl plugin. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from vmbackup.api.backup import DeletionPolicy
from vmbackup.api.identity import BackupId
from vmbackup.api.names import CANCEL_ANNOTATION, FINALIZER, RETRY_ANNOTATION
from vmbackup.api.status import Reason

Body = Mapping[str, Any]


@dataclass(frozen=True)
class BackupResource:
    """A VMBackup as it was seen last. `last_write` needs an object read with its managed fields."""

    body: Body

    @property
    def metadata(self) -> Body:
        """Its metadata."""
        return self.body["metadata"]

    @property
    def spec(self) -> Body:
        """Its spec."""
        return _group(self.body, "spec")

    @property
    def status(self) -> Body:
        """Its status, empty where there is none."""
        return _group(self.body, "status")

    @property
    def identity(self) -> BackupId:
        """Namespace, name and uid."""
        return BackupId.of(self.body)

    @property
    def uid(self) -> str:
        """Another object of the same name has another uid."""
        return self.metadata["uid"]

    @property
    def namespace(self) -> str:
        """Its namespace."""
        return self.metadata["namespace"]

    @property
    def name(self) -> str:
        """Its name within the namespace."""
        return self.metadata["name"]

    @property
    def full_name(self) -> str:
        """Namespace and name, for people."""
        return f"{self.namespace}/{self.name}"

    @property
    def node(self) -> str:
        """The hypervisor of its domain."""
        return str(self.spec.get("nodeName", ""))

    @property
    def phase(self) -> str:
        """Its phase, for people."""
        return str(self.status.get("phase", ""))

    @property
    def message(self) -> str:
        """The message of its status."""
        return str(self.status.get("message", ""))

    @property
    def observed(self) -> bool:
        """An agent has written its status."""
        return int(self.status.get("observedGeneration", -1)) >= 0

    @property
    def ready(self) -> bool:
        """It can be restored, and every disk is home."""
        return self.is_true("Ready")

    @property
    def running(self) -> bool:
        """Its status says that it has not ended."""
        return not is_finished(self.status)

    @property
    def reason(self) -> str:
        """The reason of its condition Ready."""
        return str(self.condition("Ready").get("reason", ""))

    @property
    def disks(self) -> Sequence[Body]:
        """The status of each disk."""
        return self.status.get("disks") or ()

    @property
    def finalizers(self) -> Sequence[str]:
        """All its finalizers, ours and others'."""
        return self.metadata.get("finalizers") or ()

    @property
    def deleted_at(self) -> datetime | None:
        """When it was deleted."""
        return moment(self.metadata.get("deletionTimestamp"))

    @property
    def last_write(self) -> datetime | None:
        """When its agent last wrote the status."""
        managed: Sequence[Body] = self.metadata.get("managedFields") or ()
        writes = [moment(each.get("time")) for each in managed if each.get("subresource") == "status"]
        return max((write for write in writes if write), default=None)

    def condition(self, kind: str) -> Body:
        """The condition of this type, empty if there is none."""
        return condition(self.status, kind)

    def is_true(self, kind: str) -> bool:
        """Whether the condition of this type is True."""
        return self.condition(kind).get("status") == "True"

    @property
    def generation(self) -> int:
        """Raised with each change of the spec."""
        return int(self.metadata.get("generation", 0))

    @property
    def terminating(self) -> bool:
        """It was deleted, and exists until its last finalizer is removed."""
        return bool(self.metadata.get("deletionTimestamp"))

    @property
    def held(self) -> bool:
        """Our finalizer is stored on it, so it cannot be removed without us."""
        return FINALIZER in self.finalizers

    @property
    def held_by_others(self) -> bool:
        """Somebody else's finalizer is stored on it, as that of Argo CD on its hooks: we do not end it offline."""
        return any(each != FINALIZER for each in self.finalizers)

    @property
    def awaits_its_end(self) -> bool:
        """Another controller holds it and waits for a final status, which is still missing."""
        return self.held_by_others and not self.over

    @property
    def released_by_us(self) -> bool:
        """Deleted, and our finalizer is gone: nothing left for us, even if other finalizers keep the object."""
        return self.terminating and not self.held

    @property
    def retry(self) -> str:
        """The last requested retry. Removing the annotation requests nothing."""
        return str(_group(self.metadata, "annotations").get(RETRY_ANNOTATION) or self.handled_retry)

    @property
    def handled_retry(self) -> str:
        """The retry that the agent handled last."""
        return str(self.status.get("lastHandledRetry") or "")

    @property
    def cancelled(self) -> bool:
        """The annotation that cancels the copy is set."""
        return _group(self.metadata, "annotations").get(CANCEL_ANNOTATION) == "true"

    @property
    def over(self) -> bool:
        """It has ended. A quarantined one has not: the agent lifts the quarantine when libvirt and QEMU agree."""
        return is_finished(self.status) and self.reason != Reason.QUARANTINED

    @property
    def left_on_overlay(self) -> bool:
        """At least one disk is known to be on an overlay."""
        return self.condition("ChainClean").get("status") == "False"

    @property
    def stale(self) -> bool:
        """It is over, but its spec or retry has changed since. Until that is noted, kstatus waits."""
        unseen = int(self.status.get("observedGeneration", -1)) != self.generation
        return self.over and (unseen or self.retry != self.handled_retry)

    @property
    def data_goes_too(self) -> bool:
        """Deleting it deletes its stored data too."""
        policy = self.spec.get("deletionPolicy")
        return policy == DeletionPolicy.DELETE and bool(self.status.get("location"))

    @property
    def expires(self) -> float | None:
        """When it must be deleted, in seconds since the epoch. None, for example, while its guest is on an overlay."""
        ttl = self.spec.get("ttlSecondsAfterFinished")
        ended = self.status.get("completionTime")
        if ttl is None or not ended or not self.over or self.left_on_overlay:
            return None
        return datetime.fromisoformat(str(ended)).timestamp() + float(ttl)

    @property
    def wanted(self) -> bool:
        """Something is left to do for it, now or later, so its finalizer must stay."""
        return not self.over or self.left_on_overlay or self.stale or self.expires is not None or self.data_goes_too


def is_finished(status: Mapping[str, Any]) -> bool:
    """Whether the backup with this status is over: Ready is Unknown (or not there yet) exactly while it runs."""
    return condition(status, "Ready").get("status") in ("True", "False")


def condition(status: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """The condition of this type, empty if there is none."""
    conditions: Iterable[Mapping[str, Any]] = status.get("conditions") or ()
    return next((known for known in conditions if known.get("type") == kind), dict[str, Any]())


def with_generation(status: Mapping[str, Any], generation: int) -> dict[str, Any]:
    """This status with `generation` observed. After an edit of a finished backup kstatus waits for that."""
    conditions: Iterable[Mapping[str, Any]] = status.get("conditions") or ()
    raised = [{**known, "observedGeneration": generation} for known in conditions]
    return {**status, "observedGeneration": generation, "conditions": raised}


def moment(text: Any) -> datetime | None:
    """A timestamp of an object (RFC 3339); None if there is none."""
    return datetime.fromisoformat(str(text)) if text else None


def _group(body: Body, name: str) -> Body:
    found: Body | None = body.get(name)
    return found or {}
