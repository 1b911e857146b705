"""What is stolen on one hypervisor is of no use against the guests of another: the admission policies of manifests/.

On a real API server, with tokens bound to pods as the kubelet gets them, and client certificates.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from sandbox.kube import KubeApi, KubectlError
from sandbox.libvirtd import Libvirtd
from tests.cluster.conftest import make_agent
from tests.support.agents import SECONDS, Agent
from tests.support.domains import DomainFactory, wait_until
from tests.support.installed import AGENT, NAMESPACE, Pods
from tests.support.manifests import backup
from vmbackup.api.identity import BackupId
from vmbackup.api.names import FINALIZER
from vmbackup.cluster.client import Cluster, load_client
from vmbackup.errors import VMBackupError

NODE_A, NODE_B = "node-a.of-admission", "node-b.of-admission"
OUR_ANNOTATION = {"metadata": {"annotations": {"vmbackup.dev/progress": "1"}}}
OUR_FINALIZER = {"metadata": {"finalizers": [FINALIZER]}}
NO_FINALIZERS = {"metadata": {"finalizers": None}}

_numbers = count(1)


@pytest.fixture(scope="module")
def token_of_a(installed: KubeApi) -> Path:
    """What a thief finds in the pod of node-a, once the policies are in force."""
    stolen = Pods(installed).kubeconfig(NODE_A)
    of_b = installed_backup(installed, NODE_B)

    def is_denied() -> bool:
        try:
            write_status(installed, stolen, of_b)
        except VMBackupError as error:
            return "ValidatingAdmissionPolicy" in str(error)
        return False

    wait_until(is_denied, "the policies are in force", SECONDS)
    return stolen


@pytest.fixture(scope="module")
def certificate_of_a(installed: KubeApi, token_of_a: Path) -> Path:
    """What an agent outside of the cluster has."""
    return installed.kubeconfig_for(f"vmbackup:node:{NODE_A}", groups=["vmbackup:nodes"])


@pytest.fixture(params=["token", "certificate"])
def agent_of_a(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"{request.param}_of_a")


def installed_backup(kube: KubeApi, node: str, **metadata: Any) -> str:
    """A new VMBackup of that node; its name."""
    made = backup(f"of-{next(_numbers)}", nodeName=node)
    made["metadata"] |= metadata
    kube.apply(made)
    return made["metadata"]["name"]


def patch(kube: KubeApi, kubeconfig: Path, name: str, change: dict[str, Any], *flags: str) -> None:
    kube.kubectl("patch", "vmbackup", name, "--type=merge", "-p", json.dumps(change), *flags, kubeconfig=kubeconfig)


def write_status(kube: KubeApi, kubeconfig: Path, name: str) -> None:
    """As the agent does it, and with its code."""
    identity = BackupId.of(kube.get("vmbackup", name))
    Cluster(load_client(str(kubeconfig))).put_status(identity, {"message": "written by an agent"})


DENIED = (KubectlError, VMBackupError)
Act = Callable[[KubeApi, Path, str], None]
ACTS: dict[str, Act] = {
    "status": write_status,
    "annotation": lambda kube, who, name: patch(kube, who, name, OUR_ANNOTATION),
    "finalizer": lambda kube, who, name: patch(kube, who, name, OUR_FINALIZER),
    "no finalizers": lambda kube, who, name: patch(kube, who, name, NO_FINALIZERS),
    "delete": lambda kube, who, name: print(kube.kubectl("delete", "vmbackup", name, "--wait=false", kubeconfig=who)),
}


@pytest.mark.parametrize("act", ACTS)
def test_an_agent_does_to_the_backups_of_its_own_node_what_it_has_to(
    installed: KubeApi, agent_of_a: Path, act: str
) -> None:
    ACTS[act](installed, agent_of_a, installed_backup(installed, NODE_A))


@pytest.mark.parametrize("act", ACTS)
def test_it_does_nothing_to_those_of_another(installed: KubeApi, agent_of_a: Path, act: str) -> None:
    name = installed_backup(installed, NODE_B, finalizers=[FINALIZER])
    before = installed.get("vmbackup", name)
    with pytest.raises(DENIED, match=f"the agent of node {NODE_A} may not change a VMBackup of node {NODE_B}"):
        ACTS[act](installed, agent_of_a, name)
    assert installed.get("vmbackup", name) == before
    patch(installed, installed.kubeconfig, name, NO_FINALIZERS)


@pytest.mark.parametrize("act", ["status", "delete"])
def test_a_token_that_is_bound_to_no_pod_is_of_no_use(installed: KubeApi, token_of_a: Path, act: str) -> None:
    """Who may ask for tokens of the service account, and asks for one without a pod, is the agent of no node."""
    token = installed.kubectl("create", "token", AGENT, "-n", NAMESPACE).strip()
    unbound = installed.kubeconfig_of(token, name="unbound")
    name = installed_backup(installed, NODE_A, finalizers=[FINALIZER])
    with pytest.raises(DENIED, match="an agent whose node is unknown may not change a VMBackup"):
        ACTS[act](installed, unbound, name)
    patch(installed, installed.kubeconfig, name, NO_FINALIZERS)


@pytest.mark.parametrize("act", ["status", "delete"])
def test_a_certificate_with_only_the_group_is_the_agent_of_no_node(
    installed: KubeApi, token_of_a: Path, act: str
) -> None:
    odd = installed.kubeconfig_for("somebody", groups=["vmbackup:nodes"], name="odd")
    name = installed_backup(installed, NODE_A, finalizers=[FINALIZER])
    with pytest.raises(DENIED, match="an agent whose node is unknown may not change a VMBackup"):
        ACTS[act](installed, odd, name)
    patch(installed, installed.kubeconfig, name, NO_FINALIZERS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"spec": {"copy": {"bandwidth": "1Mi"}}}, "may not change the spec"),
        ({"spec": {"deletionPolicy": "Delete"}}, "may not change the spec"),
        ({"metadata": {"annotations": {"argocd.argoproj.io/sync-wave": "1"}}}, "may only change annotations"),
        ({"metadata": {"annotations": {"theirs": None}}}, "may only change annotations"),
        ({"metadata": {"annotations": {"theirs": "changed"}}}, "may only change annotations"),
        ({"metadata": {"labels": {"app": "web"}}}, "may only change labels"),
        ({"metadata": {"labels": {"theirs": None}}}, "may only change labels"),
        ({"metadata": {"finalizers": ["their.dev/finalizer", "other.dev/finalizer"]}}, "may only change finalizers"),
        ({"metadata": {"finalizers": [FINALIZER]}}, "may only change finalizers"),
        ({"metadata": {"ownerReferences": [
            {"apiVersion": "v1", "kind": "Node", "name": "node-a", "uid": "0"}]}}, "may not change owner references"),
    ],
)  # fmt: skip
def test_what_is_the_users_an_agent_does_not_touch_even_on_its_own_node(
    installed: KubeApi, token_of_a: Path, change: dict[str, Any], said: str
) -> None:
    theirs = {"theirs": "as-it-was"}
    name = installed_backup(installed, NODE_A, labels=theirs, annotations=theirs, finalizers=["their.dev/finalizer"])
    try:
        with pytest.raises(KubectlError, match=f"an agent {said}"):
            patch(installed, token_of_a, name, change)
        patch(installed, token_of_a, name, {"metadata": {"finalizers": ["their.dev/finalizer", FINALIZER]}})
        patch(installed, token_of_a, name, {"metadata": {"finalizers": ["their.dev/finalizer"]}})
    finally:
        patch(installed, installed.kubeconfig, name, NO_FINALIZERS)


def test_an_agent_makes_no_backups(installed: KubeApi, agent_of_a: Path) -> None:
    """RBAC says so, and the policy says it again, should an agent be given more by mistake."""
    body = json.dumps(backup("made-by-an-agent", nodeName=NODE_A))
    with pytest.raises(KubectlError, match="cannot create resource"):
        installed.kubectl("create", "-f", "-", stdin=body, kubeconfig=agent_of_a)
    admin = installed.kubeconfig_for(
        f"vmbackup:node:{NODE_A}", groups=["system:masters"], name="an-agent-with-too-many-rights"
    )
    with pytest.raises(KubectlError, match="an agent may not create VMBackups"):
        installed.kubectl("create", "-f", "-", stdin=body, kubeconfig=admin)


# Events


def event(node: str, kind: str = "VMBackup", name: str = "web-01", **fields: str) -> dict[str, Any]:
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"generateName": "of-admission-", "namespace": "default"},
        "eventTime": "2026-01-01T00:00:00.000000Z",
        "type": "Normal",
        "reason": "Tested",
        "action": "Tested",
        "reportingController": "vmbackup",
        "reportingInstance": f"vmbackup-{node}",
        "regarding": {"apiVersion": "vmbackup.dev/v1alpha1", "kind": kind, "name": name, "namespace": "default"},
    } | fields


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (event(NODE_A), ""),
        (event(NODE_A, "Node", NODE_A), ""),
        (event(NODE_B), "reportingInstance vmbackup-NODE of its node"),
        (event(NODE_A, reportingController="kubelet"), "with reportingController vmbackup"),
        (event(NODE_A, "Node", NODE_B), "about VMBackups and its own node"),
        (event(NODE_A, "Pod", "etcd"), "about VMBackups and its own node"),
    ],
)
def test_an_agent_tells_events_in_no_name_but_its_own(
    installed: KubeApi, agent_of_a: Path, told: dict[str, Any], said: str
) -> None:
    def tell() -> None:
        installed.kubectl("create", "-f", "-", stdin=json.dumps(told), kubeconfig=agent_of_a)

    if not said:
        return tell()
    with pytest.raises(KubectlError, match=said):
        tell()
    return None


def test_the_events_of_a_node_with_a_very_long_name_are_its_own_too(installed: KubeApi, token_of_a: Path) -> None:
    """reportingInstance has 128 characters at most, the name of a node 253."""
    node = "n" * 63 + "." + "o" * 63 + "." + "p" * 63
    certificate = installed.kubeconfig_for(f"vmbackup:node:{node[:40]}", groups=["vmbackup:nodes"], name="long")
    body = event(node[:40])
    installed.kubectl("create", "-f", "-", stdin=json.dumps(body), kubeconfig=certificate)
    token = Pods(installed).kubeconfig(node)
    body = event(node, reportingInstance=f"vmbackup-{node}"[:128])
    installed.kubectl("create", "-f", "-", stdin=json.dumps(body), kubeconfig=token)


# Everybody else


@pytest.fixture
def editor(installed: KubeApi, token_of_a: Path) -> Path:
    """Somebody with the rights that `edit` has in the namespace `default`, where Kubernetes' controllers run."""
    for role in ("vmbackup-edit", "vmbackup-view"):
        installed.kubectl("delete", "rolebinding", f"editor-{role}", "--ignore-not-found")
        installed.kubectl("create", "rolebinding", f"editor-{role}", f"--clusterrole={role}", "--user=editor")
    return installed.kubeconfig_for("editor")


def test_users_change_and_delete_their_backups_on_whatever_node(installed: KubeApi, editor: Path) -> None:
    body = json.dumps(backup("of-a-user", nodeName=NODE_B))
    installed.kubectl("apply", "-f", "-", stdin=body, kubeconfig=editor)
    patch(installed, editor, "of-a-user", {"spec": {"copy": {"bandwidth": "1Mi"}}})
    patch(installed, editor, "of-a-user", {"metadata": {"annotations": {"vmbackup.dev/retry": "1", "theirs": "2"}}})
    patch(installed, editor, "of-a-user", {"metadata": {"labels": {"theirs": "2"}, "finalizers": ["their.dev/one"]}})
    patch(installed, editor, "of-a-user", NO_FINALIZERS)
    installed.kubectl("delete", "vmbackup", "of-a-user", kubeconfig=editor)


def test_users_cannot_forge_a_status(installed: KubeApi, editor: Path) -> None:
    """Not in a namespace of their own either: RBAC gives nobody but agents the subresource, and it is the only way."""
    forged = {"phase": "Pivoted", "message": "forged", "location": "/etc"}
    body = json.dumps(backup("forged", nodeName=NODE_A) | {"status": forged})
    installed.kubectl("create", "-f", "-", stdin=body, kubeconfig=editor)
    patch(installed, editor, "forged", {"status": forged, "spec": {"copy": {"bandwidth": "2Mi"}}})
    stored = installed.get("vmbackup", "forged")
    assert stored["spec"]["copy"]["bandwidth"] == "2Mi"
    assert "forged" not in json.dumps(stored["status"])
    with pytest.raises(KubectlError, match='cannot patch resource "vmbackups/status"'):
        patch(installed, editor, "forged", {"status": forged}, "--subresource=status")
    installed.kubectl("delete", "vmbackup", "forged", kubeconfig=editor)


@pytest.mark.parametrize("resource", ["vmbackupstores", "vmbackuppolicies"])
def test_users_make_no_stores_and_no_policies(installed: KubeApi, editor: Path, resource: str) -> None:
    with pytest.raises(KubectlError, match=f'cannot delete resource "{resource}"'):
        installed.kubectl("delete", resource, "any", kubeconfig=editor)


# A whole agent


@pytest.fixture(params=["token", "certificate"])
def agent_with_rights_of_its_own(
    request: pytest.FixtureRequest, installed: KubeApi, libvirtd: Libvirtd, tmp_path: Path
) -> Iterator[Agent]:
    """With the token of its pod, or the certificate of a hypervisor outside of the cluster, and no other rights."""
    agent = make_agent(installed, libvirtd, tmp_path)
    if request.param == "token":
        kubeconfig = Pods(installed).kubeconfig(agent.node)
    else:
        kubeconfig = installed.kubeconfig_for(f"vmbackup:node:{agent.node}", groups=["vmbackup:nodes"])
    agent.flags["kubeconfig"] = str(kubeconfig)
    yield agent
    agent.stop()


def test_an_agent_does_all_its_work_with_the_rights_that_it_has(
    agent_with_rights_of_its_own: Agent, token_of_a: Path, domain: DomainFactory
) -> None:
    """From the finalizer to the deletion of what is past its time to live, orphans and events of the node included."""
    agent_with_rights_of_its_own.start(relist_interval="1")
    guest = domain()
    made = agent_with_rights_of_its_own.apply(guest.name, ttlSecondsAfterFinished=None)
    made.wait()
    wait_until(lambda: len(made.events()) > 2, "events", SECONDS)
    made.patch({"ttlSecondsAfterFinished": 1})
    made.wait_until_gone()
    deleted = agent_with_rights_of_its_own.apply(guest.name, deletionPolicy="Delete")
    deleted.wait()
    deleted.delete()
    deleted.wait_until_gone()
    orphaned = guest.snapshot("vda", uid8="0badcafe")
    wait_until(lambda: guest.live().source == guest.bases["vda"], f"{orphaned} is home", SECONDS)
    assert "orbidden" not in agent_with_rights_of_its_own.log
