"""The bill of materials of the image, in CycloneDX JSON: the packages of Debian and PyPI in it, read from its files."""

from __future__ import annotations

import json
import re
import tarfile
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import IO

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

_DEBIAN = re.compile(r"(\./)?var/lib/dpkg/status")
_PYTHON = re.compile(r"(\./)?opt/vmbackup/.*\.dist-info/METADATA")


def sbom(archive: Path, name: str, version: str, made: int) -> str:
    """Of a docker-archive. `made`: its date, in seconds since 1970."""
    image = Component(
        name=name, version=version, type=ComponentType.CONTAINER, bom_ref=name, licenses=_licences("Apache-2.0")
    )
    bom = Bom(components=_components(archive), serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"{name}:{version}:{made}"))
    bom.metadata.component = image
    bom.metadata.timestamp = datetime.fromtimestamp(made, UTC)
    bom.register_dependency(image, bom.components)
    return JsonV1Dot6(bom).output_as_string(indent=2) + "\n"


def _components(archive: Path) -> Iterator[Component]:
    debian, python = "", dict[str, str]()
    for path, content in _files(archive):
        if _DEBIAN.fullmatch(path):
            debian = content  # that of a later layer counts
        else:
            python[path] = content
    release = "debian-13"
    for package in map(Parser().parsestr, debian.strip().split("\n\n")):
        if package["Status"] == "install ok installed":
            where = {"arch": package["Architecture"], "distro": release}
            yield _component(PackageURL("deb", "debian", package["Package"], package["Version"], where))
    for package in map(Parser().parsestr, python.values()):
        yield _component(PackageURL("pypi", None, package["Name"], package["Version"]), package)


def _files(archive: Path) -> Iterator[tuple[str, str]]:
    """The files that list the packages."""
    with tarfile.open(archive) as image:
        for layer in json.load(_member(image, "manifest.json"))[0]["Layers"]:
            with tarfile.open(fileobj=_member(image, layer)) as files:
                for file in files:
                    if file.isfile() and (_DEBIAN.fullmatch(file.name) or _PYTHON.fullmatch(file.name)):
                        yield file.name, _member(files, file).read().decode()


def _member(archive: tarfile.TarFile, member: str | tarfile.TarInfo) -> IO[bytes]:
    file = archive.extractfile(member)
    assert file is not None, member
    return file


def _component(url: PackageURL, package: Message | None = None) -> Component:
    licences = _licences(package["License-Expression"]) if package is not None else []
    return Component(name=url.name, version=url.version, purl=url, bom_ref=str(url), licenses=licences)


def _licences(expression: str | None) -> list[object]:
    return [LicenseFactory().make_from_string(expression)] if expression else []
