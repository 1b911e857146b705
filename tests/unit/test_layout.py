"""The tree keeps its shape: small folders, small modules, plain names, and tests that do not lean on one another."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
OPERATOR = ROOT / "operator"
PACKAGE = OPERATOR / "vmbackup"
MODULES = sorted(OPERATOR.rglob("*.py"))
MOST_MODULES = 12  # in a folder of vmbackup
MOST_LINES = 400  # in a module
# Words of 0.1.0 that are no names any more. Plain English took their place.
RETIRED = ("premises", "stranded", "doomed", "departed", "wish", "narration", "orphanage", "presence", "alone")
PHRASES = {"leave_others_alone"}  # in which such a word is plain English


def test_no_folder_has_more_modules_than_a_reader_can_hold() -> None:
    modules = Counter(path.parent for path in MODULES if path.name != "__init__.py" and PACKAGE in path.parents)
    assert not [f"{folder}: {n}" for folder, n in modules.items() if n > MOST_MODULES]


def test_no_module_is_too_long() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in MODULES}
    assert not [f"{path}: {n}" for path, n in lengths.items() if n > MOST_LINES]


@pytest.mark.parametrize("word", RETIRED)
def test_a_retired_word_names_nothing(word: str) -> None:
    names = {(path, name) for path in MODULES for name in (path.stem, *_identifiers(path))}
    assert not [f"{path}: {name}" for path, name in sorted(names) if word in _words(name) and name not in PHRASES]


def test_no_test_module_is_imported() -> None:
    modules = [path for folder in ("tests", "sandbox", "bench") for path in (ROOT / folder).rglob("*.py")]
    assert not [f"{path}: {name}" for path in modules for name in _imports(path) if re.search(r"(^|\.)test_", name)]


def _words(identifier: str) -> list[str]:
    """The words of `an_identifier` or `AnIdentifier`, in lower case."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", identifier)]


def _identifiers(path: Path) -> Iterator[str]:
    """Names that a module defines or uses."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                yield name
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.keyword(arg=str(name)):
                yield name
            case ast.alias(name=name, asname=asname):
                yield from filter(None, (*name.split("."), asname))
            case _:
                pass


def _imports(path: Path) -> Iterator[str]:
    """Modules, and names of modules, that a module imports, with dots."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)
