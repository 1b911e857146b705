"""Custom resource definitions of this and of earlier versions, and what a newer one takes away."""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

Crd = dict[str, Any]
Schema = Mapping[str, Any]

ROOT = Path(__file__).parents[2]
CRDS = ROOT / "crds"
RELEASED = sorted((Path(__file__).parents[1] / "data").glob("crds-*"))
"""The CRDs of each version that came before, as they were."""

_UPPER = ("maximum", "maxLength", "maxItems", "maxProperties")
_LOWER = ("minimum", "minLength", "minItems", "minProperties")
_KEPT = (
    "type",
    "format",
    "default",
    "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys",
    "x-kubernetes-int-or-string",
)
_RULES = "x-kubernetes-validations"


def load(directory: Path) -> dict[str, Crd]:
    """The CRDs in a directory, by the name of the resource."""
    found = [yaml.safe_load(path.read_text()) for path in sorted(directory.glob("*.yaml"))]
    return {crd["spec"]["names"]["plural"]: crd for crd in found if crd["kind"] == "CustomResourceDefinition"}


def commit_before() -> str:
    """The commit before the last one that changed them; empty where the history does not go so far, or is not there."""
    last = _git("log", "-1", "--format=%H", "--", "crds/*.yaml")
    return _git("rev-parse", "--short", "--verify", "--quiet", f"{last}^") if last else ""


def of_commit(commit: str, directory: Path) -> Path:
    """Write those of a commit below a directory; where they are."""
    packed = subprocess.run(["git", "archive", commit, "crds"], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as files:
        files.extractall(directory, filter="data")
    return directory / "crds"


def _git(*words: str) -> str:
    """What git says; nothing where it fails, as in an export without a history."""
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def taken_away(old: Crd, new: Crd) -> list[str]:
    """What an object, a client or a manifest of the old definition could rely on, and in the new one cannot."""
    return [*_of_names(old["spec"], new["spec"]), *_of_versions(old["spec"], new["spec"])]


def _of_names(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for field in ("group", "scope"):
        if new[field] != old[field]:
            yield f"{field} is {new[field]}"
    for field in ("plural", "singular", "kind", "listKind"):
        if new["names"][field] != old["names"][field]:
            yield f"{field} is {new['names'][field]}"
    for field in ("shortNames", "categories"):
        for name in set(old["names"].get(field, ())) - set(new["names"].get(field, ())):
            yield f"{name} is not among {field}"


def _of_versions(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    versions = {version["name"]: version for version in new["versions"]}
    for before in old["versions"]:
        name = before["name"]
        after = versions.get(name)
        if after is None:
            yield f"version {name} is gone"
            continue
        if before["served"] and not after["served"]:
            yield f"version {name} is not served"
        if before.get("subresources", {}).keys() - after.get("subresources", {}).keys():
            yield f"version {name} has lost a subresource"
        for field in before.get("selectableFields", ()):
            if field not in after.get("selectableFields", ()):
                yield f"{field['jsonPath']} cannot be selected by"
        yield from _tightened(before["schema"]["openAPIV3Schema"], after["schema"]["openAPIV3Schema"], name)


def _tightened(old: Schema, new: Schema, path: str) -> Iterator[str]:
    """What the old schema takes and the new one may refuse, or would take for something else."""
    for word in _KEPT:
        if old.get(word) != new.get(word):
            yield f"{path}: {word} is {new.get(word)}, was {old.get(word)}"
    for words, tighter in ((_UPPER, min), (_LOWER, max)):
        for word in words:
            if word in new and (word not in old or tighter(old[word], new[word]) != old[word]):
                yield f"{path}: {word} is {new[word]}, was {old.get(word)}"
    if "pattern" in new and new["pattern"] != old.get("pattern"):
        yield f"{path}: another pattern"
    if "enum" in new and ("enum" not in old or set(old["enum"]) - set(new["enum"])):
        yield f"{path}: not every value is allowed any more"
    for name in set(new.get("required", ())) - set(old.get("required", ())):
        yield f"{path}.{name} is required"
    rules = [rule["rule"].split() for rule in old.get(_RULES, ())]
    for rule in new.get(_RULES, ()):
        if rule["rule"].split() not in rules:
            yield f"{path}: a new rule: {rule['rule']}"
    yield from _below(old, new, path)


def _below(old: Schema, new: Schema, path: str) -> Iterator[str]:
    for name, before in old.get("properties", {}).items():
        after = new.get("properties", {}).get(name)
        if after is None:
            yield f"{path}.{name} is gone"
        else:
            yield from _tightened(before, after, f"{path}.{name}")
    for name in ("items", "additionalProperties"):
        if name in old:
            yield from _tightened(old[name], new.get(name, {}), f"{path}[]")
