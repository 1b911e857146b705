"""The identity of an object of our API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from vmbackup.api.names import BACKUPS, GROUP, VERSION


class ObjectId(Protocol):
    """One object of a kind of ours: this very object, not a later one of the same name."""

    plural: ClassVar[str]

    @property
    def namespace(self) -> str:
        """Its namespace."""
        ...

    @property
    def name(self) -> str:
        """Its name within the namespace."""
        ...

    @property
    def uid(self) -> str:
        """The uid that the API server gave it."""
        ...


@dataclass(frozen=True)
class BackupId:
    """One VMBackup. `vmbackup run` derives the uid from its file."""

    plural: ClassVar[str] = BACKUPS

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
