"""The kustomization that docs/install.md shows is what it says: the image of one's own, and another directory."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

from sandbox import binaries

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


def test_the_directories_that_the_guide_names_are_those_of_the_daemonset() -> None:
    guide = (ROOT / "docs/install.md").read_text()
    (daemonset,) = yaml.safe_load_all((ROOT / "manifests/base/daemonset.yaml").read_text())
    volumes = daemonset["spec"]["template"]["spec"]["volumes"]
    mounted = {volume["hostPath"]["path"] for volume in volumes if "hostPath" in volume}
    table = guide[guide.index("| Directory |") : guide.index("Images or a store elsewhere")]
    assert set(re.findall(r"`(/[^`]*)`", table)) == mounted
