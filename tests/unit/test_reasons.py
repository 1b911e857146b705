"""docs/operations.md explains every reason that a condition or event can carry, and none that there is not."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from vmbackup.api.status import Phase, Reason
from vmbackup.errors import Cause

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "operator" / "vmbackup"
OPERATIONS = ROOT / "docs" / "operations.md"

_WORD = re.compile(r"[A-Z][A-Za-z]+")
_OF_SEVERAL_WORDS = re.compile(r"[A-Z][a-z]*(?:[A-Z]+[a-z]*)+")

# Texts of several words written as reasons are, which are something else. One that is a reason never belongs here.
NO_REASONS = {
    "BackupComplete", "ChainClean",  # conditions
    "JobFailed", "PivotFailed",  # labels of vmbackup_commit_retries_total
    "OnOverlay", "BackedUp", "LeftOut",  # states of a disk
    "DoesNotExist", "NotIn",  # of a namespaceSelector
    "BearerToken", "DeleteOptions", "VMBackup", "VMBackupStore", "CopyControl",  # names of Kubernetes, and of ours
    "KiB", "MiB", "GiB",
}  # fmt: skip


def test_every_reason_of_the_code_is_explained_and_nothing_else() -> None:
    explained = set(_explained())
    reasons = _reasons()
    assert sorted(reasons - explained) == []
    assert sorted(explained - reasons) == []


def test_what_is_no_reason_is_in_the_code() -> None:
    assert sorted(NO_REASONS - {text for tree in _trees() for text in _texts(tree)}) == []


def _explained() -> Iterator[str]:
    text = OPERATIONS.read_text()
    section = text[text.index("## What a reason means") : text.index("## How long a guest may be suspended or frozen")]
    for line in section.splitlines():
        if line.startswith("| `"):
            yield from re.findall(r"`([A-Z][A-Za-z]+)`", line.split(" | ")[0])


def _reasons() -> set[str]:
    """Whatever is written where a reason belongs, and all that is written as a reason is, wherever it stands."""
    found = {each.value for kind in (Reason, Phase, Cause) for each in kind}
    for tree in _trees():
        found.update(text for text in _texts(tree) if _OF_SEVERAL_WORDS.fullmatch(text) and not text.isupper())
        for place in _places(tree):
            found.update(text for text in _texts(place) if _WORD.fullmatch(text))
    return found - NO_REASONS


def _trees() -> list[ast.Module]:
    return [ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))]


def _places(tree: ast.Module) -> Iterator[ast.expr]:
    """The expressions of `reason=`, of `default_reason =`, the first of event(…), and the second of _Meaning(…)."""
    for node in ast.walk(tree):
        match node:
            case ast.keyword(arg="reason", value=value):
                yield value
            case ast.Assign(targets=[ast.Name(id="default_reason")], value=value):
                yield value
            case ast.Call(func=ast.Attribute(attr="event"), args=[value, *_]):
                yield value
            case ast.Call(func=ast.Name(id="_Meaning"), args=[_, value, _]):
                yield value
            case _:
                pass


def _texts(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
