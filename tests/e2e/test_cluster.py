"""What the cluster does to the agent, what it may do there, and what can be seen of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from sandbox import binaries
from sandbox.kube import KubeApi, KubectlError
from tests.e2e.cluster import DOMAIN, MANIFESTS, NODE, SECONDS, Cluster
from tests.support.agents import manifest
from tests.support.domains import wait_until

pytestmark = pytest.mark.e2e


def test_an_agent_is_on_a_node_as_long_as_its_label_says_that_guests_are_there(cluster: Cluster) -> None:
    assert cluster.wanted_pods() == 1
    cluster.label("-")
    wait_until(lambda: cluster.wanted_pods() == 0 and not cluster.pods(), "no agent", SECONDS)
    cluster.label("=true")
    wait_until(lambda: cluster.wanted_pods() == 1, "an agent is wanted", SECONDS)
    cluster.wait_for_rollout()
    assert cluster.pod_name()


def test_a_stolen_token_changes_nothing_of_another_node(cluster: Cluster, user: KubeApi) -> None:
    for name, node in (("here", NODE), ("elsewhere", "node-b")):
        user.apply(manifest(name, node, "none", DOMAIN, "team-a"))
    stolen = cluster.stolen_token()

    def annotate(name: str) -> None:
        arguments = ("vmbackup.dev/stolen=yes", "--namespace=team-a", "--dry-run=server")
        cluster.kube.kubectl("annotate", "vmbackup", name, *arguments, kubeconfig=stolen)

    annotate("here")
    with pytest.raises(KubectlError, match=f"the agent of node {NODE} may not change a VMBackup of node node-b"):
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
    made = cluster.back_up(bob, "nightly", "team-b", **{"copy.bandwidth": "1Mi"})
    made.wait_for_copying()

    cluster.kube.kubectl("delete", "namespace", "team-b", f"--timeout={SECONDS}s")

    cluster.assert_home()


def test_the_agent_has_logged_no_error(cluster: Cluster) -> None:
    assert [line for line in cluster.logs().splitlines() if "ERROR" in line or "Traceback" in line] == []


def test_the_guide_gives_a_hypervisor_outside_of_the_cluster_an_identity_of_its_own(
    cluster: Cluster, user: KubeApi, tmp_path: Path
) -> None:
    """The commands of docs/install-hypervisor.md, as they stand: /etc belongs to this test run only."""
    guide = (MANIFESTS.parent / "docs/install-hypervisor.md").read_text()
    section = guide[guide.index("## 2. ") : guide.index("## 3. ")]
    environment = os.environ | {"KUBECONFIG": str(cluster.kube.kubeconfig)}
    environment["PATH"] = f"{Path(binaries.path('kubectl')).parent}:{environment['PATH']}"
    for block in re.findall(r"```sh\n(.*?)```", section, re.DOTALL):
        subprocess.run(["bash", "-euo", "pipefail", "-c", block], cwd=tmp_path, env=environment, check=True)
    kubeconfig = Path("/etc/vmbackup/kubeconfig")
    for made, brought in (("hv-01.crt", Path("/etc/vmbackup/agent.crt")), ("hv-01.kubeconfig", kubeconfig)):
        shutil.copyfile(tmp_path / made, brought)

    def annotate(name: str) -> None:
        words = ("vmbackup.dev/by=hv-01", "--namespace=team-a", "--dry-run=server")
        cluster.kube.kubectl("annotate", "vmbackup", name, *words, kubeconfig=kubeconfig)

    for name, node in (("outside", "hv-01"), ("inside", NODE)):
        user.apply(manifest(name, node, "none", DOMAIN, "team-a"))
    annotate("outside")
    with pytest.raises(KubectlError, match=f"the agent of node hv-01 may not change a VMBackup of node {NODE}"):
        annotate("inside")


def test_the_kubelet_finds_an_agent_ready_that_answers_only_by_tls(cluster: Cluster, tmp_path: Path) -> None:
    authority = cluster.kube.authority
    name = "vmbackup-agent.vmbackup-system.svc"
    certificate, key = authority.issue("metrics", user=name, addresses=[f"DNS:{name}"])
    files = {"tls.crt": certificate, "tls.key": key, "ca.crt": authority.certificate}
    secret = ["create", "secret", "generic", "vmbackup-metrics-tls", "--namespace=vmbackup-system"]
    cluster.kube.kubectl(*secret, *(f"--from-file={file}={path}" for file, path in files.items()))
    where = os.path.relpath(MANIFESTS, tmp_path.resolve())
    kustomization = {"resources": [where], "components": [f"{where}/components/metrics-tls"]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))

    cluster.kube.kubectl("apply", "-k", tmp_path)
    cluster.wait_for_rollout()

    assert "vmbackup_build_info" in cluster.metrics_by_tls(authority.certificate)
    (agent,) = cluster.pod()["spec"]["containers"]
    assert [agent[probe]["httpGet"]["scheme"] for probe in ("readinessProbe", "livenessProbe")] == ["HTTPS", "HTTPS"]


def test_uninstalling_touches_neither_the_guest_nor_the_copies(cluster: Cluster, user: KubeApi) -> None:
    user.kubectl("delete", "vmbackups", "--all", "--namespace=team-a", f"--timeout={SECONDS}s")

    cluster.uninstall()

    assert not cluster.kube.get("namespaces", "--field-selector=metadata.name=vmbackup-system")["items"]
    cluster.assert_home()
