from __future__ import annotations

import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.storage import run, sha256sum
from vmbackup.api.identity import BackupId
from vmbackup.api.store import StoreSpec
from vmbackup.errors import PermanentError, RefusedError
from vmbackup.imaging import Cancelled, CopyControl
from vmbackup.imaging.image import info
from vmbackup.stores.base import DiskSource, GuestFacts, Published, SourceImage, Store, TakenDisk
from vmbackup.stores.registry import open_store

pytest_plugins = ("tests.support.fixtures_storage",)

MIB = 1 << 20
KEY = BackupId("default", "web-01.nightly", "6f0b1f9e-8c1c")
FOLDER = "default/web-01.nightly.6f0b1f9e-8c1c"
FACTS = GuestFacts("web-01", "11111111-2222", "<domain><password>x</password></domain>", None, 1_790_000_000.0)
CONTROL = CopyControl()


class Guest:
    """Images of a guest in a folder: vda on a chain of three, vdb on the same template, vdc raw."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        template = self._image("template.raw", "raw", "64M", write=b"1 0 4M")
        middle = self._image("middle.qcow2", "qcow2", backing=template, write=b"2 2M 4M")
        self.vda = self._disk(
            "vda", self._image("vda.qcow2", "qcow2", backing=middle, write=b"3 5M 4M"), middle, template
        )
        self.vdb = self._disk("vdb", self._image("vdb.qcow2", "qcow2", backing=template, write=b"4 0 1M"), template)
        self.vdc = self._disk("vdc", self._image("vdc.raw", "raw", "20000256", write=b"5 1M 2M"))
        self.disks = (self.vda, self.vdb, self.vdc)

    def _image(
        self, name: str, image_format: str, size: str = "", backing: SourceImage | None = None, write: bytes = b""
    ) -> SourceImage:
        path = str(self.folder / name)
        below = ("-b", backing.path, "-F", backing.format) if backing else ()
        run("qemu-img", "create", "-q", "-f", image_format, *below, path, *([size] if size else []))
        run("qemu-io", "-f", image_format, "-c", f"write -P {write.decode()}", path)
        return SourceImage(path, image_format)

    def _disk(self, target: str, *chain: SourceImage) -> DiskSource:
        return DiskSource(target, chain, info(Path(chain[0].path), chain[0].format).virtual_bytes)


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    return Guest(tmp_path / "guest")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> Store:
    return open_store(StoreSpec.parse({"directory": {"path": str(root)}}))


def take_all(store: Store, guest: Guest) -> tuple[TakenDisk, ...]:
    return tuple(store.take(KEY, disk, CONTROL) for disk in guest.disks)


def publish(store: Store, guest: Guest, facts: GuestFacts = FACTS) -> Published:
    return store.publish(KEY, take_all(store, guest), facts, CONTROL)


def content(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class TestPublished:
    def test_the_folder_holds_the_disks_each_backing_image_once_and_what_explains_them(
        self, store: Store, guest: Guest, root: Path
    ) -> None:
        assert publish(store, guest).location == str(root / FOLDER)
        assert content(root / FOLDER) == {
            "vda.qcow2", "vdb.qcow2", "vdc.raw", "backing-1.raw", "backing-2.qcow2",
            "manifest.json", "domain.xml", "README.txt",
        }  # fmt: skip
        assert content(root / "default") == {(root / FOLDER).name}

    def test_the_manifest_agrees_with_the_files(self, store: Store, guest: Guest, root: Path) -> None:
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
        self, store: Store, guest: Guest, root: Path, tmp_path: Path
    ) -> None:
        expected = tmp_path / "expected"
        expected.mkdir()
        for disk in guest.disks:
            run(
                "qemu-img",
                "convert",
                "-f",
                disk.chain[0].format,
                "-O",
                "raw",
                disk.chain[0].path,
                f"{expected}/{disk.target}",
            )
        publish(store, guest)
        shutil.rmtree(guest.folder)
        run("cp", "-r", "--sparse=always", str(root / FOLDER), str(tmp_path / "restored"))
        for disk in guest.disks:
            restored = tmp_path / "restored" / f"{disk.target}.{disk.chain[0].format}"
            run("qemu-img", "compare", "-F", "raw", str(restored), str(expected / disk.target))
            assert info(restored).virtual_bytes == disk.virtual_bytes
            if disk.chain[0].format == "qcow2":
                run("qemu-img", "check", "-q", str(restored))

    def test_it_is_for_the_administrator_alone(self, store: Store, guest: Guest, root: Path) -> None:
        publish(store, guest)
        for path in (root, root / "default", root / FOLDER):
            assert path.stat().st_mode & 0o777 == 0o700
        for path in (root / FOLDER).iterdir():
            assert path.stat().st_mode & 0o777 == 0o600
        assert (root / FOLDER / "domain.xml").read_text() == FACTS.domain_xml

    def test_the_uefi_variables_come_along(self, store: Store, guest: Guest, root: Path) -> None:
        nvram = guest.folder / "web-01_VARS.fd"
        nvram.write_bytes(b"variables")
        publish(store, guest, replace(FACTS, nvram=nvram))
        assert (root / FOLDER / "nvram.fd").read_bytes() == b"variables"
        assert json.loads((root / FOLDER / "manifest.json").read_text())["nvram"] == "nvram.fd"

    def test_publishing_again_returns_the_same(self, store: Store, guest: Guest) -> None:
        taken = take_all(store, guest)
        first = store.publish(KEY, taken, FACTS, CONTROL)
        assert store.published(KEY) == first.location
        assert store.taken(KEY) == ()
        assert store.publish(KEY, (), FACTS, CONTROL) == first

    def test_what_is_only_taken_is_not_published(self, store: Store, guest: Guest) -> None:
        take_all(store, guest)
        assert store.published(KEY) == ""

    def test_a_crash_after_the_rename_is_made_good_by_publishing_again(
        self, store: Store, guest: Guest, root: Path
    ) -> None:
        taken = take_all(store, guest)
        notes = next(path for path in (root / "default").iterdir() if path.suffix == ".json")
        kept = notes.read_bytes()
        first = store.publish(KEY, taken, FACTS, CONTROL)
        notes.write_bytes(kept)
        assert store.publish(KEY, store.taken(KEY), FACTS, CONTROL) == first
        assert not notes.exists()

    def test_nothing_is_published_of_what_was_not_taken(self, store: Store, guest: Guest, root: Path) -> None:
        taken = take_all(store, guest)
        store.discard(KEY)
        with pytest.raises(PermanentError, match="No such file"):
            store.publish(KEY, taken, FACTS, CONTROL)
        assert content(root / "default") == set()

    def test_a_cancelled_publish_can_be_repeated(self, store: Store, guest: Guest) -> None:
        taken = take_all(store, guest)
        cancelled = threading.Event()
        cancelled.set()
        with pytest.raises(Cancelled):
            store.publish(KEY, taken, FACTS, CopyControl(cancelled=cancelled))
        assert store.publish(KEY, taken, FACTS, CONTROL).digests.keys() == {"vda", "vdb", "vdc"}


class TestTaken:
    def test_nothing_is_visible_before_it_is_published(self, store: Store, guest: Guest, root: Path) -> None:
        take_all(store, guest)
        assert all(name.startswith(".") for name in content(root / "default"))

    def test_a_restarted_agent_knows_what_was_taken(self, store: Store, guest: Guest, root: Path) -> None:
        taken = take_all(store, guest)
        after_restart = open_store(StoreSpec.parse({"directory": {"path": str(root)}}))
        assert after_restart.taken(KEY) == taken
        after_restart.publish(KEY, after_restart.taken(KEY), FACTS, CONTROL)

    @pytest.mark.parametrize("damage", [b"", b"[{}]", b"[1]", b"{"])
    def test_damaged_notes_are_an_error_with_its_cure(
        self, damage: bytes, store: Store, guest: Guest, root: Path
    ) -> None:
        store.take(KEY, guest.vdc, CONTROL)
        next((root / "default").glob(".*.taken.json")).write_bytes(damage)
        with pytest.raises(PermanentError, match=r"is damaged .*: delete it"):
            store.taken(KEY)

    def test_a_disk_taken_again_starts_over_and_the_others_stay(self, store: Store, guest: Guest) -> None:
        take_all(store, guest)
        run("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 1M", guest.vda.chain[0].path)
        again = store.take(KEY, guest.vda, CONTROL)
        assert {disk.target for disk in store.taken(KEY)} == {"vda", "vdb", "vdc"}
        published = store.publish(KEY, store.taken(KEY), FACTS, CONTROL)
        run("qemu-img", "compare", guest.vda.chain[0].path, f"{published.location}/{again.images[0].file}")

    def test_a_copy_that_was_cut_off_leaves_nothing_behind(self, store: Store, guest: Guest, root: Path) -> None:
        store.take(KEY, guest.vdb, CONTROL)
        cancelled = threading.Event()
        with pytest.raises(Cancelled):
            store.take(KEY, guest.vda, CopyControl(cancelled=cancelled, progress=lambda _d, _t: cancelled.set()))
        assert {disk.target for disk in store.taken(KEY)} == {"vdb"}
        store.take(KEY, guest.vda, CONTROL)
        partial = next(path for path in (root / "default").iterdir() if path.is_dir())
        assert content(partial) == {"vdb.qcow2", "backing-1.raw", "vda.qcow2", "backing-2.qcow2"}

    def test_progress_counts_every_new_image_of_the_chain(self, store: Store, guest: Guest) -> None:
        seen: list[tuple[int, int]] = []
        control = CopyControl(progress=lambda done, total: seen.append((done, total)))
        taken = store.take(KEY, guest.vda, control)
        total = sum(image.bytes for image in taken.images)
        assert seen[-1] == (total, total)
        assert seen == sorted(seen)
        seen.clear()
        taken = store.take(KEY, guest.vdb, control)
        assert seen[-1] == (taken.images[0].bytes, taken.images[0].bytes)

    def test_copies_have_their_digest_and_publish_adds_the_missing(self, store: Store, guest: Guest) -> None:
        assert store.take(KEY, guest.vdc, CONTROL).images[0].digest == sha256sum(Path(guest.vdc.chain[0].path))

    def test_discarding_leaves_nothing_and_may_be_repeated(self, store: Store, guest: Guest, root: Path) -> None:
        take_all(store, guest)
        store.discard(KEY)
        store.discard(KEY)
        assert content(root / "default") == set()
        assert store.taken(KEY) == ()

    def test_on_a_file_system_with_reflinks_taking_copies_nothing(self, xfs: Path) -> None:
        guest, store = Guest(xfs / "guest"), open_store(StoreSpec.parse({"directory": {"path": str(xfs / "store")}}))
        taken = take_all(store, guest)
        assert {image.digest for disk in taken for image in disk.images} == {""}
        published = store.publish(KEY, taken, FACTS, CONTROL)
        assert "shared" in run("filefrag", "-v", f"{published.location}/vdc.raw")
        assert published.digests["vdc"] == sha256sum(Path(guest.vdc.chain[0].path))
        run("qemu-img", "compare", guest.vda.chain[0].path, f"{published.location}/vda.qcow2")

    def test_a_full_store_is_named_with_its_cure(self, guest: Guest, small_disk: Path) -> None:
        store = open_store(StoreSpec.parse({"directory": {"path": str(small_disk / "store")}}))
        with pytest.raises(PermanentError, match="No space left on device: free space") as error:
            take_all(store, guest)
        assert error.value.reason == "NoSpace"
        store.discard(KEY)


class TestCheck:
    def test_a_good_request_passes_and_leaves_only_folders(self, store: Store, guest: Guest, root: Path) -> None:
        store.check(KEY, guest.disks)
        assert [path for path in root.rglob("*") if not path.is_dir()] == []

    def refused(self, store: Store, sources: tuple[DiskSource, ...], reason: str, message: str) -> None:
        with pytest.raises(RefusedError, match=message) as error:
            store.check(KEY, sources)
        assert error.value.reason == reason

    def test_a_backup_that_is_stored_already(self, store: Store, guest: Guest) -> None:
        publish(store, guest)
        self.refused(store, guest.disks, "AlreadyStored", "is there already")

    def test_too_little_space(self, guest: Guest, small_disk: Path) -> None:
        store = open_store(StoreSpec.parse({"directory": {"path": str(small_disk)}}))
        self.refused(store, guest.disks, "NoSpace", r"has \d+ bytes free, and the backup may need \d+: free space")

    def test_clones_need_no_space(self, xfs: Path) -> None:
        guest, store = Guest(xfs / "guest"), open_store(StoreSpec.parse({"directory": {"path": str(xfs / "store")}}))
        ballast = xfs / "ballast"
        free = os.statvfs(xfs)
        run("fallocate", "-l", str(free.f_bavail * free.f_frsize - 30 * MIB), str(ballast))
        store.check(KEY, guest.disks)

    def test_what_will_be_written_is_known_beforehand_and_nothing_where_all_is_cloned(
        self, store: Store, guest: Guest, root: Path, xfs: Path
    ) -> None:
        written = store.check(KEY, guest.disks)["vda"]
        allocated = sum(Path(image.path).stat().st_blocks * 512 for image in guest.vda.chain)
        assert (written.bytes, written.device) == (allocated, root.stat().st_dev)
        there, cloning = Guest(xfs / "guest"), open_store(StoreSpec.parse({"directory": {"path": str(xfs / "store")}}))
        assert cloning.check(KEY, there.disks)["vda"].bytes == 0

    def test_a_store_that_cannot_be_written(self, guest: Guest, xfs: Path) -> None:
        store = open_store(StoreSpec.parse({"directory": {"path": "/proc/vmbackup"}}))
        self.refused(store, guest.disks, "NotFound", "/proc/vmbackup")

    def test_a_folder_that_is_a_symbolic_link(self, store: Store, guest: Guest, root: Path, tmp_path: Path) -> None:
        root.mkdir()
        (root / "default").symlink_to(tmp_path)
        self.refused(store, guest.disks, "NotAFolder", "default is a symbolic link, or no folder")

    def test_a_missing_image(self, store: Store, guest: Guest) -> None:
        Path(guest.vdc.chain[0].path).unlink()
        self.refused(store, (guest.vdc,), "NotFound", r"vdc\.raw: No such file")

    def test_a_chain_that_libvirt_does_not_know_wholly(self, store: Store, guest: Guest) -> None:
        cut = replace(guest.vda, chain=guest.vda.chain[:1])
        self.refused(store, (cut,), "ChainMismatch", r"has the backing file .*middle\.qcow2")

    def test_a_chain_below_a_raw_image(self, store: Store, guest: Guest) -> None:
        odd = replace(guest.vdc, chain=guest.vdc.chain + guest.vdb.chain[-1:])
        self.refused(store, (odd,), "ChainMismatch", "has the backing file none")

    def test_an_external_data_file(self, store: Store, tmp_path: Path) -> None:
        path = tmp_path / "disk.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/data.raw", str(path), "1M")
        disk = DiskSource("vda", (SourceImage(str(path), "qcow2"),), MIB)
        self.refused(store, (disk,), "ExternalDataFile", r"data\.raw.*convert it")

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
    def test_names_that_are_not_fit_for_a_path(self, key: BackupId, store: Store, guest: Guest, root: Path) -> None:
        with pytest.raises(RefusedError) as error:
            store.check(key, guest.disks)
        assert error.value.reason == "BadName"
        assert not root.exists()

    @pytest.mark.parametrize("target", ["../vda", "vda.raw", "backing-1", ""])
    def test_targets_that_are_not_fit_for_a_file_name(self, target: str, store: Store, guest: Guest) -> None:
        self.refused(store, (replace(guest.vdc, target=target),), "BadName", "cannot be part of a path")


class TestDelete:
    def test_a_published_backup_goes_and_only_that(self, store: Store, guest: Guest, root: Path) -> None:
        other = replace(KEY, uid="another-uid")
        kept = store.publish(other, [store.take(other, guest.vdc, CONTROL)], FACTS, CONTROL)
        published = publish(store, guest)
        store.delete(published.location, KEY.uid)
        store.delete(published.location, KEY.uid)
        assert content(root / "default") == {Path(kept.location).name}

    def test_a_deletion_that_was_cut_off_is_finished(self, store: Store, guest: Guest, root: Path) -> None:
        published = publish(store, guest)
        (root / FOLDER).rename(root / "default" / f".{(root / FOLDER).name}.deleted")
        store.delete(published.location, KEY.uid)
        assert content(root / "default") == set()

    @pytest.mark.parametrize(
        "location", ["/etc", "{root}", "{root}/default", "{root}/../x/default/{name}", "{root}/a/b/{name}"]
    )
    def test_nothing_else_is_deleted(self, location: str, store: Store, guest: Guest, root: Path) -> None:
        published = publish(store, guest)
        with pytest.raises(RefusedError) as error:
            store.delete(location.format(root=root, name=Path(published.location).name), KEY.uid)
        assert error.value.reason == "NotOurs"
        assert Path(published.location).exists()

    def test_a_folder_whose_manifest_names_another_backup_stays(self, store: Store, guest: Guest, root: Path) -> None:
        publish(store, guest)
        manifest = root / FOLDER / "manifest.json"
        manifest.write_text(manifest.read_text().replace(KEY.uid, "another"))
        with pytest.raises(RefusedError, match="belongs to the VMBackup with the uid another"):
            store.delete(str(root / FOLDER), KEY.uid)
        assert manifest.exists()

    def test_a_symbolic_link_is_not_followed(self, store: Store, guest: Guest, root: Path, tmp_path: Path) -> None:
        published = publish(store, guest)
        (root / FOLDER).rename(tmp_path / "elsewhere")
        (root / FOLDER).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(PermanentError, match="symbolic link"):
            store.delete(published.location, KEY.uid)
        assert (tmp_path / "elsewhere" / "vdc.raw").exists()
