"""Manifests that must be refused, by the API server and by BackupSpec.parse alike, and some that must be taken.

A change is a dotted path in a good spec and the value that is put there; the value DROP removes the field.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Change(Enum):
    """What else can be done to a field. In the names of tests it is the same in each process."""

    DROP = "drop"


DROP = Change.DROP


def backup_spec(**changes: Any) -> dict[str, Any]:
    """A good spec with some fields changed, given as nodeName=… or, with dots as in the table, by **{…}."""
    spec: dict[str, Any] = {"nodeName": "node-a", "domain": "web-01", "storeRef": {"name": "local"}}
    for path, value in changes.items():
        *groups, field = path.split(".")
        place = spec
        for group in groups:
            place = place.setdefault(group, {})
        if value is DROP:
            place.pop(field, None)
        else:
            place[field] = copy.deepcopy(value)
    return spec


def backup(name: str, namespace: str = "default", **changes: Any) -> dict[str, Any]:
    return {
        "apiVersion": "vmbackup.dev/v1alpha1",
        "kind": "VMBackup",
        "metadata": {"name": name, "namespace": namespace},
        "spec": backup_spec(**changes),
    }


def store(name: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "vmbackup.dev/v1alpha1",
        "kind": "VMBackupStore",
        "metadata": {"name": name},
        "spec": spec,
    }


def rule(**changes: Any) -> dict[str, Any]:
    """A rule of a VMBackupPolicy that allows the namespace team-a everything, with some fields changed or dropped."""
    good: dict[str, Any] = {"namespaces": ["team-a"], "domains": ["*"], "nodes": ["*"], "stores": ["*"]}
    return {name: value for name, value in (good | changes).items() if value is not DROP}


def policy(name: str, *rules: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "vmbackup.dev/v1alpha1",
        "kind": "VMBackupPolicy",
        "metadata": {"name": name},
        "spec": {"rules": list(rules)},
    }


@dataclass(frozen=True)
class Invalid:
    """`field` and `cure` are what both say; `schema_says` is the cure in the schema's own words where they differ."""

    field: str
    value: Any
    cure: str
    schema_says: str = ""

    def __str__(self) -> str:
        value = "dropped" if self.value is DROP else repr(self.value)
        return f"{self.field}={value[:40]}"


A_NODE = "must be the name of a node"
A_DOMAIN = "must be the name or UUID of a libvirt domain"
A_STORE = "must be the name of a VMBackupStore"
A_TARGET = "must be the target of a disk such as vda"
A_RATE = "must be bytes per second as a quantity such as 200Mi"
A_HIGHER_RATE = "must be at least 1Mi (bytes per second), or left out for no limit"
WHOLE = "must be a whole number from {} to {}"
A_PATH = "must be an absolute path below /, without '.' and '..'"

INVALID_BACKUPS = [
    Invalid("spec.nodeName", DROP, "is required", "Required value"),
    Invalid("spec.nodeName", "", A_NODE),
    Invalid("spec.nodeName", "Node_A", A_NODE),
    Invalid("spec.nodeName", "node-a,x=y", A_NODE),
    Invalid("spec.nodeName", "n" * 254, A_NODE, "Too long"),
    Invalid("spec.domain", DROP, "is required", "Required value"),
    Invalid("spec.domain", "", A_DOMAIN),
    Invalid("spec.domain", "../etc", A_DOMAIN),
    Invalid("spec.domain", "web\n01", A_DOMAIN),
    Invalid("spec.domain", "d" * 256, A_DOMAIN, "Too long"),
    Invalid("spec.domain", 7, A_DOMAIN, "must be of type string"),
    Invalid("spec.storeRef", DROP, "is required", "Required value"),
    Invalid("spec.storeRef", "local", "must be a mapping", "must be of type object"),
    Invalid("spec.storeRef.name", DROP, "is required", "Required value"),
    Invalid("spec.storeRef.name", "/var/lib/store", A_STORE),
    Invalid("spec.disks", [], "must name at least one disk target such as vda; leave disks out for all"),
    Invalid("spec.disks", "vda", "must be a list of disk targets", "must be of type array"),
    Invalid("spec.disks", ["vda", "vda"], "must name each disk target only once", "Duplicate value"),
    Invalid("spec.disks", [""], A_TARGET),
    Invalid("spec.disks", ["vda", "../vdb"], A_TARGET),
    Invalid("spec.disks", [f"vd{number}" for number in range(65)], "must name at most 64 disks", "Too many"),
    Invalid("spec.snapshot", "Try", "must be a mapping", "must be of type object"),
    Invalid("spec.snapshot.quiesce", "Maybe", "Try, Require, Skip", '"Try", "Require", "Skip"'),
    Invalid("spec.snapshot.freezeTimeoutSeconds", 0, WHOLE.format(1, 300), "greater than or equal to 1"),
    Invalid("spec.snapshot.freezeTimeoutSeconds", 301, WHOLE.format(1, 300), "less than or equal to 300"),
    Invalid("spec.copy.bandwidth", "fast", A_RATE),
    Invalid("spec.copy.bandwidth", "", A_RATE),
    Invalid("spec.copy.bandwidth", "200MiB", A_RATE),
    Invalid("spec.copy.bandwidth", True, A_RATE, "must be of type integer"),
    Invalid("spec.copy.bandwidth", 0, A_HIGHER_RATE),
    Invalid("spec.copy.bandwidth", 1048575, A_HIGHER_RATE),
    Invalid("spec.copy.bandwidth", "1023Ki", A_HIGHER_RATE),
    Invalid("spec.copy.bandwidth", "-5Mi", A_HIGHER_RATE),
    Invalid("spec.copy.deadlineSeconds", 0, WHOLE.format(1, 31536000), "greater than or equal to 1"),
    Invalid("spec.copy.deadlineSeconds", 31536001, WHOLE.format(1, 31536000), "less than or equal to 31536000"),
    Invalid("spec.copy.deadlineSeconds", "4h", WHOLE.format(1, 31536000), "must be of type integer"),
    Invalid("spec.commit.bandwidth", "100", A_HIGHER_RATE),
    Invalid("spec.commit.bandwidth", "100 Mi", A_RATE),
    Invalid("spec.commit.deadlineSeconds", -1, WHOLE.format(1, 31536000), "greater than or equal to 1"),
    Invalid("spec.commit.backoffLimit", -1, WHOLE.format(0, 100), "greater than or equal to 0"),
    Invalid("spec.commit.backoffLimit", 101, WHOLE.format(0, 100), "less than or equal to 100"),
    Invalid("spec.commit.stallPolicy", "Abort", "Hold, Throttle, Pause", '"Hold", "Throttle", "Pause"'),
    Invalid("spec.commit.stallPauseSeconds", 0, WHOLE.format(1, 300), "greater than or equal to 1"),
    Invalid("spec.commit.stallPauseSeconds", 301, WHOLE.format(1, 300), "less than or equal to 300"),
    Invalid("spec.commit.offline", "yes", "must be true or false", "must be of type boolean"),
    Invalid("spec.switchPolicy", "guarded", "Guarded, Live", '"Guarded", "Live"'),
    Invalid("spec.deletionPolicy", "Keep", "Retain, Delete", '"Retain", "Delete"'),
    Invalid("spec.ttlSecondsAfterFinished", -1, WHOLE.format(0, 315360000), "greater than or equal to 0"),
    Invalid("spec.ttlSecondsAfterFinished", 315360001, WHOLE.format(0, 315360000), "less than or equal to 315360000"),
    Invalid("spec.bandwidth", "200Mi", "remove them or correct their names", "unknown field"),
    Invalid("spec.snapshot.quiesced", True, "remove them or correct their names", "unknown field"),
    Invalid("spec.storeRef.path", "/var", "remove them or correct their names", "unknown field"),
]

LIVE_PAUSE: dict[str, Any] = {"switchPolicy": "Live", "commit.stallPolicy": "Pause"}
"""Each is valid, both are not."""

INVALID_STORES = [
    Invalid("spec", {}, "directory", "set exactly one kind of store: directory"),
    Invalid("spec", {"directory": {}}, "is required", "Required value"),
    Invalid("spec", {"directory": {"path": ""}}, A_PATH),
    Invalid("spec", {"directory": {"path": "backups"}}, A_PATH),
    Invalid("spec", {"directory": {"path": "/"}}, A_PATH),
    Invalid("spec", {"directory": {"path": "/var/../etc"}}, A_PATH),
    Invalid("spec", {"directory": {"path": "/var/./lib"}}, A_PATH),
    Invalid("spec", {"directory": {"path": "/var/lib/.."}}, A_PATH),
    Invalid("spec", {"directory": {"path": "/" + "d" * 1024}}, A_PATH, "Too long"),
    Invalid("spec", {"s3": {"bucket": "b"}}, "directory", "unknown field"),
]

VALID_BACKUPS: list[dict[str, Any]] = [
    {},
    {"nodeName": "node-a.example.org", "storeRef.name": "s3.cold"},
    {"domain": "Büro PC (alt) #2", "disks": ["vda", "sdB", "hd_1"]},
    {"domain": "5a9c4a3e-3d55-4c39-bd2c-5d9c6b1b51a1"},
    {"snapshot.quiesce": "Require", "snapshot.freezeTimeoutSeconds": 300},
    {"copy.bandwidth": 1048576, "commit.bandwidth": "1Mi"},
    {"copy.bandwidth": "2000000000m", "commit.bandwidth": "1.5e7"},
    {"copy.bandwidth": ".5Gi", "copy.deadlineSeconds": 1},
    {"commit.backoffLimit": 0, "commit.stallPolicy": "Throttle", "commit.offline": True},
    {"commit.stallPolicy": "Pause", "commit.stallPauseSeconds": 300},
    {"switchPolicy": "Live", "commit.stallPolicy": "Throttle"},
    {"switchPolicy": "Live", "deletionPolicy": "Delete", "ttlSecondsAfterFinished": 0},
    {"snapshot": {}, "copy": {}, "commit": {}},
]

A_SELECTOR = "set matchLabels or matchExpressions; for all namespaces"
IN_BOTH = {"namespaceSelector": {"matchLabels": {"team": "a"}}}


def _requirement(**parts: Any) -> dict[str, Any]:
    return {"namespaces": DROP, "namespaceSelector": {"matchExpressions": [{"key": "team", **parts}]}}


INVALID_RULES: list[tuple[dict[str, Any], str]] = [
    ({"namespaces": DROP}, "namespaces"),
    (IN_BOTH, "namespaces"),
    ({"namespaces": []}, "namespaces"),
    ({"namespaces": ["Team_A"]}, "namespaces"),
    ({"namespaces": "team-a"}, "namespaces"),
    ({"namespaces": DROP, "namespaceSelector": {}}, A_SELECTOR),
    (_requirement(operator="Is", values=["a"]), "operator"),
    (_requirement(operator="In"), "values"),
    (_requirement(operator="In", values=[]), "values"),
    ({"domains": DROP}, "domains"),
    ({"domains": []}, "domains"),
    ({"domains": ["a/b"]}, "domains"),
    ({"domains": ["a\nb"]}, "domains"),
    ({"nodes": DROP}, "nodes"),
    ({"nodes": [""]}, "nodes"),
    ({"stores": DROP}, "stores"),
    ({"stores": ["/srv"]}, "stores"),
    ({"operations": []}, "operations"),
    ({"disks": ["vda"]}, "disks"),
]
"""Changes of a rule() that make it invalid, and what the refusal names."""

VALID_RULES: list[dict[str, Any]] = [
    {},
    {"operations": ["Backup"]},
    {"namespaces": ["*"], "domains": ["web-*", "5a9c4a3e-3d55-4c39-bd2c-5d9c6b1b51a1", "Büro [1]"]},
    {"nodes": ["node-?", "hv.example.org"], "stores": ["team-a", "shared*"]},
    {"namespaces": DROP, **IN_BOTH},
    _requirement(operator="NotIn", values=["a", ""]),
    _requirement(operator="Exists"),
]

VALID_PATHS = ["/var/lib/vmbackup/store", "/backup/", "/srv/..hidden/a.b", "/mnt/nas über"]

IMMUTABLE = [
    ("nodeName", "node-b"),
    ("domain", "web-02"),
    ("storeRef", {"name": "other"}),
    ("disks", ["vda"]),
    ("disks", ["vda", "vdb", "vdc"]),
    ("disks", None),
    ("snapshot", {"quiesce": "Skip"}),
    ("snapshot", {"freezeTimeoutSeconds": 11}),
    ("switchPolicy", "Live"),
]
"""Merge patches of the spec of backup(disks=[vda, vdb]); None removes the field."""

MUTABLE = [
    ("copy", {"bandwidth": "1Gi"}),
    ("copy", {"deadlineSeconds": 60}),
    ("commit", {"bandwidth": 104857600}),
    ("commit", {"deadlineSeconds": 60, "backoffLimit": 1, "stallPolicy": "Pause", "offline": True}),
    ("deletionPolicy", "Delete"),
    ("ttlSecondsAfterFinished", 3600),
    ("disks", ["vdb", "vda"]),
]
"""Also so, but taken; disks are a set, so their order says nothing."""
