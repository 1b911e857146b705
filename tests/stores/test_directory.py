"""What a directory store does beyond the contract: its layout, its README, its way of writing, and what it reads."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.stores.conformance import StoreConformance
from tests.support.images import MIB, GuestImages
from tests.support.storage import run, sha256sum
from vmbackup.api.identity import BackupId
from vmbackup.api.store import StoreSpec
from vmbackup.errors import PermanentError, RefusedError
from vmbackup.imaging import Cancelled, CopyControl
from vmbackup.imaging.image import info
from vmbackup.stores.base import DamagedBackup, DiskSource, GuestFacts, Published, Store, StoredBackup, TakenDisk
from vmbackup.stores.registry import open_store

pytest_plugins = ("tests.support.fixtures_storage",)

KEY = BackupId("default", "web-01.nightly", "6f0b1f9e-8c1c")
FOLDER = "default/web-01.nightly.6f0b1f9e-8c1c"
FACTS = GuestFacts("web-01", "11111111-2222", "<domain><password>x</password></domain>", None, 1_790_000_000.0)
CONTROL = CopyControl()


def directory_store(root: Path) -> Store:
    return open_store(StoreSpec.parse({"directory": {"path": str(root)}}))


@pytest.fixture
def guest(tmp_path: Path) -> GuestImages:
    return GuestImages(tmp_path / "guest")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> Store:
    return directory_store(root)


def take_all(store: Store, guest: GuestImages) -> tuple[TakenDisk, ...]:
    return tuple(store.take(KEY, disk, CONTROL) for disk in guest.disks)


def publish(store: Store, guest: GuestImages, facts: GuestFacts = FACTS) -> Published:
    return store.publish(KEY, take_all(store, guest), facts, CONTROL)


def content(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@dataclass(frozen=True)
class DirectoryPlace:
    """See StorePlace."""

    folder: Path

    def open(self) -> Store:
        root = self.folder / "store"
        root.mkdir(exist_ok=True)
        return directory_store(root)

    def damage_image(self, backup: StoredBackup, file: str) -> None:
        path = Path(backup.location, file)
        with path.open("r+b") as image:
            image.seek(path.stat().st_size // 2)
            byte = image.read(1)
            image.seek(-1, os.SEEK_CUR)
            image.write(bytes([byte[0] ^ 1]))

    def damage_manifest(self, location: str) -> None:
        os.truncate(f"{location}/manifest.json", 100)

    def add_foreign(self) -> None:
        root = self.folder / "store"
        for folder in ("lost+found", "default/notes", "default/.hidden.folder", "empty"):
            (root / folder).mkdir()
        (root / "README").touch()
        (root / "default" / "web.file").touch()


class TestCopying(StoreConformance):
    """Where the file system cannot clone."""

    @pytest.fixture
    def place(self, tmp_path: Path) -> DirectoryPlace:
        return DirectoryPlace(tmp_path)


class TestCloning(StoreConformance):
    """Where it can."""

    @pytest.fixture
    def place(self, xfs: Path) -> DirectoryPlace:
        return DirectoryPlace(xfs)


class TestPublished:
    def test_the_folder_holds_the_disks_each_backing_image_once_and_what_explains_them(
        self, store: Store, guest: GuestImages, root: Path
    ) -> None:
        assert publish(store, guest).location == str(root / FOLDER)
        assert content(root / FOLDER) == {
            "vda.qcow2", "vdb.qcow2", "vdc.raw", "backing-1.raw", "backing-2.qcow2",
            "manifest.json", "domain.xml", "README.txt",
        }  # fmt: skip
        assert content(root / "default") == {(root / FOLDER).name}

    def test_the_manifest_agrees_with_the_files(self, store: Store, guest: GuestImages, root: Path) -> None:
        published = publish(store, guest)
        manifest = json.loads((root / FOLDER / "manifest.json").read_text())
        assert manifest["schemaVersion"] == 1
        assert manifest["snapshotTime"] == "2026-09-21T14:13:20.000Z"
        assert [disk["target"] for disk in manifest["disks"]] == ["vda", "vdb", "vdc"]
        assert [disk["virtualBytes"] for disk in manifest["disks"]] == [64 * MIB, 64 * MIB, 20000256]
        for entry in (*manifest["disks"], *manifest["images"]):
            path = root / FOLDER / entry["file"]
            assert entry["digest"] == sha256sum(path)
            assert entry["bytes"] == path.stat().st_size
            assert entry["backing"] == info(path, entry["format"]).backing
        assert published.digests == {disk["target"]: disk["digest"] for disk in manifest["disks"]}

    def test_plain_cp_restores_it_elsewhere_with_the_originals_gone(
        self, store: Store, guest: GuestImages, root: Path, tmp_path: Path
    ) -> None:
        expected = guest.contents(tmp_path / "expected")
        publish(store, guest)
        shutil.rmtree(guest.folder)
        run("cp", "-r", "--sparse=always", str(root / FOLDER), str(tmp_path / "restored"))
        for disk in guest.disks:
            restored = tmp_path / "restored" / f"{disk.target}.{disk.chain[0].format}"
            run("qemu-img", "compare", "-F", "raw", str(restored), str(expected[disk.target]))
            assert info(restored).virtual_bytes == disk.virtual_bytes
            if disk.chain[0].format == "qcow2":
                run("qemu-img", "check", "-q", str(restored))

    def test_it_is_for_the_administrator_alone(self, store: Store, guest: GuestImages, root: Path) -> None:
        publish(store, guest)
        for path in (root, root / "default", root / FOLDER):
            assert path.stat().st_mode & 0o777 == 0o700
        for path in (root / FOLDER).iterdir():
            assert path.stat().st_mode & 0o777 == 0o600
        assert (root / FOLDER / "domain.xml").read_text() == FACTS.domain_xml

    def test_the_uefi_variables_come_along(self, store: Store, guest: GuestImages, root: Path) -> None:
        nvram = guest.folder / "web-01_VARS.fd"
        nvram.write_bytes(b"variables")
        publish(store, guest, replace(FACTS, nvram=nvram))
        assert (root / FOLDER / "nvram.fd").read_bytes() == b"variables"
        assert json.loads((root / FOLDER / "manifest.json").read_text())["nvram"] == "nvram.fd"

    def test_a_crash_after_the_rename_is_made_good_by_publishing_again(
        self, store: Store, guest: GuestImages, root: Path
    ) -> None:
        taken = take_all(store, guest)
        notes = next(path for path in (root / "default").iterdir() if path.suffix == ".json")
        kept = notes.read_bytes()
        first = store.publish(KEY, taken, FACTS, CONTROL)
        notes.write_bytes(kept)
        assert store.publish(KEY, store.taken(KEY), FACTS, CONTROL) == first
        assert not notes.exists()

    def test_nothing_is_published_of_what_was_not_taken(self, store: Store, guest: GuestImages, root: Path) -> None:
        taken = take_all(store, guest)
        store.discard(KEY)
        with pytest.raises(PermanentError, match="No such file"):
            store.publish(KEY, taken, FACTS, CONTROL)
        assert content(root / "default") == set()


class TestTaken:
    def test_nothing_is_visible_before_it_is_published(self, store: Store, guest: GuestImages, root: Path) -> None:
        take_all(store, guest)
        assert all(name.startswith(".") for name in content(root / "default"))

    @pytest.mark.parametrize("damage", [b"", b"[{}]", b"[1]", b"{"])
    def test_damaged_notes_are_an_error_with_its_cure(
        self, damage: bytes, store: Store, guest: GuestImages, root: Path
    ) -> None:
        store.take(KEY, guest.vdc, CONTROL)
        next((root / "default").glob(".*.taken.json")).write_bytes(damage)
        with pytest.raises(PermanentError, match=r"is damaged .*: delete it"):
            store.taken(KEY)

    def test_a_copy_that_was_cut_off_leaves_nothing_behind(self, store: Store, guest: GuestImages, root: Path) -> None:
        store.take(KEY, guest.vdb, CONTROL)
        cancelled = threading.Event()
        with pytest.raises(Cancelled):
            store.take(KEY, guest.vda, CopyControl(cancelled=cancelled, progress=lambda _d, _t: cancelled.set()))
        assert {disk.target for disk in store.taken(KEY)} == {"vdb"}
        store.take(KEY, guest.vda, CONTROL)
        partial = next(path for path in (root / "default").iterdir() if path.is_dir())
        assert content(partial) == {"vdb.qcow2", "backing-1.raw", "vda.qcow2", "backing-2.qcow2"}

    def test_progress_counts_every_new_image_of_the_chain(self, store: Store, guest: GuestImages) -> None:
        seen: list[tuple[int, int]] = []
        control = CopyControl(progress=lambda done, total: seen.append((done, total)))
        taken = store.take(KEY, guest.vda, control)
        total = sum(image.bytes for image in taken.images)
        assert seen[-1] == (total, total)
        assert seen == sorted(seen)
        seen.clear()
        taken = store.take(KEY, guest.vdb, control)
        assert seen[-1] == (taken.images[0].bytes, taken.images[0].bytes)

    def test_copies_have_their_digest_and_publish_adds_the_missing(self, store: Store, guest: GuestImages) -> None:
        assert store.take(KEY, guest.vdc, CONTROL).images[0].digest == sha256sum(Path(guest.vdc.chain[0].path))

    def test_discarding_leaves_nothing_and_may_be_repeated(self, store: Store, guest: GuestImages, root: Path) -> None:
        take_all(store, guest)
        store.discard(KEY)
        store.discard(KEY)
        assert content(root / "default") == set()
        assert store.taken(KEY) == ()

    def test_on_a_file_system_with_reflinks_taking_copies_nothing(self, xfs: Path) -> None:
        guest, store = GuestImages(xfs / "guest"), directory_store(xfs / "store")
        taken = take_all(store, guest)
        assert {image.digest for disk in taken for image in disk.images} == {""}
        published = store.publish(KEY, taken, FACTS, CONTROL)
        assert "shared" in run("filefrag", "-v", f"{published.location}/vdc.raw")
        assert published.digests["vdc"] == sha256sum(Path(guest.vdc.chain[0].path))
        run("qemu-img", "compare", guest.vda.chain[0].path, f"{published.location}/vda.qcow2")

    def test_a_full_store_is_named_with_its_cure(self, guest: GuestImages, small_disk: Path) -> None:
        store = directory_store(small_disk / "store")
        with pytest.raises(PermanentError, match="No space left on device: free space") as error:
            take_all(store, guest)
        assert error.value.reason == "NoSpace"
        store.discard(KEY)


class TestCheck:
    def test_a_good_request_passes_and_leaves_only_folders(self, store: Store, guest: GuestImages, root: Path) -> None:
        store.check(KEY, guest.disks)
        assert [path for path in root.rglob("*") if not path.is_dir()] == []

    def refused(self, store: Store, sources: tuple[DiskSource, ...], reason: str, message: str) -> None:
        with pytest.raises(RefusedError, match=message) as error:
            store.check(KEY, sources)
        assert error.value.reason == reason

    def test_a_backup_that_is_stored_already(self, store: Store, guest: GuestImages) -> None:
        publish(store, guest)
        self.refused(store, guest.disks, "AlreadyStored", "already exists")

    def test_too_little_space(self, guest: GuestImages, small_disk: Path) -> None:
        store = directory_store(small_disk)
        self.refused(store, guest.disks, "NoSpace", r"has \d+ bytes free, and the backup may need \d+: free space")

    def test_clones_need_no_space(self, xfs: Path) -> None:
        guest, store = GuestImages(xfs / "guest"), directory_store(xfs / "store")
        ballast = xfs / "ballast"
        free = os.statvfs(xfs)
        run("fallocate", "-l", str(free.f_bavail * free.f_frsize - 30 * MIB), str(ballast))
        store.check(KEY, guest.disks)

    def test_what_will_be_written_is_known_beforehand_and_nothing_where_all_is_cloned(
        self, store: Store, guest: GuestImages, root: Path, xfs: Path
    ) -> None:
        written = store.check(KEY, guest.disks)["vda"]
        allocated = sum(Path(image.path).stat().st_blocks * 512 for image in guest.vda.chain)
        assert (written.bytes, written.device) == (allocated, root.stat().st_dev)
        there, cloning = GuestImages(xfs / "guest"), directory_store(xfs / "store")
        assert cloning.check(KEY, there.disks)["vda"].bytes == 0

    def test_a_store_that_cannot_be_written(self, guest: GuestImages, xfs: Path) -> None:
        store = directory_store(Path("/proc/vmbackup"))
        self.refused(store, guest.disks, "NotFound", "/proc/vmbackup")

    def test_a_folder_that_is_a_symbolic_link(
        self, store: Store, guest: GuestImages, root: Path, tmp_path: Path
    ) -> None:
        root.mkdir()
        (root / "default").symlink_to(tmp_path)
        self.refused(store, guest.disks, "NotAFolder", "default is a symbolic link or not a folder")

    @pytest.mark.parametrize(
        "key",
        [
            replace(KEY, namespace=".."),
            replace(KEY, namespace="a/b"),
            replace(KEY, namespace=""),
            replace(KEY, name="../x"),
            replace(KEY, name=".hidden"),
            replace(KEY, name="a..b"),
            replace(KEY, name="n" * 240),
            replace(KEY, uid="a.b"),
            replace(KEY, uid="x/../y"),
            replace(KEY, uid=""),
        ],
    )
    def test_names_that_are_not_fit_for_a_path(
        self, key: BackupId, store: Store, guest: GuestImages, root: Path
    ) -> None:
        with pytest.raises(RefusedError) as error:
            store.check(key, guest.disks)
        assert error.value.reason == "BadName"
        assert not root.exists()

    @pytest.mark.parametrize("target", ["../vda", "vda.raw", "backing-1", ""])
    def test_targets_that_are_not_fit_for_a_file_name(self, target: str, store: Store, guest: GuestImages) -> None:
        self.refused(store, (replace(guest.vdc, target=target),), "BadName", "cannot be part of a path")


class TestDelete:
    def test_a_deletion_that_was_cut_off_is_finished(self, store: Store, guest: GuestImages, root: Path) -> None:
        published = publish(store, guest)
        (root / FOLDER).rename(root / "default" / f".{(root / FOLDER).name}.deleted")
        store.delete(published.location, KEY.uid)
        assert content(root / "default") == set()

    @pytest.mark.parametrize(
        "location", ["/etc", "{root}", "{root}/default", "{root}/../x/default/{name}", "{root}/a/b/{name}"]
    )
    def test_nothing_else_is_deleted(self, location: str, store: Store, guest: GuestImages, root: Path) -> None:
        published = publish(store, guest)
        with pytest.raises(RefusedError) as error:
            store.delete(location.format(root=root, name=Path(published.location).name), KEY.uid)
        assert error.value.reason == "NotOurs"
        assert Path(published.location).exists()

    def test_a_folder_whose_manifest_names_another_backup_stays(
        self, store: Store, guest: GuestImages, root: Path
    ) -> None:
        publish(store, guest)
        manifest = root / FOLDER / "manifest.json"
        manifest.write_text(manifest.read_text().replace(KEY.uid, "another"))
        with pytest.raises(RefusedError, match="belongs to the VMBackup with the uid another"):
            store.delete(str(root / FOLDER), KEY.uid)
        assert manifest.exists()

    def test_a_symbolic_link_is_not_followed(
        self, store: Store, guest: GuestImages, root: Path, tmp_path: Path
    ) -> None:
        published = publish(store, guest)
        (root / FOLDER).rename(tmp_path / "elsewhere")
        (root / FOLDER).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(PermanentError, match="symbolic link"):
            store.delete(published.location, KEY.uid)
        assert (tmp_path / "elsewhere" / "vdc.raw").exists()


class TestList:
    def test_a_thousand_backups_take_less_than_a_second(self, store: Store, guest: GuestImages, root: Path) -> None:
        store.publish(KEY, [store.take(KEY, guest.vdc, CONTROL)], FACTS, CONTROL)
        manifest = (root / FOLDER / "manifest.json").read_text()
        for number in range(999):
            folder = root / f"namespace-{number % 10}" / f"web.uid-{number}"
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text(manifest.replace(KEY.uid, f"uid-{number}"))
        started = time.process_time()  # what other processes take of the CPUs does not count
        listed = store.list()
        assert time.process_time() - started < 1
        assert len([entry for entry in listed if isinstance(entry, StoredBackup)]) == 1000

    def test_a_store_that_is_not_there_is_an_error_and_no_empty_list(self, store: Store, root: Path) -> None:
        with pytest.raises(PermanentError, match=re.escape(str(root))) as error:
            store.list()
        assert error.value.reason == "NotFound"

    @pytest.mark.parametrize("spoil", ["no manifest", "another uid", "a FIFO", "a link", "not UTF-8"])
    def test_what_has_the_place_of_a_backup_and_is_none_is_damaged(
        self, spoil: str, store: Store, guest: GuestImages, root: Path
    ) -> None:
        location = publish(store, guest).location
        manifest = root / FOLDER / "manifest.json"
        content = manifest.read_bytes()
        manifest.unlink()
        match spoil:
            case "another uid":
                manifest.write_bytes(content.replace(KEY.uid.encode(), b"another"))
            case "a FIFO":
                os.mkfifo(manifest)
            case "a link":
                (root / "manifest.json").write_bytes(content)
                manifest.symlink_to(root / "manifest.json")
            case "not UTF-8":
                manifest.write_bytes(content.replace(b"web-01", b"\xff\xfe", 1)[:-3])
            case _:
                pass
        (entry,) = store.list()
        assert isinstance(entry, DamagedBackup)
        assert entry.location == location
        assert location in entry.problem

    def test_a_namespace_that_is_a_link_is_not_followed(
        self, store: Store, guest: GuestImages, root: Path, tmp_path: Path
    ) -> None:
        publish(store, guest)
        (root / "default").rename(tmp_path / "elsewhere")
        (root / "default").symlink_to(tmp_path / "elsewhere")
        assert store.list() == ()

    @pytest.mark.parametrize("put", [os.mkfifo, lambda path: path.symlink_to("/etc/passwd")], ids=["a FIFO", "a link"])
    def test_what_took_the_place_of_an_image_is_not_read(
        self, put: Callable[[Path], None], store: Store, guest: GuestImages, root: Path, tmp_path: Path
    ) -> None:
        backup = store.open(publish(store, guest).location, KEY.uid)
        (root / FOLDER / "vdc.raw").unlink()
        put(root / FOLDER / "vdc.raw")
        with pytest.raises(PermanentError, match=r"vdc\.raw"):
            store.verify(backup, "vdc.raw", CONTROL)
        with pytest.raises(PermanentError, match=r"vdc\.raw"):
            store.fetch(backup, "vdc.raw", tmp_path / "fetched", CONTROL)


class TestEveryFileIsLookedAt:
    """Fault 1 of 0.1.0: taken files may be gone before they are published."""

    @pytest.mark.fault(1)
    @pytest.mark.parametrize("harm", ["removed", "cut", "a link"])
    def test_nothing_is_published_that_names_a_file_which_is_not_there_as_it_was_taken(
        self, root: Path, store: Store, guest: GuestImages, harm: str
    ) -> None:
        taken = take_all(store, guest)
        (partial,) = root.glob("*/.*.partial")
        for file in {image.file for disk in taken for image in disk.images}:
            path, kept = partial / file, partial.parent / "kept"
            path.rename(kept)
            if harm == "cut":
                path.write_bytes(kept.read_bytes()[:-512])
            elif harm == "a link":
                path.symlink_to(kept)
            with pytest.raises(PermanentError, match=re.escape(file)):
                store.publish(KEY, taken, FACTS, CONTROL)
            assert not store.list()
            kept.replace(path)
        assert store.publish(KEY, taken, FACTS, CONTROL).location

    @pytest.mark.fault(1)
    def test_a_store_that_is_unmounted_between_two_disks_is_no_backup_of_the_second(
        self, root: Path, store: Store, guest: GuestImages
    ) -> None:
        first = store.take(KEY, guest.disks[0], CONTROL)
        root.rename(root.with_name("the file system that was mounted here"))
        root.mkdir()
        taken = (first, *(store.take(KEY, disk, CONTROL) for disk in guest.disks[1:]))
        with pytest.raises(PermanentError, match=re.escape(first.images[0].file)):
            store.publish(KEY, taken, FACTS, CONTROL)
        assert not store.list()

    def test_a_share_maps_our_user_to_another_for_files_and_folders_alike(
        self, store: Store, guest: GuestImages, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        taken = take_all(store, guest)
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        assert store.publish(KEY, taken, FACTS, CONTROL).location
