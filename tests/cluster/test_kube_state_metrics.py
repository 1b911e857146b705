"""What a real kube-state-metrics shows of VMBackups with our configuration, and what the alerts ask of it."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from sandbox import binaries
from sandbox.kube import KubeApi
from sandbox.processes import Program
from tests.agents import SECONDS, Agent, VMBackup, free_port
from tests.domains import DomainFactory, wait_until
from tests.manifests import backup

COMPONENT = Path(__file__).parent.parent.parent / "manifests/components/monitoring"
ROLE = {
    "apiVersion": "rbac.authorization.k8s.io/v1",
    "kind": "ClusterRole",
    "metadata": {"name": "kube-state-metrics"},
    "rules": [
        {"apiGroups": ["vmbackup.dev"], "resources": ["vmbackups"], "verbs": ["get", "list", "watch"]},
        {
            "apiGroups": ["apiextensions.k8s.io"],
            "resources": ["customresourcedefinitions"],
            "verbs": ["get", "list", "watch"],
        },
    ],
}
"""What the head of kube-state-metrics.yaml asks for."""

Shown = Callable[[VMBackup], dict[str, list[tuple[dict[str, str], float]]]]
"""What is shown of a VMBackup: labels and values, by the name of the metric."""


@pytest.fixture
def shown(kube: KubeApi, tmp_path: Path) -> Iterator[Shown]:
    user = {"kind": "User", "name": "kube-state-metrics", "apiGroup": "rbac.authorization.k8s.io"}
    role = {"kind": "ClusterRole", "name": "kube-state-metrics", "apiGroup": "rbac.authorization.k8s.io"}
    binding = {**ROLE, "kind": "ClusterRoleBinding", "subjects": [user], "roleRef": role}
    del binding["rules"]
    kube.apply(ROLE, binding)
    port = free_port()
    program = Program("kube-state-metrics", tmp_path)
    program.start(
        [
            binaries.path("kube-state-metrics"),
            f"--kubeconfig={kube.kubeconfig_for('kube-state-metrics')}",
            f"--custom-resource-state-config-file={COMPONENT / 'kube-state-metrics.yaml'}",
            "--custom-resource-state-only",
            "--host=127.0.0.1",
            f"--port={port}",
            "--telemetry-host=127.0.0.1",
            f"--telemetry-port={free_port()}",
        ]
    )
    program.wait_until(lambda: get(port, "/healthz") is not None, seconds=SECONDS)

    def look(made: VMBackup) -> dict[str, list[tuple[dict[str, str], float]]]:
        found: dict[str, list[tuple[dict[str, str], float]]] = {}
        for family in text_string_to_metric_families(get(port, "/metrics") or ""):
            for sample in family.samples:
                if (sample.labels.get("namespace"), sample.labels.get("name")) == (made.namespace, made.name):
                    found.setdefault(sample.name, []).append((sample.labels, sample.value))
        return found

    yield look
    program.stop()


def get(port: int, path: str) -> str | None:
    """What it answers; None while it does not."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.read().decode()
    except OSError:
        return None


def test_it_shows_what_the_alerts_ask_of_objects(
    kube: KubeApi, agent: Agent, domain: DomainFactory, shown: Shown
) -> None:
    lost = VMBackup(kube, "nobody-takes-it")
    kube.apply(backup(lost.name, nodeName="no-such-node", domain="web-01"))
    taken = agent.apply(domain().name)
    taken.wait()
    kube.kubectl("patch", "vmbackup", lost.name, "--type=merge", "-p", '{"metadata": {"finalizers": ["a.test/hold"]}}')
    lost.delete("--wait=false")

    def settled() -> bool:
        return "kube_vmbackup_deletion_timestamp" in shown(lost) and 1 in values(taken, "condition", "Ready")

    def values(made: VMBackup, what: str, kind: str) -> list[float]:
        samples = shown(made).get(f"kube_vmbackup_status_{what}", [])
        return [value for labels, value in samples if kind in labels.values()]

    wait_until(settled, "all is shown", SECONDS)
    assert values(lost, "observed_generation", lost.name) == [-1]
    assert values(taken, "observed_generation", taken.name) == [1]
    assert values(lost, "phase", "Pending") == [1]
    assert values(taken, "phase", "Pivoted") == [1]
    assert values(lost, "condition", "Ready") == [0]
    assert values(taken, "condition", "ChainClean") == [1]
    (info,) = shown(taken)["kube_vmbackup_info"]
    assert info[0].items() >= {"node": agent.node, "store": agent.node, "domain": taken.get()["spec"]["domain"]}.items()
    assert asked_for() <= set(shown(taken)) | set(shown(lost))
    lost.strip_finalizers()


def asked_for() -> set[str]:
    """The metrics of objects that alerts and dashboard use."""
    return {
        name
        for file in ("prometheusrule.yaml", "dashboard.json")
        for name in re.findall(r"\bkube_vmbackup_\w+", (COMPONENT / file).read_text())
    }


def test_each_metric_of_the_configuration_names_a_field_that_there_is() -> None:
    (crd,) = yaml.safe_load_all((COMPONENT.parent.parent.parent / "crds/vmbackups.yaml").read_text())
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    (resource,) = yaml.safe_load((COMPONENT / "kube-state-metrics.yaml").read_text())["spec"]["resources"]
    for metric in resource["metrics"]:
        (each,) = [value for name, value in metric["each"].items() if name != "type"]
        group, *rest = each.get("path") or each["labelsFromPath"]["store"]
        if group == "metadata":
            continue
        place = schema[group]
        for name in rest:
            place = place["properties"][name]
        assert set(each.get("list", ())) == set(place.get("enum", ()))
