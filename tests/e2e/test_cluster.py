"""What the cluster does to the agent, what it may do there, and what can be seen of it."""

from __future__ import annotations

import pytest

from sandbox.kube import KubeApi, KubectlError
from tests.agents import manifest
from tests.e2e.cluster import DOMAIN, NODE, SECONDS, Cluster

pytestmark = pytest.mark.e2e


def test_a_stolen_token_changes_nothing_of_another_node(cluster: Cluster, user: KubeApi) -> None:
    for name, node in (("here", NODE), ("elsewhere", "node-b")):
        user.apply(manifest(name, node, "none", DOMAIN, "team-a"))
    stolen = cluster.stolen_token()

    def annotate(name: str) -> None:
        arguments = ("vmbackup.dev/stolen=yes", "--namespace=team-a", "--dry-run=server")
        cluster.kube.kubectl("annotate", "vmbackup", name, *arguments, kubeconfig=stolen)

    annotate("here")
    with pytest.raises(KubectlError, match=f"the agent of node {NODE} may change no VMBackup of node node-b"):
        annotate("elsewhere")
    with pytest.raises(KubectlError, match="orbidden"):
        cluster.kube.kubectl("get", "secrets", "--all-namespaces", kubeconfig=stolen)


def test_prometheus_finds_metrics_at_the_address_of_the_pod(cluster: Cluster, user: KubeApi) -> None:
    with cluster.proven_backup(user, "measured"):
        pass

    assert f'domain="{DOMAIN}"' in cluster.metrics()


def test_a_drained_node_keeps_agent_and_guest(cluster: Cluster, user: KubeApi) -> None:
    pod = cluster.pod_name()

    with cluster.proven_backup(user, "drained", **{"copy.bandwidth": "8Mi"}):
        cluster.kube.kubectl("drain", NODE, "--ignore-daemonsets", f"--timeout={SECONDS}s")

    assert cluster.pod_name() == pod
    cluster.kube.kubectl("uncordon", NODE)


def test_a_namespace_that_is_deleted_in_the_middle_of_a_backup_goes_and_the_guest_comes_home(cluster: Cluster) -> None:
    bob = cluster.user("bob", namespace="team-b")
    made = cluster.back_up(bob, "doomed", "team-b", **{"copy.bandwidth": "1Mi"})
    made.wait_for_copying()

    cluster.kube.kubectl("delete", "namespace", "team-b", f"--timeout={SECONDS}s")

    cluster.assert_home()


def test_the_agent_has_logged_no_error(cluster: Cluster) -> None:
    assert [line for line in cluster.logs().splitlines() if "ERROR" in line or "Traceback" in line] == []


def test_what_is_uninstalled_leaves_the_guest_and_the_copies_alone(cluster: Cluster, user: KubeApi) -> None:
    user.kubectl("delete", "vmbackups", "--all", "--namespace=team-a", f"--timeout={SECONDS}s")

    cluster.uninstall()

    assert not cluster.kube.get("namespaces", "--field-selector=metadata.name=vmbackup-system")["items"]
    cluster.assert_home()
