"""The decision table of docs/protocol.md: each rule names its rows, and docs/generate.py writes them in its order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

Decision = TypeVar("Decision", bound=Callable[..., Any])


@dataclass(frozen=True)
class Row:
    """A row for humans: condition, action, reason. L, P, T, B and O are defined in decide.py."""

    when: str
    do: str
    why: str


_ROWS: dict[Callable[..., Any], tuple[Row, ...]] = {}


def row(when: str, do: str, why: str) -> Callable[[Decision], Decision]:
    """Give a rule a row. Of several, the first written is the first in the table."""

    def note(rule: Decision) -> Decision:
        _ROWS[rule] = (Row(when, do, why), *_ROWS.get(rule, ()))
        return rule

    return note


def rows_of(rules: Iterable[Callable[..., Any]]) -> Iterator[Row]:
    """The rows of these rules, in their order. Raises KeyError for a rule without any."""
    for rule in rules:
        yield from _ROWS[rule]
