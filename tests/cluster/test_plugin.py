"""`kubectl vmbackup`: real kubectl finds the plugin on the PATH, a real API server answers, real agents act."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from plugins.build import ARCHIVE, ROOT, build
from sandbox import binaries
from sandbox.kube import KubeApi
from tests.support.agents import SECONDS, Agent, CatchBackup, VMBackup, assert_home, assert_stored, manifest
from tests.support.domains import DomainFactory, wait_until
from tests.support.nodes import AgentPod, add_agent_pod, add_node, remove
from vmbackup.imaging.locks import hold_reader_lock

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def run(kube: KubeApi, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs kubectl as a shell would, with the plugin on its PATH and nothing of this project's environment."""
    dist = tmp_path_factory.mktemp("plugin")
    build(dist)
    (dist / "kubectl").symlink_to(binaries.path("kubectl"))
    python = dist / "python3"
    python.symlink_to(shutil.which("python3", path="/usr/bin:/bin") or "/usr/bin/python3")
    environment = {"PATH": f"{dist}:/usr/bin:/bin", "HOME": str(dist), "KUBECONFIG": str(kube.kubeconfig)}

    def run_it(
        *words: str, stdin: str = "", typed: str | None = None, kubeconfig: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        its = environment | ({"KUBECONFIG": str(kubeconfig)} if kubeconfig else {})
        if typed is not None:
            return _at_a_terminal(dist / "kubectl", words, its, typed)
        return subprocess.run(
            ["kubectl", *words], env=its, input=stdin, capture_output=True, text=True, timeout=120, check=False,
            executable=str(dist / "kubectl"),
        )  # fmt: skip

    return run_it


@pytest.fixture
def agent_pod(kube: KubeApi, request: pytest.FixtureRequest) -> Iterator[AgentPod]:
    """An agent whose pod is ready, on a node that is."""
    node = f"pod-of-{request.node.name}".replace("_", "-")[:60].rstrip("-")
    add_node(kube, node, ready=True)
    pod = add_agent_pod(kube, node)
    yield pod
    remove(pod)


def _at_a_terminal(
    kubectl: Path, words: Sequence[str], environment: dict[str, str], typed: str
) -> subprocess.CompletedProcess[str]:
    keyboard, terminal = pty.openpty()
    try:
        os.write(keyboard, f"{typed}\n".encode())
        return subprocess.run(
            [kubectl, *words], env=environment, stdin=terminal, capture_output=True, text=True, timeout=120, check=False
        )
    finally:
        os.close(keyboard)
        os.close(terminal)


def vmbackup(run: Run, *words: str, code: int = 0, **more: Any) -> str:
    """What `kubectl vmbackup` prints, both of it; it ended with this exit code."""
    done = run("vmbackup", *words, **more)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def line_of(text: str, start: str) -> Sequence[str]:
    return next(line.split() for line in text.splitlines() if line.startswith(start))


def test_status_tells_of_one_backup_all_that_is_known_and_what_to_do_next(
    run: Run, agent: Agent, domain: DomainFactory
) -> None:
    guest = domain({"vda": "raw", "vdb": "qcow2"}, size="8M")
    made = agent.apply(guest.name)
    folder = assert_stored(made.wait())
    wait_until(lambda: "Pivoted" in made.events(), "its last event", SECONDS)
    text = vmbackup(run, "status", made.name)
    assert line_of(text, "Domain")[1:4] == [guest.name, "on", agent.node]
    assert str(folder) in text
    assert line_of(text, "ChainClean")[1:3] == ["True", "ChainHome"]
    assert line_of(text, "vda")[1:3] == ["Home", "raw"]
    assert line_of(text, "vdb")[1:3] == ["Home", "qcow2"]
    assert [word for word in ("Snapshotting", "Copying", "Committing") if f"   {word}" not in text] == []
    assert text.splitlines()[-1] == "Next: nothing: it can be restored."


def test_status_lists_all_and_says_below_what_needs_a_human(
    run: Run, kube: KubeApi, agent: Agent, domain: DomainFactory
) -> None:
    namespace = f"{agent.node}-listed"
    kube.kubectl("create", "namespace", namespace)
    assert "no VMBackup" in vmbackup(run, "status", "-n", namespace)
    good = agent.apply(domain(size="8M").name, name="good", namespace=namespace)
    bad = agent.apply("nobody", name="bad", namespace=namespace)
    good.wait()
    bad.wait("False")
    text = vmbackup(run, "status", "-n", namespace)
    assert line_of(text, "good")[3:7] == ["Pivoted", "100%", "True", "Succeeded"]
    assert line_of(text, "bad")[3:6] == ["Failed", "False", "DomainNotFound"]
    assert "/good:" not in text
    assert (
        f"next: fix the problem that the message names, then: kubectl vmbackup retry bad -n {namespace} --new" in text
    )
    assert line_of(vmbackup(run, "status", "-A"), namespace)[0] == namespace


def test_retry_brings_a_guest_home_that_was_left_on_its_overlay(run: Run, agent: Agent, copying: CatchBackup) -> None:
    made, guest = copying(agent, **{"commit.backoffLimit": 0})
    assert "still Copying" in vmbackup(run, "retry", made.name, code=1)
    with Path(guest.bases["vda"]).open("rb") as reader:
        hold_reader_lock(reader.fileno())
        made.patch({"copy": {"bandwidth": None}})
        made.wait("False")
        text = vmbackup(run, "status", made.name)
        assert f"kubectl vmbackup retry {made.name} -n default." in text
        assert ".vmb-" in " ".join(line_of(text, "vda"))
        assert "CommitLimitReached" in vmbackup(run, "retry", made.name, "--wait", "--timeout=60s", code=1)
    assert "Succeeded" in vmbackup(run, "retry", made.name, "--wait", "--timeout=60s")
    assert_home(guest)
    assert "nothing to try again" in vmbackup(run, "retry", made.name, code=1)


def test_cancel_ends_a_backup_and_only_a_new_one_makes_up_for_it(run: Run, agent: Agent, copying: CatchBackup) -> None:
    made, guest = copying(agent)
    assert "Cancelled" in vmbackup(run, "cancel", made.name, "--wait", "--timeout=60s")
    assert_home(guest)
    assert "is over already" in vmbackup(run, "cancel", made.name, code=1)
    assert "--new creates another" in vmbackup(run, "retry", made.name, code=1)
    made.patch({"copy": {"bandwidth": None}})
    text = vmbackup(run, "retry", made.name, "--new", "--wait", "--timeout=60s")
    another = VMBackup(agent.kube, text.split(":")[0])
    assert another.name.startswith(f"{made.name}-")
    assert_stored(another.status)
    assert another.get()["spec"] == made.get()["spec"]


def test_what_a_user_chose_as_a_name_cannot_drive_the_terminal_that_completes(run: Run, kube: KubeApi) -> None:
    kube.apply(manifest("hostile", "elsewhere", "nowhere", "web\u202e"))
    said = run("__complete", "vmbackup", "status", "host").stdout
    assert "hostile\tPending, web? on elsewhere" in said


def test_check_says_what_is_in_the_way_of_a_manifest_and_changes_nothing(
    run: Run, agent: Agent, tmp_path: Path
) -> None:
    def checked(code: int, **spec: Any) -> str:
        body = manifest(f"{agent.node}-check", agent.node, agent.node, "web", **spec)
        return vmbackup(run, "check", "-f", "-", stdin=json.dumps(body), code=code)

    assert "NO" not in checked(0)
    assert "there is no VMBackupStore nowhere" in checked(1, **{"storeRef.name": "nowhere"})
    refused = checked(1, **{"copy.deadlineSeconds": 0})
    assert "the API server refuses it" in refused
    assert "spec.copy.deadlineSeconds" in refused
    assert not VMBackup(agent.kube, f"{agent.node}-check").exists()
    file = tmp_path / "backup.yaml"
    sample = Path(__file__).parent.parent.parent / "manifests/samples/vmbackup.yaml"
    file.write_text(sample.read_text().replace("name:", "generateName:", 1) + "\n---\n" + _a_store("local"))
    text = vmbackup(run, "check", f"--file={file}")
    assert "the store local is in the same file" in text
    assert "unknown whether an agent runs on" in text


def test_check_asks_the_policies_what_they_say(run: Run, kube: KubeApi, agent: Agent) -> None:
    def checked(domain: str, store: str, code: int) -> str:
        body = manifest(f"{agent.node}-check", agent.node, store, domain)
        return vmbackup(run, "check", "-f", "-", stdin=json.dumps(body), code=code)

    rule = {"namespaces": ["default"], "domains": ["web-*"], "nodes": ["*"], "stores": [agent.node]}
    kube.apply({
        "apiVersion": "vmbackup.dev/v1alpha1",
        "kind": "VMBackupPolicy",
        "metadata": {"name": "only-web"},
        "spec": {"rules": [rule]},
    })  # fmt: skip
    try:
        assert "ok  a VMBackupPolicy allows default" in checked("web-1", agent.node, 0)
        assert "no VMBackupPolicy allows default to back up db-1" in checked("db-1", agent.node, 0)
        assert "NO  no VMBackupPolicy allows default to back up web-1" in checked("web-1", "nowhere", 1)
    finally:
        kube.kubectl("delete", "vmbackuppolicy", "only-web")
    assert "there is no VMBackupPolicy: everything is allowed" in checked("web-1", agent.node, 0)


def test_get_wide_is_enough_to_follow_a_backup(run: Run, agent: Agent, copying: CatchBackup) -> None:
    made, _guest = copying(agent, **{"commit.backoffLimit": 0})

    def row() -> dict[str, str]:
        heads, line = run("get", "vmb", made.name, "-o", "wide").stdout.splitlines()
        starts = [match.start() for match in re.finditer(r"(?<!\S)\S+( \S+)*", heads)]
        ends = [*starts[1:], None]
        return {heads[at:to].strip(): line[at:to].strip() for at, to in zip(starts, ends, strict=True)}

    seen = row()
    assert (seen["PHASE"], seen["READY"], seen["CHAIN CLEAN"]) == ("Copying", "Unknown", "False")
    assert re.fullmatch(r"\d+s", seen["SNAPSHOT"])
    made.patch({"copy": {"bandwidth": None}})
    made.wait()
    seen = row()
    assert (seen["PROGRESS"], seen["READY"], seen["REASON"]) == ("100%", "True", "Succeeded")
    assert (seen["COMPLETE"], seen["CHAIN CLEAN"], seen["STORE"]) == ("True", "True", agent.node)
    assert "stored at" in seen["MESSAGE"]


def test_check_names_a_command_that_brings_the_definitions_that_are_missing(run: Run, tmp_path: Path) -> None:
    with KubeApi(tmp_path / "bare") as bare:
        said = vmbackup(run, "check", code=1, kubeconfig=bare.kubeconfig)
        assert said.count("the API server does not know") == 3
        command = re.findall(r"\(kubectl (.*), or its install\.yaml\)", said)[0]
        bare.kubectl(*command.replace("crds/", str(ROOT / "crds")).split())
        bare.kubectl("wait", "--for=condition=Established", "--timeout=30s", "crd", "--all")
        assert "the API server does not know" not in vmbackup(run, "check", code=1, kubeconfig=bare.kubeconfig)


def _a_store(name: str) -> str:
    return json.dumps({
        "apiVersion": "vmbackup.dev/v1alpha1",
        "kind": "VMBackupStore",
        "metadata": {"name": name},
        "spec": {"directory": {"path": "/srv"}},
    })  # fmt: skip


def test_check_sees_the_agent_of_a_node_in_its_pod(run: Run, kube: KubeApi, agent_pod: AgentPod) -> None:
    text = run("vmbackup", "check").stdout
    assert f"the agent of {agent_pod.node} is ready: the pod {agent_pod.path}" in text
    agent_pod.becomes(ready=False)
    assert f"the agent of {agent_pod.node} is not ready" in vmbackup(run, "check", code=1)


def test_who_may_see_little_is_told_so_and_no_more(run: Run, kube: KubeApi, agent: Agent) -> None:
    text = vmbackup(run, "check", kubeconfig=kube.kubeconfig_for("nobody"))
    assert "agents: you may not look" in text
    assert "you may not create VMBackups" in text
    said = vmbackup(run, "status", code=1, kubeconfig=kube.kubeconfig_for("nobody"))
    assert "Forbidden" in said
    assert "Traceback" not in said


def test_forget_refuses_as_long_as_the_node_or_its_agent_may_be_alive(
    run: Run, own_agent: Agent, copying: CatchBackup
) -> None:
    own_agent.start()
    made, guest = copying(own_agent)
    said = vmbackup(run, "forget", made.name, "--yes", code=1)
    assert "its agent wrote a status" in said
    assert "its agent was not asked to release it yet" in said
    add_node(own_agent.kube, own_agent.node, ready=True)
    pod = add_agent_pod(own_agent.kube, own_agent.node)
    said = vmbackup(run, "forget", made.name, "--yes", "--silent-for=0s", code=1)
    assert "the node is Ready" in said
    assert f"its agent is ready: the pod {pod.path}" in said
    assert made.exists()
    assert not made.get()["metadata"].get("deletionTimestamp")
    remove(pod)
    made.delete()
    assert_home(guest)


def test_forget_lets_the_backup_of_a_node_go_that_is_gone_and_names_what_remains(
    run: Run, own_agent: Agent, copying: CatchBackup
) -> None:
    own_agent.start()
    made, guest = copying(own_agent)
    own_agent.kill()
    made.delete("--wait=false")
    assert "ago only: wait 10m" in vmbackup(run, "forget", made.name, "--yes", code=1)
    wait_until(lambda: _silent(run, made.name), "silence", SECONDS)
    said = vmbackup(run, "forget", made.name, "--silent-for=1s", code=2)
    assert "--yes" in said
    assert "is not forgotten" in vmbackup(run, "forget", made.name, "--silent-for=1s", typed="y", code=1)
    assert made.exists()
    said = vmbackup(run, "forget", made.name, "--silent-for=1s", typed=made.name)
    assert guest.live().source in said
    assert "delete none of them" in said
    assert not made.exists()
    own_agent.start()  # it comes back after all
    wait_until(lambda: guest.live().source == guest.bases["vda"], "the orphan is home", SECONDS)


def _silent(run: Run, name: str) -> bool:
    """Nobody is there who could agree: exit code 2 once nothing is in the way."""
    return run("vmbackup", "forget", name, "--silent-for=1s").returncode == 2


def test_kubectl_completes_commands_flags_and_names_that_fit(run: Run, agent: Agent, domain: DomainFactory) -> None:
    made = agent.apply(domain(size="8M").name)
    made.wait()

    def proposals(*words: str) -> list[str]:
        lines = run("__complete", "vmbackup", *words).stdout.splitlines()
        return [line.split("\t")[0] for line in lines if not line.startswith(":")]

    assert proposals("f") == ["forget"]
    assert "--silent-for" in proposals("forget", "--s")
    assert made.name in proposals("status", "-n", "default", made.name[:4])
    assert made.name in proposals("retry", "")
    assert made.name not in proposals("cancel", "")
    assert "kube-system" in proposals("status", "-n", "kube-")
    assert proposals("status", "--context", "") == ["sandbox"]


@pytest.mark.chaos
@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_krew_installs_it_from_its_manifest_and_archive_and_kubectl_finds_it(system: str, tmp_path: Path) -> None:
    build(tmp_path)
    done = krew_installs(tmp_path, KREW_OS=system)
    assert done.returncode == 0, done.stderr
    found = {"PATH": f"{tmp_path / 'krew/bin'}:/usr/bin:/bin", "HOME": str(tmp_path)}
    helped = subprocess.run([binaries.path("kubectl"), "vmbackup", "--help"], env=found, capture_output=True, text=True)
    assert "Manages VMBackups" in helped.stdout, helped.stderr


@pytest.mark.chaos
def test_krew_refuses_an_archive_that_is_not_the_one_of_the_manifest(tmp_path: Path) -> None:
    build(tmp_path)
    with (tmp_path / ARCHIVE).open("ab") as archive:
        archive.write(b"more")
    assert "checksum does not match" in krew_installs(tmp_path).stderr


def krew_installs(dist: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """As docs/install.md has it, into a directory of its own; nothing is downloaded."""
    files = [f"--manifest={dist / 'vmbackup.yaml'}", f"--archive={dist / ARCHIVE}"]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(dist), "KREW_ROOT": str(dist / "krew")}
    variables |= {"KREW_NO_UPGRADE_CHECK": "yes"}
    return subprocess.run(
        [binaries.path("krew"), "install", *files],
        env=environment | variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_flags_that_kubectl_has_reach_it(run: Run, kube: KubeApi, tmp_path: Path) -> None:
    assert "Forbidden" in vmbackup(run, "status", "-A", "--as=nobody", code=1)
    as_admin = ["--as=nobody", "--as-uid=0", "--as-group=more", "--as-group=system:masters"]
    assert "Forbidden" not in vmbackup(run, "status", "-A", *as_admin)
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "flags", "namespace": "default"}}
    kube.apply(account)
    token = kube.kubectl("create", "token", "flags").strip()
    empty = tmp_path / "kubeconfig"
    empty.touch()
    for trust in (f"--certificate-authority={kube.authority.certificate}", "--insecure-skip-tls-verify"):
        said = vmbackup(run, "status", "-s", kube.url, f"--token={token}", trust, code=1, kubeconfig=empty)
        assert 'User "system:serviceaccount:default:flags" cannot list' in said


def test_usage_errors_have_their_own_exit_code(run: Run) -> None:
    assert "set a time such as" in vmbackup(run, "forget", "x", "--silent-for=ten", code=2)
    assert "invalid choice" in vmbackup(run, "destroy", code=2)
    assert "there is no VMBackup nobody" in vmbackup(run, "status", "nobody", code=1)
    assert os.environ.get("KUBECTL") is None
