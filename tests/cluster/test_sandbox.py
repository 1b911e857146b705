"""The sandbox's API server is a real one, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sandbox.kube import KubeApi, KubectlError
from sandbox.processes import Program, SandboxError
from tests.support.domains import wait_until


def config_map(name: str) -> dict[str, object]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"answer": "42"}}


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.02)


def test_it_stores_objects_and_keeps_them_when_it_is_restarted(bare_kube: KubeApi) -> None:
    bare_kube.apply(config_map("kept"))
    bare_kube.apiserver.stop()
    with pytest.raises(KubectlError, match="refused"):
        bare_kube.get("configmap", "kept")
    bare_kube.start_apiserver()
    assert bare_kube.get("configmap", "kept")["data"] == {"answer": "42"}


def test_a_user_may_do_only_what_rbac_grants(bare_kube: KubeApi) -> None:
    bare_kube.apply(config_map("guarded"))
    reader = bare_kube.kubeconfig_for("reader")
    with pytest.raises(KubectlError, match='User "reader" cannot get resource "configmaps"'):
        bare_kube.kubectl("get", "configmap", "guarded", kubeconfig=reader)
    bare_kube.kubectl("create", "role", "read", "--verb=get", "--resource=configmaps")
    bare_kube.kubectl("create", "rolebinding", "read", "--role=read", "--user=reader")
    assert "guarded" in bare_kube.kubectl("get", "configmap", "guarded", kubeconfig=reader)
    with pytest.raises(KubectlError, match='User "reader" cannot delete resource "configmaps"'):
        bare_kube.kubectl("delete", "configmap", "guarded", kubeconfig=reader)


def test_nobody_gets_in_without_a_certificate(bare_kube: KubeApi, tmp_path: Path) -> None:
    config = json.loads(bare_kube.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": "guessed"}
    stranger = tmp_path / "kubeconfig"
    stranger.write_text(json.dumps(config))
    with pytest.raises(KubectlError, match="must be logged in"):
        bare_kube.kubectl("get", "namespaces", kubeconfig=stranger)


def test_stopping_it_ends_both_processes_and_a_new_start_finds_the_data(tmp_path: Path) -> None:
    with KubeApi(tmp_path / "kube") as kube:
        url, pids = kube.url, [kube.etcd.pid, kube.apiserver.pid]
        kube.apply(config_map("kept"))
    assert all(pid and not Path(f"/proc/{pid}").exists() for pid in pids)
    with KubeApi(tmp_path / "kube") as kube:
        assert kube.url == url
        assert kube.get("configmap", "kept")["data"] == {"answer": "42"}


def test_a_program_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    starter = f"""
from pathlib import Path
from sandbox.processes import Program
program = Program("sleeper", Path({str(tmp_path)!r}))
program.start(["sleep", "600"])
print(program.pid, flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", starter], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        pid = int(process.stdout.readline())
        comm = Path(f"/proc/{pid}/comm")
        wait_until(lambda: comm.read_text() == "sleep\n", "it has told the kernel what is to be its end")
        os.kill(process.pid, signal.SIGKILL)
    wait_until_gone(pid)


def test_a_detached_program_is_found_again_and_ended_by_its_pid_file(tmp_path: Path) -> None:
    starter = f"""
from pathlib import Path
from sandbox.processes import Program
Program("sleeper", Path({str(tmp_path)!r})).start(["sleep", "600"], detached=True)
"""
    subprocess.run([sys.executable, "-c", starter], check=True)
    program = Program("sleeper", tmp_path)
    pid = program.pid
    assert pid
    program.stop()
    wait_until_gone(pid)


def test_a_pid_file_whose_number_is_used_by_another_program_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "stale.pid").write_text(f"{os.getpid()} 1\n")
    stale = Program("stale", tmp_path)
    assert not stale.running
    stale.stop()


def test_a_program_that_ends_at_once_is_reported_with_its_log(tmp_path: Path) -> None:
    program = Program("broken", tmp_path)
    program.start(["sh", "-c", "echo the disk is upside down; exit 1"])
    with pytest.raises(SandboxError, match="the disk is upside down"):
        program.wait_until(lambda: False, seconds=10)
