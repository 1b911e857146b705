"""What a VMBackup, as the API server shows it, asks of its agent. Pure: no I/O, no clock of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from vmbackup.api.spec import CANCEL_ANNOTATION, FINALIZER, RETRY_ANNOTATION, DeletionPolicy
from vmbackup.api.status import Reason
from vmbackup.cluster.status import condition, is_finished

Body = Mapping[str, Any]


@dataclass(frozen=True)
class Seen:
    """A VMBackup as it was seen last."""

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
    def uid(self) -> str:
        """Its identity: another object of the same name has another."""
        return self.metadata["uid"]

    @property
    def name(self) -> str:
        """Namespace and name, for people."""
        return f"{self.metadata['namespace']}/{self.metadata['name']}"

    @property
    def generation(self) -> int:
        """Raised with each change of the spec."""
        return int(self.metadata.get("generation", 0))

    @property
    def terminating(self) -> bool:
        """It was deleted, and is there only until its last finalizer goes."""
        return bool(self.metadata.get("deletionTimestamp"))

    @property
    def held(self) -> bool:
        """Our finalizer is stored on it: it cannot vanish behind our back."""
        return FINALIZER in (self.metadata.get("finalizers") or ())

    @property
    def held_by_others(self) -> bool:
        """Somebody else's finalizer is stored on it, as that of Argo CD on its hooks: we do not end it alone."""
        return any(each != FINALIZER for each in self.metadata.get("finalizers") or ())

    @property
    def awaits_its_end(self) -> bool:
        """Who else holds it waits for a status that says that it is over, and there is none."""
        return self.held_by_others and not self.over

    @property
    def released_by_us(self) -> bool:
        """It was deleted and we hold it no more, nor can again: gone, to us, however long others still hold it."""
        return self.terminating and not self.held

    @property
    def retry(self) -> str:
        """The retry that is asked for last. An annotation that was taken away asks for nothing new."""
        return str(_group(self.metadata, "annotations").get(RETRY_ANNOTATION) or self.handled_retry)

    @property
    def handled_retry(self) -> str:
        """The retry that was acted on last."""
        return str(self.status.get("lastHandledRetry") or "")

    @property
    def cancelled(self) -> bool:
        """No copy is wanted any more."""
        return _group(self.metadata, "annotations").get(CANCEL_ANNOTATION) == "true"

    @property
    def over(self) -> bool:
        """The backup has ended. A quarantine has not: it is lifted by itself when libvirt and QEMU agree again."""
        return is_finished(self.status) and condition(self.status, "Ready").get("reason") != Reason.QUARANTINED

    @property
    def home(self) -> bool:
        """No disk was left on an overlay."""
        return condition(self.status, "ChainClean").get("status") != "False"

    @property
    def stale(self) -> bool:
        """It is over, and its spec or retry was changed since: unless that is noted, kstatus waits for ever."""
        unseen = int(self.status.get("observedGeneration", -1)) != self.generation
        return self.over and (unseen or self.retry != self.handled_retry)

    @property
    def data_goes_too(self) -> bool:
        """Its stored data is to be deleted with it."""
        policy = self.spec.get("deletionPolicy")
        return policy == DeletionPolicy.DELETE and bool(self.status.get("location"))

    @property
    def expires(self) -> float | None:
        """When it is to be deleted, in seconds since the epoch. Never while a guest is on its overlay."""
        ttl = self.spec.get("ttlSecondsAfterFinished")
        ended = self.status.get("completionTime")
        if ttl is None or not ended or not self.over or not self.home:
            return None
        return datetime.fromisoformat(str(ended)).timestamp() + float(ttl)

    @property
    def wanted(self) -> bool:
        """There is something left to do for it, now or later: so its finalizer must stay."""
        return not self.over or not self.home or self.stale or self.expires is not None or self.data_goes_too


def _group(body: Body, name: str) -> Body:
    found: Body | None = body.get(name)
    return found or {}
