"""What a real kube-state-metrics shows of VMBackups with our configuration, and what the alerts ask of it."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from sandbox.kube import KubeApi
from tests.support.agents import SECONDS, Agent, VMBackup
from tests.support.domains import DomainFactory, wait_until
from tests.support.manifests import backup

COMPONENT = Path(__file__).parent.parent.parent / "manifests/components/monitoring"
Shown = Callable[[VMBackup], dict[str, list[tuple[dict[str, str], float]]]]
"""What is shown of a VMBackup: labels and values, by the name of the metric."""


@pytest.fixture
def shown(state_metrics: str) -> Shown:
    def look(made: VMBackup) -> dict[str, list[tuple[dict[str, str], float]]]:
        found: dict[str, list[tuple[dict[str, str], float]]] = {}
        for family in text_string_to_metric_families(get(f"http://{state_metrics}/metrics")):
            for sample in family.samples:
                if (sample.labels.get("namespace"), sample.labels.get("name")) == (made.namespace, made.name):
                    found.setdefault(sample.name, []).append((sample.labels, sample.value))
        return found

    return look


def get(url: str) -> str:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(url, timeout=10) as answer:
        return answer.read().decode()


@pytest.mark.chaos
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
