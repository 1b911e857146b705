"""VMBackups of every moment as an API server has them: the agent's own rendering, the server's defaults.

    python -m tests.gitops.stored

writes them again as the test data of Argo CD's health check.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from sandbox.kube import KubeApi
from tests.support.judge import HEALTH_CHECK
from tests.support.manifests import backup
from tests.support.moments import HEALTH, MOMENTS
from vmbackup.api.identity import BackupId
from vmbackup.api.names import BACKUPS, FINALIZER
from vmbackup.api.resource import with_generation
from vmbackup.api.status import Outcome, Phase, Reason, Report
from vmbackup.cluster.client import Cluster, load_client
from vmbackup.cluster.status import render

NAMESPACE = "moments"
NOW = 1_750_000_000.0  # seconds since the epoch
HOOK = {"finalizers": ["argocd.argoproj.io/hook-finalizer"], "annotations": {"argocd.argoproj.io/hook": "PreSync"}}
TESTDATA = HEALTH_CHECK.parent / "testdata"

_CRDS = Path(__file__).parents[2] / "crds"
_FIXED = {"creationTimestamp": "2025-06-15T15:06:00Z", "deletionTimestamp": "2025-06-15T15:07:00Z"}
_OF_THE_SERVER = ("uid", "resourceVersion", "managedFields", "deletionGracePeriodSeconds")


@dataclass(frozen=True)
class Case:
    """What happens to a VMBackup. `report`: None if no agent has seen it yet."""

    name: str
    report: Report | None
    verdict: str
    health: str
    metadata: Mapping[str, Any]
    edited: bool = False
    noted: bool = False
    deleted: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def slug(self) -> str:
        """Its name as that of an object and a file."""
        return re.sub("[^a-z]+", "-", self.name)


def _case(name: str, moment: str, verdict: str, health: str, **more: Any) -> Case:
    report = next((each.report for each in MOMENTS if each.name == moment), None)
    return Case(name, report, verdict, health, **({"metadata": {}} | more))


_HELD, _HELD_HOOK = {"finalizers": [FINALIZER]}, {**HOOK, "finalizers": [*HOOK["finalizers"], FINALIZER]}
_DELETED = Report(
    phase=Phase.FAILED,
    reason=Reason.DELETED,
    message="the VMBackup was deleted",
    outcome=Outcome.DELETED,
    backup_complete=False,
    chain_clean=True,
)

CASES = [
    *(_case(each.name, each.name, each.verdict, HEALTH[each.verdict]) for each in MOMENTS),
    _case("not seen by any agent", "", "InProgress", "Progressing"),
    _case("edited after the end", "done", "InProgress", "Progressing", edited=True),
    _case("edited after the end and noted", "done", "Current", "Healthy", edited=True, noted=True),
    _case("deleted while copying", "copy", "Terminating", "Progressing", metadata=_HELD, deleted=True),
    _case("deleted after the end", "done", "Terminating", "Progressing", metadata=_HELD, deleted=True),
    _case("hook copying", "copy", "InProgress", "Progressing", metadata=_HELD_HOOK),
    _case("hook done", "done", "Current", "Healthy", metadata=HOOK),
    _case("hook done and expired", "done", "Terminating", "Healthy", metadata=HOOK, deleted=True),
    _case("hook failed and deleted", "shipping failed", "Terminating", "Degraded", metadata=HOOK, deleted=True),
    _case("hook deleted while copying", "copy", "Terminating", "Progressing", metadata=_HELD_HOOK, deleted=True),
    replace(_case("hook deleted", "", "Terminating", "Degraded", metadata=HOOK, deleted=True), report=_DELETED),
]


def stored(kube: KubeApi) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Each case, and its object as the API server gives it after all that."""
    kube.kubectl("create", "namespace", NAMESPACE)
    cluster = Cluster(load_client(str(kube.kubeconfig)))
    kube.apply(*map(_manifest, CASES))
    for case in CASES:
        _happen(kube, cluster, case)
    for case in CASES:
        yield case, _get(cluster, case)


def _manifest(case: Case) -> dict[str, Any]:
    made = backup(case.slug, NAMESPACE, nodeName="nobody")
    return {**made, "metadata": {**made["metadata"], **case.metadata}}


def _happen(kube: KubeApi, cluster: Cluster, case: Case) -> None:
    found = _get(cluster, case)
    status = None
    if case.report is not None:
        status = render(case.report, generation=1, previous=found["status"], now=NOW)
        cluster.put_status(BackupId.of(found), status)
    if case.edited:
        patch = '{"spec": {"copy": {"bandwidth": "10Mi"}}}'
        kube.kubectl("patch", "vmb", case.slug, "-n", NAMESPACE, "--type=merge", "-p", patch)
    if case.noted and status:
        cluster.put_status(BackupId.of(found), with_generation(status, 2))
    if case.deleted:
        cluster.delete(BackupId.of(found))


def _get(cluster: Cluster, case: Case) -> dict[str, Any]:
    found = cluster.get(BACKUPS, NAMESPACE, case.slug)
    assert found is not None
    return found


def as_testdata(found: Mapping[str, Any]) -> str:
    """The object as a file, without what is another each time."""
    metadata = {name: value for name, value in found["metadata"].items() if name not in _OF_THE_SERVER}
    metadata |= {name: value for name, value in _FIXED.items() if name in metadata}
    annotations = {k: v for k, v in metadata.pop("annotations", {}).items() if not k.startswith("kubectl.")}
    if annotations:
        metadata["annotations"] = annotations
    return yaml.safe_dump({**found, "metadata": metadata}, sort_keys=False, width=120)


def main() -> None:
    directory = Path(tempfile.mkdtemp(prefix="vmb-"))
    try:
        with KubeApi(directory) as kube:
            kube.apply_crds(_CRDS)
            files = {f"{case.slug}.yaml": as_testdata(found) for case, found in stored(kube)}
    finally:
        shutil.rmtree(directory)
    shutil.rmtree(TESTDATA, ignore_errors=True)
    TESTDATA.mkdir()
    for name, text in files.items():
        (TESTDATA / name).write_text(text)


if __name__ == "__main__":
    main()
