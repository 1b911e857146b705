"""Which tier a test belongs to, where only some of its parameters are left to `make chaos` (CONTRIBUTING.md, Tests)."""

from __future__ import annotations

import pytest
from _pytest.mark import ParameterSet


def in_chaos(*values: object, id: str | None = None) -> ParameterSet:
    """Parameters of a test that repeat a kind of fault which `make test` has already."""
    return pytest.param(*values, marks=pytest.mark.chaos, id=id)
