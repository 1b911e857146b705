"""Which backup is meant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vmbackup.api.names import GROUP, VERSION


@dataclass(frozen=True)
class BackupId:
    """One VMBackup: this very object, not a later one of the same name. `vmbackup run` makes up the uid."""

    namespace: str
    name: str
    uid: str

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> BackupId:
        """The identity of an object as the API server gives it."""
        metadata = body["metadata"]
        return cls(namespace=metadata["namespace"], name=metadata["name"], uid=metadata["uid"])

    @property
    def full_name(self) -> str:
        """Namespace and name, for people."""
        return f"{self.namespace}/{self.name}"

    @property
    def regarding(self) -> Mapping[str, str]:
        """Its object reference, for events."""
        reference = {"namespace": self.namespace, "name": self.name, "uid": self.uid}
        return {"apiVersion": f"{GROUP}/{VERSION}", "kind": "VMBackup", **reference}
