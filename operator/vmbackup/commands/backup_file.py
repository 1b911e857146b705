"""What `vmbackup run` is asked for: one VMBackup and its VMBackupStore, from YAML."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import yaml

from vmbackup.api.backup import BackupSpec
from vmbackup.api.names import GROUP, OBJECT_NAME, VERSION
from vmbackup.api.store import StoreSpec
from vmbackup.errors import RefusedError

_API_VERSION = f"{GROUP}/{VERSION}"
_NO_NODE = "localhost"  # spec.nodeName where there is none: the local hypervisor is meant, whatever it says


@dataclass(frozen=True)
class BackupFile:
    """One VMBackup. `uid` is empty where the manifest, not being from an API server, has none."""

    namespace: str
    name: str
    uid: str
    spec: BackupSpec
    store: StoreSpec

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


def read(file: str, *, store_file: str | None, store_path: Path | None) -> BackupFile:
    """The VMBackup of `file` (- for stdin), and its store: at `store_path`, or of `store_file`, or of the same file.

    Raises RefusedError naming the file or the field, and the cure.
    """
    if store_file and store_path:
        raise RefusedError("give --store or --store-path, not both")
    documents = _documents(file)
    backups = [document for document in documents if document.get("kind") == "VMBackup"]
    if len(backups) != 1:
        raise RefusedError(f"{file} holds {len(backups)} VMBackups: give a file with exactly one")
    metadata = _mapping(backups[0], "metadata", file)
    spec = {"nodeName": _NO_NODE, **_mapping(backups[0], "spec", file)}
    if store_path:
        spec = {"storeRef": {"name": "store-path"}, **spec}
    parsed = BackupSpec.parse(spec)
    stores = [*documents, *(_documents(store_file) if store_file else ())]
    return BackupFile(
        namespace=_name(metadata, "namespace", "default"),
        name=_name(metadata, "name"),
        uid=_uid(metadata),
        spec=parsed,
        store=StoreSpec.parse({"directory": {"path": str(store_path)}}) if store_path else _store(stores, parsed.store),
    )


def _documents(file: str) -> list[Mapping[str, Any]]:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text()
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
    except OSError as error:
        raise RefusedError(f"{file} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RefusedError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    for document in documents:
        found = cast("Mapping[str, Any]", document).get("apiVersion") if isinstance(document, Mapping) else None
        if found != _API_VERSION:
            raise RefusedError(f"{file} holds a document of apiVersion {found}: {_API_VERSION} is what is known here")
    return documents


def _store(documents: Iterable[Mapping[str, Any]], name: str) -> StoreSpec:
    for document in documents:
        if document.get("kind") == "VMBackupStore" and _mapping(document, "metadata", name).get("name") == name:
            return StoreSpec.parse(_mapping(document, "spec", name))
    raise RefusedError(
        f"spec.storeRef names the VMBackupStore {name!r}, which is not there: add it to the file, or give --store FILE "
        "or --store-path DIR"
    )


def _mapping(document: Mapping[str, Any], field: str, origin: str) -> Mapping[str, Any]:
    value = document.get(field)
    if not isinstance(value, Mapping):
        raise RefusedError(f"{origin}: {field} of the {document.get('kind')} is missing, or no mapping")
    return cast("Mapping[str, Any]", value)


def _name(metadata: Mapping[str, Any], field: str, default: str | None = None) -> str:
    value = metadata.get(field, default)
    if not isinstance(value, str) or OBJECT_NAME.fullmatch(value) is None:
        raise RefusedError(f"metadata.{field} is {value!r}: give lower-case letters, digits, '-' and '.'")
    return value


def _uid(metadata: Mapping[str, Any]) -> str:
    value = metadata.get("uid", "")
    try:
        return str(UUID(value)) if value else ""
    except (ValueError, AttributeError, TypeError):
        raise RefusedError(f"metadata.uid is {value!r}: leave it out, or give a UUID") from None
