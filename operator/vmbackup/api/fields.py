"""The fields of a manifest: read one by one, with errors that name the field and the cure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, TypeVar

from vmbackup.api.quantity import parse_quantity
from vmbackup.errors import RefusedError

_TARGET = re.compile(r"[a-zA-Z][a-zA-Z0-9_]{0,31}")  # the same as in crds/
_MOST_DISKS = 64

Choice = TypeVar("Choice", bound=StrEnum)


class Fields:
    """A mapping of a manifest, read field by field, with errors that name the field."""

    def __init__(self, path: str, values: Any) -> None:
        if not isinstance(values, Mapping):
            raise RefusedError(f"{path} must be a mapping")
        self._path = path
        self._values: Mapping[str, Any] = values  # pyright: ignore[reportUnknownMemberType]
        self._read: set[str] = set()

    def _get(self, name: str) -> Any:
        self._read.add(name)
        return self._values.get(name)

    def bad(self, name: str, cure: str) -> RefusedError:
        """The error that names this field, its value and the cure."""
        return RefusedError(f"{self._path}.{name} is {self._values.get(name)!r}: {cure}")

    def group(self, name: str, *, required: bool = False) -> Any:
        """A mapping, empty if it is left out."""
        value = self._get(name)
        if value is None and required:
            raise RefusedError(f"{self._path}.{name} is required")
        return {} if value is None else value

    def string(self, name: str, form: re.Pattern[str], cure: str) -> str:
        """A text of this form. It is required."""
        value = self._get(name)
        if value is None:
            raise RefusedError(f"{self._path}.{name} is required: {cure}")
        if not isinstance(value, str) or form.fullmatch(value) is None:
            raise self.bad(name, cure)
        return value

    def has(self, name: str) -> bool:
        """Whether the field is there."""
        return self._get(name) is not None

    def mapping(self, name: str) -> Fields:
        """A mapping, to be read in turn."""
        return Fields(f"{self._path}.{name}", self._get(name))

    def texts(self, name: str, form: re.Pattern[str], cure: str) -> dict[str, str]:
        """A mapping of texts to texts of this form, empty if it is left out."""
        value = self._get(name)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self.bad(name, cure)
        items: Mapping[Any, Any] = value  # pyright: ignore[reportUnknownVariableType]
        if any(not isinstance(text, str) or form.fullmatch(text) is None for text in items.values()):
            raise self.bad(name, cure)
        return {str(key): text for key, text in items.items()}

    def strings(self, name: str, form: re.Pattern[str], cure: str) -> tuple[str, ...]:
        """A list of texts of this form, at least one. It is required."""
        value = self._get(name)
        if not isinstance(value, list) or not value:
            raise self.bad(name, cure)
        items: list[Any] = value  # pyright: ignore[reportUnknownVariableType]
        if any(not isinstance(item, str) or form.fullmatch(item) is None for item in items):
            raise self.bad(name, cure)
        return tuple(items)

    def mappings(self, name: str, cure: str) -> list[Fields]:
        """A list of mappings, to be read in turn. It is required, and may be empty."""
        value = self._get(name)
        if not isinstance(value, list):
            raise self.bad(name, cure)
        items: list[Any] = value  # pyright: ignore[reportUnknownVariableType]
        return [Fields(f"{self._path}.{name}[{index}]", item) for index, item in enumerate(items)]

    def targets(self, name: str) -> list[str]:
        """A list of disk targets, empty if it is left out."""
        value = self._get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.bad(name, "must be a list of disk targets such as [vda, vdb]")
        items: list[Any] = value  # pyright: ignore[reportUnknownVariableType]
        if not items:
            raise self.bad(name, "must name at least one disk target such as vda; leave disks out for all")
        if len(items) > _MOST_DISKS:
            raise self.bad(name, f"must name at most {_MOST_DISKS} disks")
        if any(not isinstance(item, str) or _TARGET.fullmatch(item) is None for item in items):
            raise self.bad(name, "must be the target of a disk such as vda, as `virsh domblklist` shows it")
        if len(set(items)) != len(items):
            raise self.bad(name, "must name each disk target only once")
        return items

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number within these bounds, both included."""
        value = self.optional_integer(name, low, high)
        return default if value is None else value

    def optional_integer(self, name: str, low: int, high: int) -> int | None:
        """As `integer`; None if it is left out."""
        value = self._get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.bad(name, f"must be a whole number from {low} to {high}")
        return value

    def boolean(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.bad(name, "must be true or false")
        return value

    def choice(self, name: str, default: Choice) -> Choice:
        """One of the words of an enumeration."""
        value = self._get(name)
        if value is None:
            return default
        try:
            return type(default)(value)
        except ValueError:
            known = ", ".join(type(default))
            raise self.bad(name, f"must be one of {known}") from None

    def bandwidth(self, name: str) -> int | None:
        """Bytes per second; None if it is left out."""
        value = self._get(name)
        if value is None:
            return None
        try:
            rate = parse_quantity(value)
        except ValueError:
            raise self.bad(name, "must be bytes per second as a quantity such as 200Mi") from None
        if rate < 1024 * 1024:
            raise self.bad(name, "must be at least 1Mi (bytes per second), or left out for no limit")
        return rate

    def refuse_unknown(self) -> None:
        """Raise RefusedError if there are unknown fields, which no method has read."""
        unknown = sorted(set(self._values) - self._read)
        if unknown:
            raise RefusedError(
                f"{self._path} has unknown fields: {', '.join(unknown)}; remove them or correct their names"
            )
