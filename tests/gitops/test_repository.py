"""The sample repository for Argo CD and Flux is one that an API server takes, and that both tools can build."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sandbox.kube import KubeApi

GITOPS = Path(__file__).parents[2] / "manifests/gitops"
MANIFESTS = GITOPS.parent
REPOSITORY = GITOPS / "repository"
FOREIGN = {
    # As their CRDs have it (argo-cd manifests/crds, kustomize-controller config/crd), as far as we use it.
    "argoproj.io/v1alpha1 Application": {"project", "source", "sources", "destination", "syncPolicy"},
    "kustomize.toolkit.fluxcd.io/v1 Kustomization": {
        *("dependsOn", "interval", "retryInterval", "path", "prune", "wait", "timeout", "sourceRef"),
    },
}


def documents(*paths: Path) -> Iterator[dict[str, Any]]:
    for path in paths:
        yield from (each for each in yaml.safe_load_all(path.read_text()) if each)


def sources(tool: dict[str, Any]) -> list[str]:
    """The directories that an Application or a Kustomization of Flux applies."""
    spec = tool["spec"]
    found = [spec.get("path"), spec.get("source", {}).get("path"), *(each["path"] for each in spec.get("sources", ()))]
    return [path.removeprefix("./") for path in found if path]


TOOLS = list(documents(GITOPS / "argo-cd/applications.yaml", GITOPS / "flux/kustomizations.yaml"))
OURS = sorted(path for path in REPOSITORY.rglob("*.yaml") if "vmbackup.dev/" in path.read_text().split("kind:")[0])


@pytest.fixture(scope="module")
def team(kube: KubeApi) -> None:
    """The namespace of the sample is there."""
    kube.kubectl("apply", "-f", REPOSITORY / "backup/namespaces.yaml")


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_the_api_server_takes_what_is_ours(kube: KubeApi, team: None, path: Path) -> None:
    said = kube.kubectl("create", "--dry-run=server", "--validate=strict", "-f", path)
    assert "created (server dry run)" in said


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: f"{tool['kind']}-{tool['metadata']['name']}")
def test_each_tool_reads_a_directory_that_is_there_and_says_only_what_it_understands(tool: dict[str, Any]) -> None:
    assert set(tool["spec"]) <= FOREIGN[f"{tool['apiVersion']} {tool['kind']}"]
    assert sources(tool)
    for path in sources(tool):
        assert list((GITOPS / path).glob("*.yaml"))
    known = {each["metadata"]["name"] for each in TOOLS if each["kind"] == tool["kind"]}
    assert {each["name"] for each in tool["spec"].get("dependsOn", ())} <= known


def test_both_tools_apply_the_same_but_for_how_they_take_a_backup() -> None:
    by_kind: dict[str, set[str]] = {}
    for tool in TOOLS:
        by_kind.setdefault(tool["kind"], set()).update(path.split("/", 1)[1] for path in sources(tool))
    common = {"operator", "backup", "web"}
    assert by_kind == {"Application": common | {"web-presync"}, "Kustomization": common | {"web-backup"}}


@pytest.mark.parametrize("name", ["backup", "web-backup"])
def test_kustomize_builds_it(kube: KubeApi, name: str) -> None:
    assert list(yaml.safe_load_all(kube.kubectl("kustomize", REPOSITORY / name)))


def test_no_tool_may_delete_the_definitions(kube: KubeApi, tmp_path: Path) -> None:
    directory = shutil.copytree(REPOSITORY / "operator", tmp_path / "operator")
    (directory / "install.yaml").write_text(kube.kubectl("kustomize", MANIFESTS))
    built = list(yaml.safe_load_all(kube.kubectl("kustomize", directory)))
    definitions = [each["metadata"] for each in built if each["kind"] == "CustomResourceDefinition"]
    assert {each["name"] for each in definitions} >= {"vmbackups.vmbackup.dev", "vmbackupstores.vmbackup.dev"}
    for each in definitions:
        assert each["annotations"]["argocd.argoproj.io/sync-options"] == "Prune=false,Delete=false"
        assert each["annotations"]["kustomize.toolkit.fluxcd.io/prune"] == "disabled"
    assert {each["kind"] for each in built} >= {"DaemonSet", "ClusterRole"}


def test_what_deletes_itself_is_no_plain_object_in_git() -> None:
    for path in OURS:
        for each in documents(path):
            if "ttlSecondsAfterFinished" in each["spec"]:
                assert "generateName" in each["metadata"]
                assert each["metadata"]["annotations"]["argocd.argoproj.io/hook"] == "PreSync"


def test_no_backup_of_the_sample_takes_its_data_along_when_it_is_pruned() -> None:
    backups = [each for path in OURS for each in documents(path) if each["kind"] == "VMBackup"]
    assert len(backups) == 2
    assert all(each["spec"].get("deletionPolicy", "Retain") == "Retain" for each in backups)
