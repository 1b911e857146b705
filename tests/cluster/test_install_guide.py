"""The kustomization that docs/install.md shows is what it says: the image of one's own, and another directory."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from sandbox import binaries
from sandbox.kube import KubeApi, KubectlError

ROOT = Path(__file__).parent.parent.parent
_BLOCK = re.compile(r"```yaml\n(.*?)```", re.DOTALL)


def test_the_kustomization_of_the_guide_names_the_image_and_mounts_another_directory(tmp_path: Path) -> None:
    shown = _BLOCK.findall((ROOT / "docs/install.md").read_text())
    kustomization = next(block for block in shown if "kind: Kustomization" in block)
    patches = next(block for block in shown if block.startswith("patches:"))
    where = os.path.relpath(ROOT / "manifests", tmp_path.resolve())
    text = kustomization.replace("../vmbackup/manifests", where) + patches
    (tmp_path / "kustomization.yaml").write_text(text)
    done = subprocess.run(
        [binaries.path("kubectl"), "kustomize", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    bodies: list[dict[str, Any]] = list(yaml.safe_load_all(done.stdout))
    (pod,) = [body["spec"]["template"]["spec"] for body in bodies if body["kind"] == "DaemonSet"]
    (agent,) = pod["containers"]
    assert re.fullmatch(r"REGISTRY/vmbackup:\d+\.\d+\.\d+", agent["image"])
    assert {"name": "srv-images", "hostPath": {"path": "/srv/images", "type": "Directory"}} in pod["volumes"]
    assert "/srv/images" in {mount["mountPath"] for mount in agent["volumeMounts"]}


def test_the_cron_job_of_the_guide_may_create_its_vmbackup_and_nothing_else(installed: KubeApi) -> None:
    nightly = next(block for block in _BLOCK.findall((ROOT / "docs/install.md").read_text()) if "CronJob" in block)
    installed.kubectl("apply", "-f", "-", stdin=nightly)
    try:
        (held,) = [body["data"] for body in yaml.safe_load_all(nightly) if body["kind"] == "ConfigMap"]
        its = ("--namespace=default", "--as=system:serviceaccount:default:nightly-backup")
        made = installed.kubectl("create", "--dry-run=server", "-f", "-", *its, stdin=held["vmbackup.yaml"])
        assert re.match(r"vmbackup.vmbackup.dev/web-01-\w+ created", made)
        with pytest.raises(KubectlError, match="forbidden"):
            installed.kubectl("get", "secrets", *its)
    finally:
        installed.kubectl("delete", "-f", "-", stdin=nightly)


def test_the_directories_that_the_guide_names_are_those_of_the_daemonset() -> None:
    guide = (ROOT / "docs/install.md").read_text()
    (daemonset,) = yaml.safe_load_all((ROOT / "manifests/base/daemonset.yaml").read_text())
    volumes = daemonset["spec"]["template"]["spec"]["volumes"]
    mounted = {volume["hostPath"]["path"] for volume in volumes if "hostPath" in volume}
    table = guide[guide.index("| Directory |") : guide.index("Images or a store elsewhere")]
    assert set(re.findall(r"`(/[^`]*)`", table)) == mounted
