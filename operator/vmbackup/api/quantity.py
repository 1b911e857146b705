"""Kubernetes quantities.

The kubernetes client has a parser, but importing it costs 40 MB and a second, which the command line should not pay.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal

# k8s.io/apimachinery/pkg/api/resource, "Quantity": a decimal exponent or a suffix, never both.
_QUANTITY = re.compile(
    r"(?P<number>[+-]?(\d+(\.\d*)?|\.\d+))([eE](?P<exponent>[+-]?\d{1,5})|(?P<suffix>[KMGTPE]i|[numkMGTPE]|))",
    re.ASCII,
)
_FACTOR = {
    "": Decimal(1),
    **{suffix: Decimal(1000) ** power for power, suffix in enumerate("num", start=-3)},
    **{suffix: Decimal(1000) ** power for power, suffix in enumerate("kMGTPE", start=1)},
    **{f"{suffix}i": Decimal(1024) ** power for power, suffix in enumerate("KMGTPE", start=1)},
}
_LARGEST = 2**63 - 1  # larger values are cut to this, as in Kubernetes


def parse_quantity(value: object) -> int:
    """A Kubernetes quantity (`200Mi`, `1e9`, 1024) as a whole number, rounded down. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"not a quantity: {value!r}")
    match = _QUANTITY.fullmatch(str(value))
    if match is None:
        raise ValueError(f"not a quantity: {value!r}")
    exact = Decimal(match["number"]).scaleb(int(match["exponent"] or 0)) * _FACTOR[match["suffix"] or ""]
    return math.floor(max(-_LARGEST, min(exact, _LARGEST)))
