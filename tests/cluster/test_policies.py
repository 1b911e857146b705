"""Who may back up what to where, on a real API server and a real libvirtd: no tenant reaches another's domain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from sandbox.kube import KubeApi
from tests.support.agents import Agent, CatchBackup, VMBackup, assert_home, assert_stored
from tests.support.domains import DomainFactory, wait_until
from tests.support.manifests import DROP, policy, rule, store

NOBODY = "00000000-0000-4000-8000-000000000000"
_numbers = count(1)

Allow = Callable[..., None]


@pytest.fixture
def allow(kube: KubeApi) -> Iterator[Allow]:
    """Make a policy of these rules; it goes after the test, since policies are for all agents of the cluster."""
    made: list[str] = []

    def make(*rules: dict[str, Any]) -> None:
        made.append(f"policy-{next(_numbers)}")
        kube.apply(policy(made[-1], *rules))

    yield make
    for name in made:
        kube.kubectl("delete", "vmbp", name)


@pytest.fixture(scope="module")
def tenants(kube: KubeApi) -> tuple[str, str]:
    """Two namespaces, the first with the label tenant=a."""
    for name in ("tenant-a", "tenant-b"):
        kube.kubectl("create", "namespace", name)
    kube.kubectl("label", "namespace", "tenant-a", "tenant=a")
    return "tenant-a", "tenant-b"


def refused_by_policy(made: VMBackup) -> str:
    """It is refused as a policy refuses, with nothing begun; its message, with what it names made the same."""
    status = made.wait("False")
    assert made.condition("Ready") == ("False", "ForbiddenByPolicy")
    assert made.condition("Stalled") == ("True", "ForbiddenByPolicy")
    assert made.condition("ChainClean")[0] == "True"
    assert made.condition("BackupComplete")[0] == "False"
    assert status["phase"] == "Failed"
    spec = made.get()["spec"]
    for part in (made.namespace, repr(spec["domain"]), spec["nodeName"], spec["storeRef"]["name"]):
        assert part in status["message"]
    assert "ask the administrator for one" in status["message"]
    assert not {"domainUUID", "disks"} & set(status)
    return status["message"].replace(spec["domain"], "DOMAIN")


def test_a_tenant_backs_up_its_own_domains_to_its_store_and_nothing_else(
    agent: Agent, tenants: tuple[str, str], allow: Allow, domain: DomainFactory, tmp_path: Path
) -> None:
    a, b = tenants
    own, others = domain(size="8M"), domain(size="8M")
    own.write("vda", 0x11)
    others.write("vda", 0x11)
    agent.kube.apply(store("elsewhere", directory={"path": str(tmp_path / "elsewhere")}))
    allow(rule(namespaces=[a], domains=[own.name], nodes=[agent.node], stores=[agent.node]))
    allow(rule(namespaces=[b], domains=[others.name]))

    taken = agent.apply(own.name, namespace=a)
    assert_stored(taken.wait())
    assert_home(own)
    refused_by_policy(agent.apply(own.name, namespace=b))
    refused_by_policy(agent.apply(own.name, namespace=a, **{"storeRef.name": "elsewhere"}))
    assert not (tmp_path / "elsewhere").exists()
    assert_stored(agent.apply(own.guest.uuid, namespace=a).wait())

    there = refused_by_policy(agent.apply(others.name, namespace=a))
    by_uuid = refused_by_policy(agent.apply(others.guest.uuid, namespace=a))
    absent = refused_by_policy(agent.apply("nobody", namespace=a))
    absent_uuid = refused_by_policy(agent.apply(NOBODY, namespace=a))
    assert there == by_uuid == absent == absent_uuid
    assert_home(others)
    assert not [record for record in agent.records() if record.namespace == a and record.domain == others.name]


def test_a_namespace_is_allowed_by_its_labels(
    agent: Agent, tenants: tuple[str, str], allow: Allow, domain: DomainFactory
) -> None:
    a, b = tenants
    guest = domain(size="8M")
    by_label = {"matchLabels": {"tenant": "a"}}
    allow(rule(namespaces=DROP, namespaceSelector=by_label))
    assert_stored(agent.apply(guest.name, namespace=a).wait())
    refused_by_policy(agent.apply(guest.name, namespace=b))


def test_a_tenant_in_the_queue_does_not_see_who_backs_up_a_domain_of_others(
    agent: Agent, tenants: tuple[str, str], allow: Allow, copying: CatchBackup
) -> None:
    running, guest = copying(agent)
    allow(rule(namespaces=["default"]))
    refused_by_policy(agent.apply(guest.name, namespace=tenants[0]))
    running.patch({"copy": {"bandwidth": None}})
    running.wait()


def test_a_backup_that_has_begun_is_not_stopped_by_a_policy_and_neither_is_its_next_agent(
    own_agent: Agent, allow: Allow, copying: CatchBackup
) -> None:
    own_agent.start()
    made, guest = copying(own_agent)
    allow()
    own_agent.kill()
    own_agent.start()
    made.patch({"copy": {"bandwidth": None}})
    assert_stored(made.wait())
    assert_home(guest)
    refused_by_policy(own_agent.apply(guest.name))


def test_where_policies_cannot_be_read_no_backup_begins_and_it_goes_on_when_they_can(
    own_agent: Agent, kube: KubeApi, domain: DomainFactory
) -> None:
    guest = domain(size="8M")
    blind = kube.kubeconfig_for(f"blind-{own_agent.node}")
    role: dict[str, Any] = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": own_agent.node},
        "rules": [
            {
                "apiGroups": ["vmbackup.dev"],
                "resources": ["vmbackups", "vmbackups/status", "vmbackupstores"],
                "verbs": ["*"],
            },
            {"apiGroups": ["", "events.k8s.io"], "resources": ["namespaces", "events"], "verbs": ["*"]},
        ],
    }
    kube.apply(role)
    kube.kubectl(
        "create", "clusterrolebinding", own_agent.node, f"--clusterrole={own_agent.node}", f"--user={blind.stem}"
    )
    own_agent.start(kubeconfig=str(blind))
    made = own_agent.apply(guest.name)
    wait_until(lambda: made.condition("Ready") == ("Unknown", "PoliciesUnreadable"), "the policies are asked for", 30)
    assert "ClusterRole get and list vmbackuppolicies" in made.status["message"]
    assert guest.live().source == guest.bases["vda"]
    role["rules"].append({"apiGroups": ["vmbackup.dev"], "resources": ["vmbackuppolicies"], "verbs": ["list"]})
    kube.apply(role)
    assert_stored(made.wait())


def test_the_agent_says_whether_there_are_policies(own_agent: Agent, allow: Allow, kube: KubeApi) -> None:
    own_agent.start(relist_interval="1")
    said = "every namespace may back up every domain of this node to every store"
    wait_until(lambda: said in own_agent.log, "it says that all is allowed")
    assert own_agent.metric("vmbackup_policies") == 0
    allow(rule())
    wait_until(lambda: own_agent.metric("vmbackup_policies") == 1, "it has counted the policy")

    def told() -> list[str]:
        found = kube.get("events.v1.events.k8s.io", "-n", "default")["items"]
        mine = [event for event in found if event["regarding"]["name"] == own_agent.node]
        return [event["reason"] for event in sorted(mine, key=lambda event: event["eventTime"])]

    wait_until(lambda: told() == ["NoPolicies", "PoliciesInForce"], "two events of the node")
