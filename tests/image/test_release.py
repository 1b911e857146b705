"""What `make release` writes to dist/; with the image of the tests, which is not built again for it."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sandbox import release
from sandbox.image import ROOT, VERSION

pytestmark = pytest.mark.timeout(1200)  # the first build of the image is slow on a busy machine

# Paths that are somebody's own, and hosts that packages and images are fetched from.
FOREIGN = re.compile(
    rb"/(?:home|root|work|tmp|builds)/[a-z]|(?:docker|ghcr|quay|gcr|pkg|deb|snapshot)\.(?:io|dev|debian)|pypi\."
)


@pytest.fixture(scope="module")
def dist(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("release") / "dist"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        release.release(directory, archive)
    return directory


def test_it_is_complete(dist: Path):
    assert {path.name for path in dist.iterdir()} == {*release.FILES, release.SUMS}


def test_the_sums_are_those_of_all_its_files(dist: Path):
    done = subprocess.run(["sha256sum", "--check", "--strict", release.SUMS], cwd=dist, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert len(done.stdout.splitlines()) == len(release.FILES)


def test_what_it_installs_is_what_kustomize_makes_with_the_image_of_this_version(dist: Path):
    objects = list(yaml.safe_load_all((dist / "install.yaml").read_text()))
    kinds = {each["kind"] for each in objects}
    assert {"CustomResourceDefinition", "Namespace", "DaemonSet", "ValidatingAdmissionPolicy"} <= kinds
    [agent] = [each for each in objects if each["kind"] == "DaemonSet"]
    assert [one["image"] for one in agent["spec"]["template"]["spec"]["containers"]] == [f"vmbackup:{VERSION}"]


def test_the_wheel_installs_the_program_and_the_sources_build_it_again(dist: Path, tmp_path: Path):
    wheel = dist / f"vmbackup-{VERSION}-py3-none-any.whl"
    assert "vmbackup/agent/operator.py" in zipfile.ZipFile(wheel).namelist()
    shutil.unpack_archive(dist / f"vmbackup-{VERSION}.tar.gz", tmp_path, filter="data")
    sources = tmp_path / f"vmbackup-{VERSION}"
    again = ["-m", "hatchling", "build", "-t", "wheel", "--directory", str(tmp_path)]
    environment = {"SOURCE_DATE_EPOCH": "1700000000", "PATH": "/usr/bin"}
    subprocess.run([ROOT / ".venv/bin/python", *again], cwd=sources, env=environment, check=True, capture_output=True)
    assert (tmp_path / wheel.name).read_bytes() == wheel.read_bytes()


def test_the_image_is_the_one_that_was_built(dist: Path, archive: Path):
    with gzip.open(dist / f"vmbackup-{VERSION}-image.tar.gz") as packed, archive.open("rb") as built:
        while block := built.read(1 << 24):
            assert packed.read(len(block)) == block
        assert not packed.read(1)


def test_the_bill_of_materials_names_each_package_of_debian_and_of_the_lock(dist: Path):
    bill: dict[str, Any] = json.loads((dist / f"vmbackup-{VERSION}-image.cdx.json").read_text())
    assert (bill["bomFormat"], bill["metadata"]["component"]["version"]) == ("CycloneDX", VERSION)
    urls = [part["purl"] for part in bill["components"]]
    python = {
        re.sub("[._]", "-", url.removeprefix("pkg:pypi/").lower().split("@")[0]) for url in urls if ":pypi/" in url
    }
    locked = set(re.findall(r"^(\S+)==", (dist / f"vmbackup-{VERSION}-requirements.txt").read_text(), re.MULTILINE))
    assert python == locked | {"vmbackup"}
    debian = {url.removeprefix("pkg:deb/debian/").split("@")[0] for url in urls if ":deb/" in url}
    assert {"libvirt0", "python3", "qemu-utils", "libc6"} <= debian
    assert not {"gcc", "libvirt-dev", "python3-dev"} & debian


def test_nothing_in_it_names_the_machine_it_was_made_on_or_a_place_that_packages_come_from(dist: Path):
    looked_at = 0
    for name, content in contents(dist):
        found = FOREIGN.search(content) or re.search(re.escape(str(ROOT).encode()), content)
        assert not found, f"{name}: {found.group()!r}"
        looked_at += 1
    assert looked_at > 100


def contents(dist: Path) -> Iterator[tuple[str, bytes]]:
    """Every file, and every file in an archive but the image, which Debian's and PyPI's packages fill."""
    for path in dist.iterdir():
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as archive:
                yield from ((f"{path.name}: {name}", archive.read(name)) for name in archive.namelist())
        elif path.name.endswith("-image.tar.gz"):
            continue
        elif path.suffix in (".gz", ".tgz"):
            with tarfile.open(path) as archive:
                files = (member for member in archive if member.isfile())
                yield from ((f"{path.name}: {one.name}", archive.extractfile(one).read()) for one in files)  # type: ignore[union-attr]
        else:
            yield path.name, path.read_bytes()


def test_the_same_commit_gives_the_same_bytes(
    dist: Path, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setattr(release, "_compress", lambda source, target: None)  # seconds; the image has a test of its own
    release.release(tmp_path / "again", archive)
    ours = f"vmbackup-{VERSION}.tgz"  # helm puts the time of day into its archive
    names = {path.name for path in (tmp_path / "again").iterdir()} - {release.SUMS, ours}
    different = [name for name in names if (dist / name).read_bytes() != (tmp_path / "again" / name).read_bytes()]
    assert len(names) == len(release.FILES) - 2
    assert not different
