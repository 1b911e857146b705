"""The files that `vmbackup run -f` accepts, and its messages about the others."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import manifests
from vmbackup.commands.running.backup_file import BackupFile, read
from vmbackup.errors import RefusedError

STORE = manifests.store("local", directory={"path": "/srv/store"})
UID = "5a9c4a3e-3d55-4c39-bd2c-5d9c6b1b51a1"


def read_from(tmp_path: Path, *documents: Any, **options: Any) -> BackupFile:
    file = tmp_path / "backup.yaml"
    file.write_text(yaml.safe_dump_all(documents))
    return read(str(file), store_file=options.get("store_file"), store_path=options.get("store_path"))


def test_backup_and_store_may_be_in_one_file_in_any_order(tmp_path: Path) -> None:
    found = read_from(tmp_path, STORE, None, manifests.backup("web-01-1", nodeName=manifests.DROP))
    assert str(found) == "default/web-01-1"
    assert found.uid == ""
    assert found.store.directory.path == "/srv/store"


def test_the_store_may_be_in_a_file_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "store.yaml"
    file.write_text(yaml.safe_dump(STORE))
    assert read_from(tmp_path, manifests.backup("b"), store_file=str(file)).store.directory.path == "/srv/store"


def test_a_path_may_stand_for_the_store(tmp_path: Path) -> None:
    backup = manifests.backup("b", storeRef=manifests.DROP)
    assert read_from(tmp_path, backup, store_path=Path("/srv/other")).store.directory.path == "/srv/other"


def test_what_kubectl_get_prints_is_taken_with_its_uid_and_status(tmp_path: Path) -> None:
    backup = manifests.backup("b")
    backup["metadata"] |= {"uid": UID, "generation": 1, "managedFields": []}
    backup["status"] = {"phase": "Copying"}
    assert read_from(tmp_path, backup, STORE).uid == UID


def test_it_may_come_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(yaml.safe_dump_all([manifests.backup("b"), STORE])))
    assert read("-", store_file=None, store_path=None).name == "b"


def with_metadata(**changes: Any) -> dict[str, Any]:
    backup = manifests.backup("b")
    backup["metadata"] |= changes
    return backup


@pytest.mark.parametrize(
    ("documents", "says"),
    [
        ([], "contains 0 VMBackups: it must contain exactly one"),
        ([manifests.backup("a"), manifests.backup("b")], "contains 2 VMBackups"),
        ([manifests.backup("a")], "names the VMBackupStore 'local', which is in none"),
        (
            [manifests.backup("a"), manifests.store("other", directory={"path": "/s"})],
            "'local', which is in none",
        ),
        ([{"apiVersion": "v1", "kind": "Pod"}], "apiVersion v1: only vmbackup.dev/v1alpha1 is supported"),
        (["text"], "contains a document of apiVersion None"),
        ([with_metadata(uid="../../etc"), STORE], "metadata.uid is '../../etc'"),
        ([with_metadata(uid=7), STORE], "metadata.uid is 7"),
        ([with_metadata(name="../b"), STORE], "metadata.name is '../b'"),
        ([with_metadata(namespace="a/b"), STORE], "metadata.namespace is 'a/b'"),
        ([manifests.backup("a", disks=[]), STORE], "spec.disks is []"),
        ([{**manifests.backup("a"), "spec": None}, STORE], "spec of the VMBackup is missing"),
        ([manifests.backup("a"), manifests.store("local")], "spec.directory is required"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, documents: list[Any], says: str) -> None:
    with pytest.raises(RefusedError) as refused:
        read_from(tmp_path, *documents)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("content", "says"), [(b"a: [", "is not YAML"), (b"\xff", "is not YAML"), (None, "cannot be read: No such file")]
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, says: str) -> None:
    file = tmp_path / "backup.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RefusedError) as refused:
        read(str(file), store_file=None, store_path=None)
    assert str(refused.value).startswith(f"{file} {says}")


def test_only_one_kind_of_store_may_be_given(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="exclude each other: set only one"):
        read_from(tmp_path, manifests.backup("b"), store_file="s.yaml", store_path=Path("/s"))
