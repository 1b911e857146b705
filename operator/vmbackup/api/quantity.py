"""Kubernetes quantities.

The kubernetes client has a parser, but importing it costs 40 MB and a second, which the command line should not pay.
"""

from __future__ import annotations

import re
from decimal import Decimal

_QUANTITY = re.compile(r"(?P<number>[+]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?)(?P<suffix>[KMGTPE]i|[kMGTPE]|)")
_FACTOR = {"": 1, "k": 10**3} | {
    letter + binary: (1024 if binary else 1000) ** power
    for power, letter in enumerate("KMGTPE", start=1)
    for binary in ("", "i")
    if letter + binary != "K"
}


def parse_quantity(value: object) -> int:
    """A Kubernetes quantity (`200Mi`, `1e9`, 1024) as a whole number, rounded down. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"not a quantity: {value!r}")
    match = _QUANTITY.fullmatch(str(value))
    if match is None:
        raise ValueError(f"not a quantity: {value!r}")
    return int(Decimal(match["number"]) * _FACTOR[match["suffix"]])
