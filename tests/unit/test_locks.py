"""What is installed is pinned, by hashes, and from wherever the user's tools are set up to fetch it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from sandbox import go

ROOT = Path(__file__).parent.parent.parent
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))


def requirements(lock: Path) -> dict[str, str]:
    """Each requirement of a lock, by the name of its package."""
    logical_lines = lock.read_text().replace("\\\n", " ").splitlines()
    return {re.split(r"[=\[ ]", line)[0]: line for line in logical_lines if line}


def wanted(*groups: str) -> set[str]:
    """The packages that pyproject.toml asks for directly."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = [*(project["project"]["dependencies"] if "run" in groups else ())]
    for group in set(groups) - {"run"}:
        lines += project["dependency-groups"][group]
    return {re.split(r"[^A-Za-z0-9-]", line)[0].lower() for line in lines}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_a_lock_pins_each_package_by_hashes_and_names_no_address_and_no_path(lock: Path) -> None:
    for line in requirements(lock).values():
        assert re.match(r"[a-z0-9-]+==\S+ ", line)
        assert "--hash=sha256:" in line
    assert not re.search(r"://|^-|^\.|^/|file:", lock.read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    ("lock", "groups"),
    [
        ("run.lock", ["run"]),
        ("build.lock", ["build"]),
        ("dev.lock", ["run", "dev"]),
        ("sandbox.lock", ["sandbox"]),
    ],
)
def test_a_lock_holds_what_the_project_asks_for(lock: str, groups: list[str]) -> None:
    """Else it was not renewed: `make lock`."""
    assert wanted(*groups) <= requirements(ROOT / "requirements" / lock).keys()


@pytest.mark.parametrize("name", go.PROGRAMS)
def test_what_is_built_from_a_go_module_is_pinned_by_it(name: str) -> None:
    program = go.PROGRAMS[name]
    assert (program.module / "go.sum").read_text()
    assert program.version in go.path(name).parent.name
    if program.package != ".":
        assert f'_ "{program.package}"' in (program.module / "tools.go").read_text()


def test_all_of_kubernetes_is_of_one_version() -> None:
    program = go.PROGRAMS["kube-apiserver"]
    replaced = re.findall(r"k8s\.io/\S+ => k8s\.io/\S+ v(\S+)", (program.module / "go.mod").read_text())
    assert replaced
    assert {f"v1.{version.removeprefix('0.')}" for version in replaced} == {program.version}
