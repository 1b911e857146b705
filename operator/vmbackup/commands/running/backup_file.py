"""The input of `vmbackup run`: one VMBackup and its VMBackupStore, from YAML."""

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
_NO_NODE = "localhost"  # the spec.nodeName of a manifest without one; it is ignored, since the backup runs here


@dataclass(frozen=True)
class BackupFile:
    """One VMBackup. `uid` is empty if the manifest has none, because it is not from an API server."""

    namespace: str
    name: str
    uid: str
    spec: BackupSpec
    store: StoreSpec

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


def read(file: str, *, store_file: str | None, store_path: Path | None) -> BackupFile:
    """Read the VMBackup of `file` (- for stdin), and its store: `store_path`, or from `store_file`, or from `file`.

    Raises RefusedError naming the file or the field, and the cure.
    """
    if store_file and store_path:
        raise RefusedError("--store and --store-path exclude each other: set only one of them")
    documents = _documents(file)
    backups = [document for document in documents if document.get("kind") == "VMBackup"]
    if len(backups) != 1:
        raise RefusedError(f"{file} contains {len(backups)} VMBackups: it must contain exactly one")
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
            raise RefusedError(f"{file} contains a document of apiVersion {found}: only {_API_VERSION} is supported")
    return documents


def _store(documents: Iterable[Mapping[str, Any]], name: str) -> StoreSpec:
    for document in documents:
        if document.get("kind") == "VMBackupStore" and _mapping(document, "metadata", name).get("name") == name:
            return StoreSpec.parse(_mapping(document, "spec", name))
    raise RefusedError(
        f"spec.storeRef names the VMBackupStore {name!r}, which is in none of the files: add it to the file, or set "
        "--store FILE or --store-path DIR"
    )


def _mapping(document: Mapping[str, Any], field: str, origin: str) -> Mapping[str, Any]:
    value = document.get(field)
    if not isinstance(value, Mapping):
        raise RefusedError(f"{origin}: {field} of the {document.get('kind')} is missing or not a mapping")
    return cast("Mapping[str, Any]", value)


def _name(metadata: Mapping[str, Any], field: str, default: str | None = None) -> str:
    value = metadata.get(field, default)
    if not isinstance(value, str) or OBJECT_NAME.fullmatch(value) is None:
        raise RefusedError(f"metadata.{field} is {value!r}: it must be made of lower-case letters, digits, '-' and '.'")
    return value


def _uid(metadata: Mapping[str, Any]) -> str:
    value = metadata.get("uid", "")
    try:
        return str(UUID(value)) if value else ""
    except (ValueError, AttributeError, TypeError):
        raise RefusedError(f"metadata.uid is {value!r}: it must be a UUID, or left out") from None
