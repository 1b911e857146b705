"""The manifest of a stored backup, schemaVersion 1: the same in every store. It names all other files of the backup.

Other programs rely on it. A change that breaks a reader needs another schemaVersion.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar, cast

from vmbackup.errors import PermanentError

FILE_NAME = "manifest.json"
SCHEMA_VERSION = 1

FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")  # no path, and no dot first, as unfinished files have it
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class StoredImage:
    """One image file. `bytes` is its length, `backing` the file of its backing image (None: it has none)."""

    file: str
    format: str
    bytes: int
    digest: str
    backing: str | None


@dataclass(frozen=True)
class StoredDisk(StoredImage):
    """An image that is a disk of the guest."""

    target: str
    virtual_bytes: int


@dataclass(frozen=True)
class Manifest:
    """A complete backup. `images` are the backing images of the disks; `snapshot_time` is in UTC."""

    uid: str
    namespace: str
    name: str
    domain: str
    domain_uuid: str
    domain_xml: str | None
    nvram: str | None
    snapshot_time: datetime
    disks: tuple[StoredDisk, ...]
    images: tuple[StoredImage, ...]

    def image(self, file: str) -> StoredImage | None:
        """The disk or backing image of this name."""
        return next((image for image in (*self.disks, *self.images) if image.file == file), None)

    def to_json(self) -> str:
        """The content of manifest.json."""
        content = {
            "schemaVersion": SCHEMA_VERSION,
            "uid": self.uid,
            "namespace": self.namespace,
            "name": self.name,
            "domain": self.domain,
            "domainUUID": self.domain_uuid,
            "domainXML": self.domain_xml,
            "nvram": self.nvram,
            "snapshotTime": self.snapshot_time.astimezone(UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
            "disks": [
                {"target": disk.target, **_image_to_json(disk, virtualBytes=disk.virtual_bytes)} for disk in self.disks
            ],
            "images": [_image_to_json(image) for image in self.images],
        }
        return json.dumps(content, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, origin: str) -> Manifest:
        """Read and check a manifest. Unknown fields are ignored: a later version may add some.

        Raises PermanentError (BadManifest) naming `origin` (where the text is from) and the field.
        """
        try:
            values: object = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PermanentError(f"{origin} is not JSON ({error})", reason="BadManifest") from None
        top = _Fields(origin, values)
        version = top.get("schemaVersion", int)
        if version != SCHEMA_VERSION:
            raise PermanentError(f"{origin} has schemaVersion {version}: use a newer vmbackup", reason="BadManifest")
        return cls(
            uid=top.get("uid", str),
            namespace=top.get("namespace", str),
            name=top.get("name", str),
            domain=top.get("domain", str),
            domain_uuid=top.get("domainUUID", str),
            domain_xml=top.file_or_none("domainXML"),
            nvram=top.file_or_none("nvram"),
            snapshot_time=top.time("snapshotTime"),
            disks=tuple(
                StoredDisk(
                    target=disk.get("target", str), virtual_bytes=disk.size("virtualBytes"), **_image_from_json(disk)
                )
                for disk in top.items("disks")
            ),
            images=tuple(StoredImage(**_image_from_json(image)) for image in top.items("images")),
        )


def _image_to_json(image: StoredImage, **sizes: int) -> dict[str, object]:
    return {
        "file": image.file,
        "format": image.format,
        **sizes,
        "bytes": image.bytes,
        "digest": image.digest,
        "backing": image.backing,
    }


def _image_from_json(fields: _Fields) -> dict[str, Any]:
    return {
        "file": fields.matching("file", FILE),
        "format": fields.get("format", str),
        "bytes": fields.size("bytes"),
        "digest": fields.matching("digest", _DIGEST),
        "backing": fields.file_or_none("backing"),
    }


Value = TypeVar("Value")


class _Fields:
    """A JSON object read field by field, with errors that name the field."""

    def __init__(self, origin: str, values: object) -> None:
        if not isinstance(values, dict):
            raise PermanentError(f"{origin} must be an object: the backup is damaged", reason="BadManifest")
        self._origin = origin
        self._values = cast("Mapping[str, object]", values)

    def _bad(self, name: str, wanted: str) -> PermanentError:
        found = repr(self._values[name]) if name in self._values else "missing"
        return PermanentError(
            f"{self._origin}: {name} is {found}, not {wanted}: the backup is damaged", reason="BadManifest"
        )

    def get(self, name: str, kind: type[Value]) -> Value:
        value = self._values.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self._bad(name, f"of type {kind.__name__}")
        return value

    def size(self, name: str) -> int:
        value = self.get(name, int)
        if value < 0:
            raise self._bad(name, "a number of bytes")
        return value

    def matching(self, name: str, pattern: re.Pattern[str]) -> str:
        value = self.get(name, str)
        if not pattern.fullmatch(value):
            raise self._bad(name, f"like {pattern.pattern}")
        return value

    def file_or_none(self, name: str) -> str | None:
        if name in self._values and self._values[name] is None:
            return None
        return self.matching(name, FILE)

    def time(self, name: str) -> datetime:
        try:
            value = datetime.fromisoformat(self.get(name, str))
        except ValueError:
            raise self._bad(name, "a time of RFC 3339") from None
        if value.tzinfo is None:
            raise self._bad(name, "a time with its zone")
        return value.astimezone(UTC)

    def items(self, name: str) -> list[_Fields]:
        found = cast("list[object]", self.get(name, list))
        return [_Fields(f"{self._origin}: {name}[{index}]", item) for index, item in enumerate(found)]
