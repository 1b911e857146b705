"""What CRDs promise from one version to the next (docs/upgrades.md)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.crds import CRDS, RELEASED, Crd, load, taken_away

NEW = load(CRDS)


@pytest.mark.parametrize("released", RELEASED, ids=lambda path: path.name)
def test_nothing_that_an_earlier_version_gave_is_taken_away(released: Any) -> None:
    for plural, old in load(released).items():
        assert taken_away(old, NEW[plural]) == [], plural


@pytest.mark.parametrize("plural", NEW)
def test_one_version_is_stored_and_each_is_served(plural: str) -> None:
    versions = NEW[plural]["spec"]["versions"]
    assert [version["name"] for version in versions if version["storage"]] == ["v1alpha1"]
    assert all(version["served"] for version in versions)


def spec(crd: Crd) -> dict[str, Any]:
    return crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]


def fields(crd: Crd) -> dict[str, Any]:
    return spec(crd)["properties"]


CHANGES: list[tuple[str, Callable[[Crd], object]]] = [
    ("v1alpha1.spec.copy is gone", lambda crd: fields(crd).pop("copy")),
    ("v1alpha1.spec.disks is required", lambda crd: spec(crd)["required"].append("disks")),
    ("v1alpha1.spec.domain: maxLength is 63, was 255", lambda crd: fields(crd)["domain"].update(maxLength=63)),
    ("v1alpha1.spec.domain: minLength is 2, was None", lambda crd: fields(crd)["domain"].update(minLength=2)),
    ("v1alpha1.spec.domain: another pattern", lambda crd: fields(crd)["domain"].update(pattern="^web")),
    ("v1alpha1.spec.domain: type is integer, was string", lambda crd: fields(crd)["domain"].update(type="integer")),
    (
        "v1alpha1.spec.switchPolicy: not every value is allowed any more",
        lambda crd: fields(crd)["switchPolicy"].update(enum=["Guarded"]),
    ),
    (
        "v1alpha1.spec.deletionPolicy: default is Delete, was Retain",
        lambda crd: fields(crd)["deletionPolicy"].update(default="Delete"),
    ),
    (
        "v1alpha1.spec.disks[]: maxLength is 3, was 32",
        lambda crd: fields(crd)["disks"]["items"].update(maxLength=3),
    ),
    (
        "v1alpha1.spec.copy: a new rule: has(self.bandwidth)",
        lambda crd: fields(crd)["copy"].update({"x-kubernetes-validations": [{"rule": "has(self.bandwidth)"}]}),
    ),
    ("version v1alpha1 is not served", lambda crd: crd["spec"]["versions"][0].update(served=False)),
    ("version v1alpha1 is gone", lambda crd: crd["spec"]["versions"][0].update(name="v1beta1")),
    ("version v1alpha1 has lost a subresource", lambda crd: crd["spec"]["versions"][0].pop("subresources")),
    (".status.phase cannot be selected by", lambda crd: crd["spec"]["versions"][0]["selectableFields"].pop()),
    ("vmb is not among shortNames", lambda crd: crd["spec"]["names"].update(shortNames=["vmbk"])),
    ("scope is Cluster", lambda crd: crd["spec"].update(scope="Cluster")),
]


@pytest.mark.parametrize(("says", "change"), CHANGES, ids=[says for says, _ in CHANGES])
def test_what_is_taken_away_is_noticed(says: str, change: Callable[[Crd], object]) -> None:
    changed = copy.deepcopy(NEW["vmbackups"])
    change(changed)
    assert taken_away(NEW["vmbackups"], changed) == [says]


def test_what_is_added_or_loosened_is_fine() -> None:
    changed = copy.deepcopy(NEW["vmbackups"])
    fields(changed)["hooks"] = {"type": "object"}
    fields(changed)["domain"]["maxLength"] = 300
    fields(changed)["switchPolicy"]["enum"].append("Brave")
    spec(changed)["required"].remove("storeRef")
    changed["spec"]["versions"].append({"name": "v1beta1", "served": True, "storage": False})
    assert taken_away(NEW["vmbackups"], changed) == []
