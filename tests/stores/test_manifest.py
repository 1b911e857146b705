from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from vmbackup.errors import PermanentError
from vmbackup.stores.directory.readme import readme
from vmbackup.stores.manifest import Manifest, StoredDisk, StoredImage

A, B = "sha256:" + "a" * 64, "sha256:" + "b" * 64

MANIFEST = Manifest(
    uid="6f0b1f9e-8c1c-4f5e-9d4e-0a4b8f4d7c11",
    namespace="default",
    name="web-01-nightly",
    domain="web-01",
    domain_uuid="11111111-2222-3333-4444-555555555555",
    domain_xml="domain.xml",
    nvram=None,
    snapshot_time=datetime(2026, 11, 23, 18, 35, 5, 120_999, tzinfo=UTC),
    disks=(
        StoredDisk("vda.qcow2", "qcow2", 4096, A, "backing-1.raw", target="vda", virtual_bytes=1 << 30),
        StoredDisk("vdb.raw", "raw", 512, B, None, target="vdb", virtual_bytes=512),
    ),
    images=(StoredImage("backing-1.raw", "raw", 1024, B, None),),
)

# What outsiders rely on. A change here that breaks a reader needs another schemaVersion.
GOLDEN = f"""\
{{
  "schemaVersion": 1,
  "uid": "6f0b1f9e-8c1c-4f5e-9d4e-0a4b8f4d7c11",
  "namespace": "default",
  "name": "web-01-nightly",
  "domain": "web-01",
  "domainUUID": "11111111-2222-3333-4444-555555555555",
  "domainXML": "domain.xml",
  "nvram": null,
  "snapshotTime": "2026-11-23T18:35:05.120Z",
  "disks": [
    {{
      "target": "vda",
      "file": "vda.qcow2",
      "format": "qcow2",
      "virtualBytes": 1073741824,
      "bytes": 4096,
      "digest": "{A}",
      "backing": "backing-1.raw"
    }},
    {{
      "target": "vdb",
      "file": "vdb.raw",
      "format": "raw",
      "virtualBytes": 512,
      "bytes": 512,
      "digest": "{B}",
      "backing": null
    }}
  ],
  "images": [
    {{
      "file": "backing-1.raw",
      "format": "raw",
      "bytes": 1024,
      "digest": "{B}",
      "backing": null
    }}
  ]
}}
"""


def test_the_manifest_is_written_as_outsiders_know_it() -> None:
    assert MANIFEST.to_json() == GOLDEN


def test_what_was_written_is_read_back() -> None:
    milliseconds = MANIFEST.snapshot_time.replace(microsecond=120_000)
    read = Manifest.from_json(GOLDEN, "manifest.json")
    assert read.snapshot_time == milliseconds
    assert read.to_json() == GOLDEN


def test_a_time_of_another_zone_is_written_in_utc() -> None:
    berlin = datetime(2026, 11, 23, 19, 35, 5, tzinfo=timezone(timedelta(hours=1)))
    text = Manifest(**{**MANIFEST.__dict__, "snapshot_time": berlin}).to_json()
    assert json.loads(text)["snapshotTime"] == "2026-11-23T18:35:05.000Z"


def test_fields_of_later_versions_are_passed_over() -> None:
    later = {**json.loads(GOLDEN), "compression": "none"}
    assert Manifest.from_json(json.dumps(later), "manifest.json").to_json() == GOLDEN


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content.pop(name)


def with_(name: str, value: object) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content.update({name: value})


def with_disk(name: str, value: object) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["disks"][1].update({name: value})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (with_("schemaVersion", 2), "schemaVersion 2: use a newer vmbackup"),
        (without("schemaVersion"), "schemaVersion is missing"),
        (without("uid"), "uid is missing"),
        (with_("domain", 7), "domain is 7, not of type str"),
        (with_("snapshotTime", "yesterday"), "snapshotTime is 'yesterday', not a time of RFC 3339"),
        (with_("snapshotTime", "2026-11-23T18:35:05"), "not a time with its zone"),
        (with_("domainXML", "../domain.xml"), r"domainXML is '\.\./domain\.xml'"),
        (with_("disks", {}), "disks is {}, not of type list"),
        (with_("disks", ["vda"]), r"disks\[0\] must be an object"),
        (with_disk("file", "/etc/shadow"), r"disks\[1\]: file is '/etc/shadow'"),
        (with_disk("file", ".."), r"disks\[1\]: file is '\.\.'"),
        (with_disk("bytes", -1), r"disks\[1\]: bytes is -1"),
        (with_disk("bytes", True), r"disks\[1\]: bytes is True"),
        (with_disk("virtualBytes", "512"), r"disks\[1\]: virtualBytes is '512'"),
        (with_disk("digest", "md5:00"), r"disks\[1\]: digest is 'md5:00'"),
        (with_disk("backing", "a/b"), r"disks\[1\]: backing is 'a/b'"),
    ],
)
def test_a_damaged_manifest_is_refused_by_field(spoil: Callable[[dict[str, Any]], Any], message: str) -> None:
    content = json.loads(GOLDEN)
    spoil(content)
    with pytest.raises(PermanentError, match=f"^manifest.json.*{message}") as error:
        Manifest.from_json(json.dumps(content), "manifest.json")
    assert error.value.reason == "BadManifest"


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_what_is_no_manifest_at_all_is_refused(text: str) -> None:
    with pytest.raises(PermanentError, match=r"^manifest\.json"):
        Manifest.from_json(text, "manifest.json")


def test_the_readme_names_each_file_and_the_commands() -> None:
    text = readme(MANIFEST)
    for part in ("web-01 as it was at 2026-11-23 18:35:05 UTC", "vda.qcow2 is the disk vda", "vdb.raw", "domain.xml",
                 "sha256sum", "virsh define domain.xml", "virsh start web-01",
                 "qemu-img convert -O qcow2 vda.qcow2 /var/lib/libvirt/images/vda.qcow2",
                 "cp --sparse=always vdb.raw /var/lib/libvirt/images/vdb.raw", "*.vmb-*.qcow2"):  # fmt: skip
        assert part in text
    assert "nvram" not in text


def test_the_readme_says_where_the_uefi_variables_go() -> None:
    text = readme(replace(MANIFEST, nvram="nvram.fd"))
    assert "Copy nvram.fd to the path of <nvram> in domain.xml." in text


def test_a_domain_of_any_name_is_one_word_in_the_commands_of_the_readme() -> None:
    text = readme(replace(MANIFEST, domain="web $(reboot)"))
    assert "virsh start 'web $(reboot)'\n" in text
