"""Marks that tie a test to a row of a catalogue, read from the sources: `@pytest.mark.scenario(3, 4)` and its like."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

TESTS = Path(__file__).parent.parent


def marked(kind: str) -> Mapping[object, frozenset[str]]:
    """The tests marked with each argument of `@pytest.mark.KIND(...)`, as "hypervisor/test_backup.py::test_name"."""
    tests: defaultdict[object, set[str]] = defaultdict(set)
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for argument in _arguments(node, kind):
                    tests[argument].add(f"{path.relative_to(TESTS)}::{node.name}")
    return {argument: frozenset(names) for argument, names in tests.items()}


def _arguments(function: ast.FunctionDef, kind: str) -> Iterator[object]:
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == f"pytest.mark.{kind}":
            yield from map(ast.literal_eval, decorator.args)
