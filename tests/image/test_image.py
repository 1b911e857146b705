"""The image of the agent, built from the Dockerfile on a base of debootstrap, and looked at from inside."""

from __future__ import annotations

import json
import re
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from sandbox import image

pytestmark = pytest.mark.timeout(1200)  # the first build is slow on a busy machine

_PYTHON = "/opt/vmbackup/bin/python"
_LIST_PACKAGES = """
from importlib.metadata import distributions
for one in distributions(path=["/opt/vmbackup/lib/python3.13/site-packages"]):
    print(one.name.lower().replace("_", "-"), one.version)
"""
_IMPORT_ALL = """
import importlib, pkgutil, vmbackup
for module in pkgutil.walk_packages(vmbackup.__path__, "vmbackup."):
    importlib.import_module(module.name)
    print(module.name)
"""
_STALE_BYTE_CODE = """
import importlib.util, pathlib, vmbackup
for source in pathlib.Path(vmbackup.__path__[0]).rglob("*.py"):
    code = pathlib.Path(importlib.util.cache_from_source(source))
    if not code.exists() or code.read_bytes()[4:8] != b"\\1\\0\\0\\0":  # 1: by hash, not looked at again
        print(source)
"""


@pytest.fixture(scope="session")
def config(archive: Path) -> dict[str, Any]:
    """The image's configuration, as a registry would hold it."""
    with tarfile.open(archive) as file:
        manifest = json.load(_member(file, "manifest.json"))
        return json.load(_member(file, manifest[0]["Config"]))


@pytest.fixture(scope="session")
def root(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image's files."""
    root = tmp_path_factory.mktemp("image")
    with tarfile.open(archive) as file:
        for layer in json.load(_member(file, "manifest.json"))[0]["Layers"]:
            with tarfile.open(fileobj=_member(file, layer)) as files:
                files.extractall(root, filter="fully_trusted")
    for whiteout in list(root.rglob(".wh.*")):
        whiteout.unlink()
    return root


def _member(file: tarfile.TarFile, name: str) -> Any:
    member = file.extractfile(name)
    assert member is not None
    return member


def _inside(root: Path, *command: str) -> str:
    """What a command says, run in the image's files with the environment that a container has."""
    environment = {"PATH": "/opt/vmbackup/bin:/usr/bin", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        ["/usr/sbin/chroot", root, *command], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_program_in_it_is_of_the_projects_version(root: Path):
    assert _inside(root, "vmbackup", "--version") == f"vmbackup {image.VERSION}\n"


def test_a_container_of_it_runs_the_agent(root: Path, config: dict[str, Any]):
    assert [config["config"]["Entrypoint"], config["config"]["Cmd"]] == [["vmbackup"], ["agent"]]
    assert "--node-name" in _inside(root, "vmbackup", "agent", "--help")


def test_every_module_loads_with_its_python_and_its_libvirt(root: Path):
    loaded = _inside(root, _PYTHON, "-c", _IMPORT_ALL).split()
    assert {"vmbackup.agent.operator", "vmbackup.guardian", "vmbackup.hypervisor.connection"} <= set(loaded)


def test_it_brings_qemu_img(root: Path):
    assert _inside(root, "qemu-img", "--version").startswith("qemu-img version")


def test_its_python_packages_are_those_of_the_lock(root: Path):
    lock = (image.ROOT / "requirements/run.lock").read_text()
    locked = dict(re.findall(r"^(\S+)==(\S+)", lock, re.MULTILINE))
    installed = dict(line.split() for line in _inside(root, _PYTHON, "-c", _LIST_PACKAGES).splitlines())
    assert installed == locked | {"vmbackup": image.VERSION}


def test_nothing_that_only_builds_is_in_it(root: Path):
    programs = {
        path.name for folder in ("usr/bin", "usr/local/bin", "opt/vmbackup/bin") for path in (root / folder).iterdir()
    }
    assert "python3" in programs
    assert not {name for name in programs if re.fullmatch(r"gcc.*|cc|c\+\+|ld|as|make|pip.*|pkg-config|.*-gcc", name)}
    assert not list((root / "usr/include").glob("*")), "headers"
    assert not (root / "build").exists()


def test_nothing_that_the_build_left_behind_is_in_it(root: Path):
    for folder in ("mnt", "tmp", "var/lib/apt/lists", "var/log", "root/.cache", "usr/share/man", "usr/share/locale"):
        found = [path for path in (root / folder).rglob("*") if not path.is_dir()]
        assert not found, folder
    assert not list((root / "var/cache/apt").rglob("*.deb"))


def test_nothing_of_the_machine_that_built_it_is_in_it(root: Path, config: dict[str, Any]):
    assert (root / "etc/apt/sources.list").read_text() == ""
    assert not list((root / "etc/apt").rglob("*.sources"))
    for name in ("etc/resolv.conf", "etc/hostname", "etc/hosts"):
        assert not (root / name).exists() or (root / name).read_bytes() == b""
    assert str(image.ROOT) not in json.dumps(config)


def test_its_byte_code_stays_valid_whatever_the_time_of_its_files(root: Path):
    assert _inside(root, _PYTHON, "-c", _STALE_BYTE_CODE) == ""


def test_its_labels_say_what_it_is(config: dict[str, Any]):
    labels = {name.removeprefix("org.opencontainers.image."): text for name, text in config["config"]["Labels"].items()}
    assert labels.pop("version") == image.VERSION
    assert labels.pop("licenses") == "Apache-2.0"
    assert labels.pop("base.name").startswith("localhost/")  # a reference in full: else it would be one of Docker Hub
    assert labels.keys() == {
        "title",
        "description",
        "revision",
        "vendor",
        "url",
        "source",
        "documentation",
    }
    assert all(labels.values())


def test_it_takes_less_than_300_mib(archive: Path):
    assert archive.stat().st_size < 300 << 20


def test_a_second_build_of_the_same_takes_none(archive: Path):
    made = archive.stat().st_mtime_ns
    assert image.archive() == archive
    assert archive.stat().st_mtime_ns == made


def test_the_dockerfile_names_the_version_of_the_package():
    """So that a plain `docker build .` labels it right; the build itself fails where they differ."""
    named = re.findall(r"^ARG VERSION=(\S+)$", (image.ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert named == [image.VERSION] * 2
