"""The Helm chart installs what `kubectl apply -k` does: the same objects, from the same files."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from sandbox import binaries
from sandbox.kube import KubeApi
from tests.support.installed import AGENT, MANIFESTS, NAMESPACE, Objects, by_name
from tests.support.manifests import backup
from vmbackup.version import __version__

CHART = MANIFESTS / "chart"
HELMS_OWN_LABELS = ("app.kubernetes.io/managed-by", "helm.sh/chart")
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
CRDS = ("vmbackuppolicies.vmbackup.dev", "vmbackups.vmbackup.dev", "vmbackupstores.vmbackup.dev")


def helm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([binaries.path("helm"), *map(str, arguments)], capture_output=True, text=True, check=False)


def template(chart: Path = CHART, **values: Any) -> Objects:
    """The chart, rendered; `values` by their dotted names, with __ for the dots."""
    flags = [f"--set-json={name.replace('__', '.')}={json.dumps(value)}" for name, value in values.items()]
    done = helm("template", "vmbackup", chart, "--namespace", NAMESPACE, *flags)
    assert done.returncode == 0, done.stderr
    return by_name(done.stdout)


def kustomized(directory: Path) -> Objects:
    done = subprocess.run(
        [binaries.path("kubectl"), "kustomize", directory], capture_output=True, text=True, check=True
    )
    return by_name(done.stdout)


def without(objects: Objects, *labels: str) -> dict[tuple[str, str], Any]:
    """Copies without these labels."""
    plain = copy.deepcopy(dict(objects))
    for each in plain.values():
        for label in labels:
            each["metadata"].get("labels", {}).pop(label, None)
    return plain


@pytest.fixture(scope="module")
def default() -> Objects:
    return template()


def test_it_renders_to_what_kustomize_installs(default: Objects) -> None:
    """But for the namespace, which Helm makes; for Helm's own labels; and for the mark that keeps CRDs."""
    rendered = without(default, *HELMS_OWN_LABELS)
    for name in CRDS:
        assert rendered["CustomResourceDefinition", name]["metadata"].pop("annotations") == {
            "helm.sh/resource-policy": "keep"
        }
    expected = dict(kustomized(MANIFESTS))
    del expected["Namespace", NAMESPACE]
    assert rendered == expected


def test_with_all_options_it_renders_to_what_the_components_add(default: Objects, tmp_path: Path) -> None:
    """But for the labels of the version and of the whole, which a kustomization sets on its own resources alone."""
    components = ("monitoring", "network-policy", "host-network", "metrics-tls", "block-devices")
    kustomization = {
        "resources": [os.path.relpath(MANIFESTS, tmp_path)],
        "components": [os.path.relpath(MANIFESTS / "components" / each, tmp_path) for each in components],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    options = {
        f"{each}__enabled": True
        for each in ("podMonitor", "prometheusRule", "dashboard", "networkPolicy", "blockDevices")
    }
    rendered = template(hostNetwork=True, crds__keep=False, metricsTls__secretName="vmbackup-metrics-tls", **options)
    of_the_whole = (*HELMS_OWN_LABELS, "app.kubernetes.io/version", "app.kubernetes.io/part-of")
    expected = without(kustomized(tmp_path), *of_the_whole)
    del expected["Namespace", NAMESPACE]
    assert sorted_variables(without(rendered, *of_the_whole)) == sorted_variables(expected)
    assert len(rendered) == len(default) + 4


def sorted_variables(objects: Objects) -> Objects:
    """kustomize puts variables, volumes and mounts that a patch adds before the others."""
    pod = objects["DaemonSet", AGENT]["spec"]["template"]["spec"]
    for named in (pod["volumes"], pod["containers"][0]["env"], pod["containers"][0]["volumeMounts"]):
        named.sort(key=lambda each: each["name"])
    return objects


def test_runbooks_of_ones_own_are_named_by_every_alert() -> None:
    usual, own = (
        yaml.safe_dump(template(prometheusRule__enabled=True, **values)["PrometheusRule", "vmbackup"])
        for values in ({}, {"prometheusRule__runbookUrl": "https://wiki.example/"})
    )
    assert usual.count("runbook_url: docs/runbooks/") >= 13
    assert own == usual.replace("docs/runbooks/", "https://wiki.example/")


def test_what_it_installs_says_that_helm_did(default: Objects) -> None:
    for each in default.values():
        assert each["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "Helm"
        assert each["metadata"]["labels"]["helm.sh/chart"] == f"vmbackup-{__version__}"


def test_it_is_of_the_version_of_the_agent() -> None:
    about = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert about["version"] == about["appVersion"] == __version__
    named = [each["name"] for each in yaml.safe_load(about["annotations"]["artifacthub.io/crds"])]
    assert sorted(named) == sorted(CRDS)


def test_the_package_holds_the_same(default: Objects, tmp_path: Path) -> None:
    """In the source the CRDs, rules and dashboard are links to the files of the manifests; a package has them whole."""
    links = [each for each in (CHART / "files").rglob("*") if not each.is_dir()]
    assert len(links) >= 10
    assert all(each.is_symlink() and each.exists() for each in links)
    done = helm("package", CHART, "--destination", tmp_path)
    assert done.returncode == 0, done.stderr
    assert template(tmp_path / f"vmbackup-{__version__}.tgz") == default


def test_helm_finds_nothing_wrong_with_it() -> None:
    done = helm("lint", "--strict", CHART)
    assert done.returncode == 0, done.stdout
    assert "[WARNING]" not in done.stdout


def test_an_older_kubernetes_is_refused() -> None:
    done = helm("template", CHART, "--kube-version=1.30.4")
    assert "which is incompatible with Kubernetes v1.30.4" in done.stderr
    assert helm("template", CHART, "--kube-version=1.31.0").returncode == 0


# Values


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names of all values; a group whose keys are the user's is one value."""
    for name, value in values.items():
        if isinstance(value, dict) and value and schema_of(f"{prefix}{name}").get("properties") and name not in WHOLE:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


WHOLE = ("resources", "seLinuxOptions")  # groups of Kubernetes' own


def schema_of(name: str) -> dict[str, Any]:
    schema = json.loads((CHART / "values.schema.json").read_text())
    for part in name.split("."):
        schema = schema["properties"][part]
    return schema


def test_every_value_is_documented_and_nothing_else_is() -> None:
    table = re.findall(r"^\| `([\w.]+)` \|", (CHART / "README.md").read_text(), re.MULTILINE)
    assert table == list(leaves(VALUES))


def test_every_value_has_a_schema_and_every_schema_a_value() -> None:
    def check(schema: dict[str, Any], values: dict[str, Any], path: str) -> None:
        assert schema["description"], path
        if "properties" not in schema or path.rpartition(".")[2] in WHOLE:
            return
        assert schema["additionalProperties"] is False, path
        assert set(schema["properties"]) - {"global"} == set(values), path
        for name, value in values.items():
            check(schema["properties"][name], value, f"{path}.{name}")

    check(json.loads((CHART / "values.schema.json").read_text()), VALUES, "values")


@pytest.mark.parametrize(
    "wrong",
    [
        "imgae.repository=mine",
        "image.tagg=1",
        "crds.enabled=maybe",
        "hostPaths.images=/one",
        "hostPaths.images[0]=relative/path",
        "image.digest=abc",
        "extraArgs[0]=max-concurrent-backups=4",
        "podMonitor.enabeld=true",
    ],
)
def test_a_typo_is_refused(wrong: str) -> None:
    done = helm("template", CHART, "--set", wrong)
    assert done.returncode != 0
    assert "values don't meet the specifications of the schema" in done.stderr
    assert wrong.partition("=")[0].partition("[")[0].split(".")[0] in done.stderr


def test_without_crds_it_has_none() -> None:
    assert not [name for kind, name in template(crds__enabled=False) if kind == "CustomResourceDefinition"]


def test_crds_go_with_the_release_only_if_they_are_not_to_be_kept() -> None:
    for keep in (True, False):
        rendered = template(crds__keep=keep)
        for name in CRDS:
            metadata = rendered["CustomResourceDefinition", name]["metadata"]
            assert (metadata.get("annotations", {}).get("helm.sh/resource-policy") == "keep") is keep


def test_installed_and_uninstalled_it_leaves_the_crds_and_every_backup_unless_told_otherwise(tmp_path: Path) -> None:
    with KubeApi(tmp_path / "kube") as kube:
        kube.kubectl("create", "namespace", NAMESPACE)

        def release(verb: str, *arguments: str | Path) -> None:
            done = helm(verb, "vmbackup", *arguments, f"--namespace={NAMESPACE}", f"--kubeconfig={kube.kubeconfig}")
            assert done.returncode == 0, done.stderr

        release("install", CHART)
        kube.kubectl("wait", "--for=condition=Established", "--timeout=30s", *(f"crd/{name}" for name in CRDS))
        kube.apply(backup("outlives-the-release"))
        release("uninstall")
        assert kube.kubectl("get", "vmbackup", "-o", "name").strip() == "vmbackup.vmbackup.dev/outlives-the-release"
        assert not kube.kubectl("get", "validatingadmissionpolicies", "-o", "name")
        release("install", CHART)  # takes the CRDs that it had left
        release("upgrade", CHART, "--set=crds.keep=false")
        assert kube.get("vmbackup", "outlives-the-release")
        release("uninstall")
        kube.kubectl("wait", "--for=delete", "--timeout=30s", *(f"crd/{name}" for name in CRDS))


def pod(**values: Any) -> dict[str, Any]:
    return template(**values)["DaemonSet", AGENT]["spec"]["template"]["spec"]


@pytest.mark.parametrize(
    ("image", "named"),
    [
        ({"repository": "mine/vmbackup"}, f"mine/vmbackup:{__version__}"),
        ({"tag": "edge"}, "vmbackup:edge"),
        ({"tag": "edge", "digest": f"sha256:{'0' * 64}"}, f"vmbackup@sha256:{'0' * 64}"),
    ],
)
def test_the_image_is_named_by_tag_or_by_digest(image: dict[str, str], named: str) -> None:
    assert pod(image=image)["containers"][0]["image"] == named


def test_every_directory_of_images_and_stores_is_mounted_under_its_own_path() -> None:
    images, stores = ["/images", "/srv/more"], ["/mnt/nfs", "/backup"]
    made = pod(hostPaths__images=images, hostPaths__stores=stores)
    mounts = {mount["name"]: mount["mountPath"] for mount in made["containers"][0]["volumeMounts"]}
    paths = {volume["name"]: volume["hostPath"]["path"] for volume in made["volumes"] if "hostPath" in volume}
    assert {*images, *stores} <= set(paths.values())
    assert all(mounts[name] == path for name, path in paths.items())
    roots = {"name": "VMBACKUP_IMAGE_ROOTS", "value": ":".join(images)}
    assert roots in made["containers"][0]["env"]


def test_every_other_value_of_the_pod_gets_there() -> None:
    made = pod(
        extraArgs=["--max-concurrent-backups=4"],
        extraEnv=[{"name": "VMBACKUP_LOG_LEVEL", "value": "debug"}],
        extraVolumes=[{"name": "more", "emptyDir": {}}],
        extraVolumeMounts=[{"name": "more", "mountPath": "/more"}],
        imagePullSecrets=[{"name": "login"}],
        hostPaths__nvram="",
        hostPaths__libvirtSocket="/var/run/libvirt",
        tolerations=[],
        priorityClassName="",
        seLinuxOptions={"type": None},
    )
    (container,) = made["containers"]
    assert container["args"] == ["agent", "--max-concurrent-backups=4"]
    assert {"name": "VMBACKUP_LOG_LEVEL", "value": "debug"} in container["env"]
    assert {"name": "more", "emptyDir": {}} in made["volumes"]
    assert {"name": "more", "mountPath": "/more"} in container["volumeMounts"]
    assert made["imagePullSecrets"] == [{"name": "login"}]
    assert not [volume for volume in made["volumes"] if volume["name"] == "libvirt-nvram"]
    assert made["volumes"][0]["hostPath"]["path"] == "/var/run/libvirt"
    assert not made.keys() & {"tolerations", "priorityClassName"}
    assert "seLinuxOptions" not in made["securityContext"]


def test_labels_and_annotations_get_where_they_are_looked_for() -> None:
    made = template(
        podMonitor={"enabled": True, "labels": {"release": "mine"}},
        prometheusRule={"enabled": True, "labels": {"release": "mine"}},
        dashboard={"enabled": True, "label": "board", "labelValue": "yes", "annotations": {"folder": "VMs"}},
        networkPolicy={
            "enabled": True,
            "metricsFromNamespace": {"team": "observers", "kubernetes.io/metadata.name": None},
        },
        podLabels={"team": "virtual"},
        podAnnotations={"note": "1"},
    )
    assert made["PodMonitor", AGENT]["metadata"]["labels"]["release"] == "mine"
    assert made["PrometheusRule", "vmbackup"]["metadata"]["labels"]["release"] == "mine"
    board = made["ConfigMap", "vmbackup-dashboard"]["metadata"]
    assert board["labels"]["board"] == "yes"
    assert board["annotations"]["folder"] == "VMs"
    (come,) = made["NetworkPolicy", AGENT]["spec"]["ingress"]
    assert come["from"] == [{"namespaceSelector": {"matchLabels": {"team": "observers"}}}]
    metadata = made["DaemonSet", AGENT]["spec"]["template"]["metadata"]
    assert metadata["labels"]["team"] == "virtual"
    assert metadata["annotations"]["note"] == "1"


def test_metrics_by_tls_are_scraped_for_the_name_that_the_certificate_is_for() -> None:
    tls = {"secretName": "mine", "serverName": "agents.example"}
    made = template(podMonitor__enabled=True, metricsTls=tls)
    (endpoint,) = made["PodMonitor", AGENT]["spec"]["podMetricsEndpoints"]
    assert endpoint["scheme"] == "https"
    assert endpoint["tlsConfig"] == {
        "serverName": "agents.example",
        "ca": {"secret": {"name": "mine", "key": "ca.crt"}},
    }
    assert endpoint["port"] == "metrics"


def test_another_namespace_is_taken_everywhere() -> None:
    done = helm("template", "vmbackup", CHART, "--namespace=other", *[
        f"--set={each}.enabled=true" for each in ("podMonitor", "prometheusRule", "dashboard", "networkPolicy")
    ])  # fmt: skip
    assert NAMESPACE not in re.sub(
        r"^ *(- )?(description|message|expr|.*Expression):.*$", "", done.stdout, flags=re.MULTILINE
    )


def test_the_server_takes_all_of_it(installed: KubeApi) -> None:
    """Also what only an option brings, but for what is the Prometheus operator's."""
    made = template(
        dashboard__enabled=True,
        networkPolicy__enabled=True,
        hostNetwork=True,
        metricsTls__secretName="mine",
        blockDevices__enabled=True,
    )
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(made.values())})
    installed.kubectl("apply", "--dry-run=server", "-f", "-", stdin=text)
