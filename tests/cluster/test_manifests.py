"""What `kubectl apply -k manifests/` installs, on a real API server: it is taken, and grants what is needed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sandbox.kube import KubeApi, KubectlError
from tests.support.agents import SECONDS, Agent
from tests.support.domains import DomainFactory
from tests.support.installed import AGENT, MANIFESTS, NAMESPACE, ROOT, SERVICE_ACCOUNT, Pods, rendered
from vmbackup.reconcile.state.domain_lock import DIRECTORY as LOCKS
from vmbackup.version import __version__


@pytest.fixture(scope="module")
def daemon_set(installed: KubeApi) -> dict[str, Any]:
    return rendered(installed)["DaemonSet", AGENT]


@pytest.fixture(scope="module")
def pod(daemon_set: dict[str, Any]) -> dict[str, Any]:
    return daemon_set["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def container(pod: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod["containers"]
    return only


# Installing


def test_applying_it_twice_changes_nothing(installed: KubeApi) -> None:
    installed.kubectl("apply", "-k", MANIFESTS)
    before = versions(installed)
    said = installed.kubectl("apply", "-k", MANIFESTS)
    assert versions(installed) == before
    assert {line.split()[-1] for line in said.splitlines()} == {"unchanged"}
    installed.kubectl("diff", "-k", MANIFESTS)  # exits 1 where there is a difference


def test_applied_by_the_server_twice_it_changes_nothing_either(installed: KubeApi) -> None:
    """As Argo CD and Flux do it."""
    installed.kubectl("apply", "--server-side", "--force-conflicts", "--field-manager=gitops", "-k", MANIFESTS)
    before = versions(installed)
    installed.kubectl("apply", "--server-side", "--field-manager=gitops", "-k", MANIFESTS)
    assert versions(installed) == before
    installed.kubectl("diff", "--server-side", "--field-manager=gitops", "-k", MANIFESTS)


def versions(kube: KubeApi) -> dict[str, str]:
    """The resource version of each object that is installed: it changes with whatever is written."""
    listed = kube.get("-k", str(MANIFESTS))["items"]
    return {f"{each['kind']}/{each['metadata']['name']}": each["metadata"]["resourceVersion"] for each in listed}


def test_every_custom_resource_is_installed() -> None:
    listed = yaml.safe_load((ROOT / "crds" / "kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == sorted(file.name for file in (ROOT / "crds").glob("vmbackup*.yaml"))


def test_it_is_of_the_version_of_the_agent(container: dict[str, Any], daemon_set: dict[str, Any]) -> None:
    assert container["image"] == f"vmbackup:{__version__}"
    for metadata in (daemon_set["metadata"], daemon_set["spec"]["template"]["metadata"]):
        assert metadata["labels"]["app.kubernetes.io/version"] == __version__


def test_a_new_version_may_be_rolled_out(daemon_set: dict[str, Any]) -> None:
    """The selector cannot be changed later: it must not name a version."""
    selector = daemon_set["spec"]["selector"]["matchLabels"]
    assert selector == {"app.kubernetes.io/name": "vmbackup", "app.kubernetes.io/component": "agent"}


# The pod


def test_the_pod_is_taken_without_a_warning(installed: KubeApi) -> None:
    made = Pods(installed).make("node-of-a-dry-run", dry_run=True)
    assert yaml.safe_load(made)["spec"]["priority"] > 1_000_000_000


def test_pod_security_objects_only_to_the_paths_of_the_host_and_the_selinux_type(installed: KubeApi) -> None:
    """So the namespace's label `privileged` is needed, and for nothing else."""
    namespace = {"name": "baseline", "labels": {"pod-security.kubernetes.io/enforce": "baseline"}}
    installed.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": namespace})
    account = {"name": "default", "namespace": "baseline"}
    installed.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": account})
    with pytest.raises(KubectlError) as refused:
        Pods(installed).make("node-of-a-dry-run", namespace="baseline", dry_run=True)
    violations = refused.value.stderr.partition('violates PodSecurity "baseline:latest": ')[2]
    assert {re.split(r" \(", each)[0] for each in re.split(r"\), ", violations)} == {
        "seLinuxOptions",
        "hostPath volumes",
    }


def test_nothing_is_asked_for_that_the_api_server_of_kubernetes_1_31_drops(pod: dict[str, Any]) -> None:
    """1.31 and 1.32 take `hostUsers` out by default (UserNamespacesSupport): a GitOps tool puts it back for ever."""
    assert "hostUsers" not in pod


def test_libvirt_and_the_agent_mean_the_same_file_by_a_path(pod: dict[str, Any], container: dict[str, Any]) -> None:
    on_host = {volume["name"]: volume["hostPath"]["path"] for volume in pod["volumes"] if "hostPath" in volume}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] in on_host}
    assert mounts == on_host


def test_what_the_agent_uses_by_default_is_mounted(container: dict[str, Any]) -> None:
    mounted = [Path(mount["mountPath"]) for mount in container["volumeMounts"]]
    samples = yaml.safe_load((MANIFESTS / "samples" / "store.yaml").read_text())
    wanted = [*map(Path, re.findall(r"(?<=default: )/\S+(?=\])", helped())), LOCKS]
    wanted += [Path("/etc/libvirt/qemu"), Path("/run/libvirt"), Path(samples["spec"]["directory"]["path"])]
    assert len(wanted) >= 5
    for path in wanted:
        assert path in mounted


def vmbackup() -> Path:
    return Path(sys.executable).with_name("vmbackup")


def helped() -> str:
    """`vmbackup agent --help`, in one line."""
    done = subprocess.run([vmbackup(), "agent", "--help"], check=True, capture_output=True, text=True)
    return " ".join(done.stdout.split())


def test_its_variables_are_flags_of_the_agent(container: dict[str, Any]) -> None:
    variables = {variable["name"]: variable for variable in container["env"]}
    of_the_pod = {
        name: one["valueFrom"]["fieldRef"]["fieldPath"] for name, one in variables.items() if "valueFrom" in one
    }
    assert of_the_pod == {"VMBACKUP_NODE_NAME": "spec.nodeName", "VMBACKUP_METRICS_HOST": "status.podIP"}
    assert variables.keys() - of_the_pod.keys() == {"VMBACKUP_IMAGE_ROOTS"}
    assert all(f"[{name}; " in helped() for name in variables)


def test_its_port_is_the_agents(container: dict[str, Any]) -> None:
    (port,) = container["ports"]
    assert port["name"] == "metrics"
    assert f"[VMBACKUP_METRICS_PORT; default: {port['containerPort']}]" in helped()


# Privileges


def test_it_backs_up_with_the_privileges_that_the_pod_has(
    own_agent: Agent, domain: DomainFactory, container: dict[str, Any]
) -> None:
    """A whole backup, with one capability, and none to gain."""
    flags = [f"--{name}={value}" for name, value in own_agent.flags.items()]
    own_agent.program.start([*privileges_of(container), vmbackup(), "agent", *flags])
    own_agent.program.wait_until(lambda: own_agent.healthz() is not None, seconds=SECONDS)
    status = Path(f"/proc/{own_agent.program.pid}/status").read_text()
    assert re.search(r"^NoNewPrivs:\t1$", status, re.MULTILINE)
    assert re.search(r"^CapEff:\t0000000000000002$", status, re.MULTILINE)  # DAC_OVERRIDE
    guest = domain({"vda": "raw", "vdb": "qcow2"})
    own_agent.apply(guest.name).wait()
    assert {target: guest.live(target).source for target in guest.bases} == guest.bases


@pytest.mark.parametrize(("without", "may"), [((), True), (("DAC_OVERRIDE",), False)])
@pytest.mark.parametrize("mode", ["rb", "r+b"])
def test_its_capability_is_what_opens_the_images_of_qemus_user(
    tmp_path: Path, container: dict[str, Any], mode: str, without: tuple[str, ...], may: bool
) -> None:
    """Here QEMU runs as root, and can open no image that root cannot: so this asks only the kernel.

    For writing too: a guest that is off is merged by our own qemu-img.
    """
    image = tmp_path / "image"
    image.write_bytes(b"")
    image.chmod(0o600)
    os.chown(image, 64055, 64055)  # libvirt-qemu on Debian
    python = [sys.executable, "-c", f"open({str(image)!r}, {mode!r})"]
    done = subprocess.run([*privileges_of(container, without=without), *python], capture_output=True, text=True)
    assert (done.returncode == 0) is may, done.stderr


def privileges_of(container: dict[str, Any], *, without: tuple[str, ...] = ()) -> list[str]:
    """The command that runs another with the privileges of the pod's container, as containerd does."""
    context = container["securityContext"]
    assert context["capabilities"]["drop"] == ["ALL"]
    assert context["allowPrivilegeEscalation"] is False
    bounding = ["-all", *(f"+{each.lower()}" for each in context["capabilities"]["add"] if each not in without)]
    return ["setpriv", "--no-new-privs", "--inh-caps=-all", f"--bounding-set={','.join(bounding)}"]


# RBAC


AGENTS_RULES = {
    ("vmbackups.vmbackup.dev", "get list watch patch delete"),
    ("vmbackups.vmbackup.dev/status", "patch"),
    ("vmbackupstores.vmbackup.dev", "get"),
    ("vmbackuppolicies.vmbackup.dev", "get list watch"),
    ("namespaces", "get"),
    ("events.events.k8s.io", "create"),
}


def test_an_agent_is_granted_what_it_needs_and_nothing_else(installed: KubeApi) -> None:
    nobody = rules(installed, "system:serviceaccount:default:nobody")
    assert rules(installed, SERVICE_ACCOUNT) - nobody == AGENTS_RULES


def test_an_agent_outside_of_the_cluster_is_granted_the_same(installed: KubeApi) -> None:
    by_certificate = rules(installed, "vmbackup:node:node-a", "vmbackup:nodes")
    assert by_certificate - rules(installed, "vmbackup:node:node-a") == AGENTS_RULES


def rules(kube: KubeApi, user: str, *groups: str) -> set[tuple[str, str]]:
    """What somebody may do everywhere, as `kubectl auth can-i --list` shows it: resource, verbs."""
    someone = [f"--as={user}", *(f"--as-group={group}" for group in ("system:authenticated", *groups))]
    lines = kube.kubectl("auth", "can-i", "--list", "-n", "elsewhere", *someone).splitlines()[1:]
    return {(line.split()[0], line.rpartition("[")[2].rstrip("]")) for line in lines}


ALL = ("get", "list", "watch", "create", "update", "patch", "delete", "deletecollection")
READ = ("get", "list", "watch")


@pytest.mark.parametrize(
    ("role", "resource", "may"),
    [
        ("edit", "vmbackups", ALL),
        ("edit", "vmbackups/status", READ),
        ("edit", "vmbackupstores", READ),
        ("edit", "vmbackuppolicies", READ),
        ("view", "vmbackups", READ),
        ("view", "vmbackups/status", READ),
        ("view", "vmbackupstores", READ),
        ("view", "vmbackuppolicies", READ),
    ],
)
def test_users_have_their_rights_by_the_roles_of_kubernetes(
    installed: KubeApi, role: str, resource: str, may: tuple[str, ...]
) -> None:
    granted = {verb for rule in aggregated(installed, role) if resource in rule["resources"] for verb in rule["verbs"]}
    assert granted == set(may)


def test_an_admin_of_a_namespace_has_no_more_of_us_than_an_editor(installed: KubeApi) -> None:
    assert aggregated(installed, "admin") == aggregated(installed, "edit")


def aggregated(kube: KubeApi, role: str) -> list[dict[str, Any]]:
    """The rules that Kubernetes' controllers add to its role."""
    select = f"-l=app.kubernetes.io/name=vmbackup,rbac.authorization.k8s.io/aggregate-to-{role}=true"
    return [rule for each in kube.get("clusterrole", select)["items"] for rule in each["rules"]]


def test_the_agents_token_is_mounted_only_for_it_and_lives_for_an_hour(installed: KubeApi, pod: dict[str, Any]) -> None:
    account = installed.get("serviceaccount", AGENT, "-n", NAMESPACE)
    assert account["automountServiceAccountToken"] is False
    (sources,) = [volume["projected"]["sources"] for volume in pod["volumes"] if "projected" in volume]
    # Not the 3607 s of Kubernetes' own: they are a mark to let it live for a year (WarnOnlyBoundTokenExpirationPeriod).
    assert sources[0]["serviceAccountToken"]["expirationSeconds"] == 3600
