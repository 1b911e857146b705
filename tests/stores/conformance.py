"""What every store must do (vmbackup.stores.base.Store), as tests that know nothing of how it keeps its data.

How a new kind of store joins:

1. a folder `operator/vmbackup/stores/<kind>/` with a class that is a `Store`;
2. one line in `operator/vmbackup/stores/registry.py`;
3. one module `tests/stores/test_<kind>.py` with a class that inherits from `StoreConformance` and has a fixture
   `place`, which makes a `StorePlace`: an empty store, and how to damage what is in it.

What only one kind of store promises (paths, a README, what is not copied) is tested in the module of that kind.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import pytest

from tests.support.images import MIB, ODD_BYTES, GuestImages
from tests.support.storage import run, sha256sum
from vmbackup.api.identity import BackupId
from vmbackup.errors import PermanentError, RefusedError
from vmbackup.imaging import Cancelled, CopyControl
from vmbackup.stores.base import DamagedBackup, DiskSource, GuestFacts, Published, SourceImage, Store, StoredBackup

KEY = BackupId("default", "web-01.nightly", "6f0b1f9e-8c1c")
OTHER = replace(KEY, uid="another-uid")
XML = "<domain><password>x</password></domain>"
FACTS = GuestFacts("web-01", "11111111-2222", XML, None, 1_790_000_000.0)
CONTROL = CopyControl()


class StorePlace(Protocol):
    """One empty store, and what the suite must be able to do to it that is no part of the contract."""

    folder: Path  # an empty folder where a guest of this store may have its images

    def open(self) -> Store:
        """The store, as a process that has just started opens it."""
        ...

    def damage_image(self, backup: StoredBackup, file: str) -> None:
        """Change what is stored of an image, but not how long it is."""
        ...

    def damage_manifest(self, location: str) -> None:
        """Make the manifest of a published backup unreadable."""
        ...

    def add_foreign(self) -> None:
        """Put something into the store that is no backup."""
        ...


def take_all(store: Store, guest: GuestImages, key: BackupId = KEY) -> None:
    for disk in guest.disks:
        store.take(key, disk, CONTROL)


def publish(store: Store, guest: GuestImages, facts: GuestFacts = FACTS, key: BackupId = KEY) -> StoredBackup:
    """The backup of all disks, published and opened."""
    take_all(store, guest, key)
    published = store.publish(key, store.taken(key), facts, CONTROL)
    return store.open(published.location, key.uid)


def publish_one(store: Store, disk: DiskSource, key: BackupId) -> Published:
    return store.publish(key, [store.take(key, disk, CONTROL)], FACTS, CONTROL)


def fetch_all(store: Store, backup: StoredBackup, folder: Path) -> None:
    folder.mkdir()
    for image in (*backup.manifest.disks, *backup.manifest.images):
        store.fetch(backup, image.file, folder / image.file, CONTROL)


def cancelled() -> CopyControl:
    event = threading.Event()
    event.set()
    return CopyControl(cancelled=event)


class StoreConformance:
    """Inherit from it, with a fixture `place`."""

    @pytest.fixture
    def guest(self, place: StorePlace) -> GuestImages:
        return GuestImages(place.folder / "guest")

    @pytest.fixture
    def store(self, place: StorePlace) -> Store:
        return place.open()

    # Taking and publishing

    def test_a_backup_is_restored_from_the_store_alone(self, store: Store, guest: GuestImages, tmp_path: Path) -> None:
        expected = guest.contents(tmp_path / "expected")
        backup = publish(store, guest)
        shutil.rmtree(guest.folder)
        fetch_all(store, backup, tmp_path / "restored")
        for disk in backup.manifest.disks:
            restored = str(tmp_path / "restored" / disk.file)
            run("qemu-img", "compare", "-f", disk.format, "-F", "raw", restored, str(expected[disk.target]))

    def test_the_manifest_tells_what_was_backed_up(self, store: Store, guest: GuestImages) -> None:
        manifest = publish(store, guest).manifest
        assert (manifest.namespace, manifest.name, manifest.uid) == (KEY.namespace, KEY.name, KEY.uid)
        assert (manifest.domain, manifest.domain_uuid) == (FACTS.domain, FACTS.domain_uuid)
        assert manifest.snapshot_time == datetime.fromtimestamp(FACTS.snapshot_time, UTC)
        sizes = {disk.target: disk.virtual_bytes for disk in manifest.disks}
        assert sizes == {"vda": 64 * MIB, "vdb": 64 * MIB, "vdc": ODD_BYTES}

    def test_the_manifest_agrees_with_the_images(self, store: Store, guest: GuestImages, tmp_path: Path) -> None:
        backup = publish(store, guest)
        fetch_all(store, backup, tmp_path / "restored")
        for image in (*backup.manifest.disks, *backup.manifest.images):
            fetched = tmp_path / "restored" / image.file
            assert (image.bytes, image.digest) == (fetched.stat().st_size, sha256sum(fetched))

    def test_each_image_names_its_backing_image_and_a_template_of_two_disks_is_stored_once(
        self, store: Store, guest: GuestImages
    ) -> None:
        manifest = publish(store, guest).manifest
        below = {image.file: image.backing for image in (*manifest.disks, *manifest.images)}
        files = {disk.target: disk.file for disk in manifest.disks}
        template = below[files["vdb"]]
        assert template is not None
        assert below[files["vdc"]] is None
        assert below[below[files["vda"]] or ""] == template
        assert len(manifest.images) == 2

    def test_the_digests_of_the_disks_are_told_on_publishing(self, store: Store, guest: GuestImages) -> None:
        take_all(store, guest)
        published = store.publish(KEY, store.taken(KEY), FACTS, CONTROL)
        manifest = store.open(published.location, KEY.uid).manifest
        assert published.digests == {disk.target: disk.digest for disk in manifest.disks}

    def test_domain_xml_and_uefi_variables_are_read_back(self, store: Store, guest: GuestImages) -> None:
        nvram = guest.folder / "web-01_VARS.fd"
        nvram.write_bytes(b"variables")
        backup = publish(store, guest, replace(FACTS, nvram=nvram))
        assert backup.manifest.domain_xml is not None
        assert backup.manifest.nvram is not None
        assert store.read(backup, backup.manifest.domain_xml).decode() == XML
        assert store.read(backup, backup.manifest.nvram) == b"variables"

    def test_what_is_only_taken_is_not_published(self, store: Store, guest: GuestImages) -> None:
        take_all(store, guest)
        assert store.published(KEY) == ""
        assert not store.list()

    def test_publishing_again_returns_the_same(self, place: StorePlace, store: Store, guest: GuestImages) -> None:
        take_all(store, guest)
        first = store.publish(KEY, store.taken(KEY), FACTS, CONTROL)
        restarted = place.open()
        assert restarted.published(KEY) == first.location
        assert restarted.taken(KEY) == ()
        assert restarted.publish(KEY, (), FACTS, CONTROL) == first

    def test_what_was_taken_is_known_after_a_restart(self, place: StorePlace, store: Store, guest: GuestImages) -> None:
        taken = tuple(store.take(KEY, disk, CONTROL) for disk in guest.disks)
        restarted = place.open()
        assert restarted.taken(KEY) == taken
        assert restarted.publish(KEY, restarted.taken(KEY), FACTS, CONTROL).digests.keys() == {"vda", "vdb", "vdc"}

    def test_nothing_is_published_of_what_was_not_taken(self, store: Store, guest: GuestImages) -> None:
        taken = [store.take(KEY, guest.vdc, CONTROL)]
        store.discard(KEY)
        with pytest.raises(PermanentError):
            store.publish(KEY, taken, FACTS, CONTROL)
        assert not store.list()

    def test_a_cancelled_publish_can_be_repeated(self, store: Store, guest: GuestImages) -> None:
        take_all(store, guest)
        with pytest.raises(Cancelled):
            store.publish(KEY, store.taken(KEY), FACTS, cancelled())
        assert not store.list()
        assert store.publish(KEY, store.taken(KEY), FACTS, CONTROL).digests.keys() == {"vda", "vdb", "vdc"}

    def test_a_cancelled_take_is_not_taken_and_can_be_repeated(self, store: Store, guest: GuestImages) -> None:
        store.take(KEY, guest.vdb, CONTROL)
        with pytest.raises(Cancelled):
            store.take(KEY, guest.vda, cancelled())
        assert {disk.target for disk in store.taken(KEY)} == {"vdb"}
        store.take(KEY, guest.vda, CONTROL)
        assert {disk.target for disk in store.taken(KEY)} == {"vda", "vdb"}

    def test_a_disk_taken_again_starts_over_and_the_others_stay(
        self, store: Store, guest: GuestImages, tmp_path: Path
    ) -> None:
        take_all(store, guest)
        run("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 1M", guest.vda.chain[0].path)
        again = store.take(KEY, guest.vda, CONTROL)
        assert {disk.target for disk in store.taken(KEY)} == {"vda", "vdb", "vdc"}
        published = store.publish(KEY, store.taken(KEY), FACTS, CONTROL)
        fetch_all(store, store.open(published.location, KEY.uid), tmp_path / "restored")
        run("qemu-img", "compare", guest.vda.chain[0].path, f"{tmp_path}/restored/{again.images[0].file}")

    def test_discarding_leaves_nothing_and_may_be_repeated(self, store: Store, guest: GuestImages) -> None:
        store.discard(KEY)
        take_all(store, guest)
        store.discard(KEY)
        store.discard(KEY)
        assert store.taken(KEY) == ()
        assert publish_one(store, guest.vdc, KEY).digests.keys() == {"vdc"}

    def test_different_backups_are_made_at_the_same_time(self, store: Store, guest: GuestImages) -> None:
        keys = [replace(KEY, uid=f"uid-{number}") for number in range(4)]
        with ThreadPoolExecutor(len(keys)) as threads:
            made = list(threads.map(lambda key: publish_one(store, guest.vdc, key), keys))
        assert {entry.location for entry in store.list()} == {each.location for each in made}
        assert len({each.location for each in made}) == len(keys)

    # Checking beforehand

    def refused(self, store: Store, sources: Sequence[DiskSource], reason: str, message: str | None = None) -> None:
        with pytest.raises(RefusedError, match=message) as error:
            store.check(KEY, sources)
        assert error.value.reason == reason

    def test_a_good_request_is_told_what_it_will_write_and_leaves_nothing(
        self, store: Store, guest: GuestImages
    ) -> None:
        written = store.check(KEY, guest.disks)
        assert written.keys() == {"vda", "vdb", "vdc"}
        assert all(each.bytes >= 0 for each in written.values())
        assert (store.taken(KEY), store.published(KEY), list(store.list())) == ((), "", [])

    def test_what_is_stored_already_is_refused(self, store: Store, guest: GuestImages) -> None:
        publish_one(store, guest.vdc, KEY)
        self.refused(store, guest.disks, "AlreadyStored")
        store.check(OTHER, guest.disks)

    def test_a_missing_image_is_refused(self, store: Store, guest: GuestImages) -> None:
        Path(guest.vdc.chain[0].path).unlink()
        self.refused(store, [guest.vdc], "NotFound", r"vdc\.raw: No such file")

    def test_a_chain_that_libvirt_knows_in_part_is_refused(self, store: Store, guest: GuestImages) -> None:
        cut = replace(guest.vda, chain=guest.vda.chain[:1])
        self.refused(store, [cut], "ChainMismatch", r"has the backing file .*middle\.qcow2")
        odd = replace(guest.vdc, chain=guest.vdc.chain + guest.vdb.chain[-1:])
        self.refused(store, [odd], "ChainMismatch", "has the backing file none")

    def test_an_image_with_its_data_in_another_file_is_refused(self, store: Store, guest: GuestImages) -> None:
        path = guest.folder / "disk.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={guest.folder}/data.raw", str(path), "1M")
        disk = DiskSource("vda", (SourceImage(str(path), "qcow2"),), MIB)
        self.refused(store, [disk], "ExternalDataFile", r"data\.raw.*convert it")

    # Listing, opening and reading

    def test_an_empty_store_lists_nothing(self, store: Store) -> None:
        assert not store.list()

    def test_all_published_backups_are_listed_as_they_are_opened(self, store: Store, guest: GuestImages) -> None:
        made = [publish_one(store, guest.vdc, key) for key in (KEY, OTHER, replace(KEY, namespace="tenant"))]
        listed = {entry.location: entry for entry in store.list()}
        assert listed.keys() == {each.location for each in made}
        for entry in listed.values():
            assert isinstance(entry, StoredBackup)
            assert store.open(entry.location, entry.manifest.uid) == entry

    def test_a_damaged_manifest_is_listed_as_such_and_hides_no_other_backup(
        self, place: StorePlace, store: Store, guest: GuestImages
    ) -> None:
        damaged, good = publish_one(store, guest.vdc, KEY), publish_one(store, guest.vdc, OTHER)
        place.damage_manifest(damaged.location)
        listed = {entry.location: entry for entry in store.list()}
        assert listed[good.location] == store.open(good.location, OTHER.uid)
        found = listed[damaged.location]
        assert isinstance(found, DamagedBackup)
        assert found.problem
        with pytest.raises(PermanentError) as error:
            store.open(damaged.location, KEY.uid)
        assert error.value.reason == "BadManifest"

    def test_what_is_no_backup_is_left_out(self, place: StorePlace, store: Store, guest: GuestImages) -> None:
        made = publish_one(store, guest.vdc, KEY)
        place.add_foreign()
        assert [entry.location for entry in store.list()] == [made.location]

    def test_a_backup_that_is_gone_is_not_found(self, store: Store, guest: GuestImages) -> None:
        backup = store.open(publish_one(store, guest.vdc, KEY).location, KEY.uid)
        store.delete(backup.location, KEY.uid)
        with pytest.raises(PermanentError) as error:
            store.open(backup.location, KEY.uid)
        assert error.value.reason == "NotFound"
        with pytest.raises(PermanentError) as error:
            store.verify(backup, backup.manifest.disks[0].file, CONTROL)
        assert error.value.reason == "NotFound"

    @pytest.mark.parametrize("change", [("", OTHER.uid), ("elsewhere/", KEY.uid), ("", "")])
    def test_a_backup_of_another_uid_or_location_is_not_opened(
        self, change: tuple[str, str], store: Store, guest: GuestImages
    ) -> None:
        made = publish_one(store, guest.vdc, KEY)
        with pytest.raises(RefusedError) as error:
            store.open(change[0] + made.location, change[1])
        assert error.value.reason == "NotOurs"

    @pytest.mark.parametrize("file", ["../../etc/passwd", "/etc/passwd", "manifest.json", "", "gone"])
    def test_only_files_of_the_manifest_are_read(
        self, file: str, store: Store, guest: GuestImages, tmp_path: Path
    ) -> None:
        backup = store.open(publish_one(store, guest.vdc, KEY).location, KEY.uid)
        for call in (
            lambda: store.read(backup, file),
            lambda: store.verify(backup, file, CONTROL),
            lambda: store.fetch(backup, file, tmp_path / "fetched", CONTROL),
        ):
            with pytest.raises(PermanentError) as error:
                call()
            assert error.value.reason == "NotFound"
        assert not (tmp_path / "fetched").exists()

    def test_every_image_is_verified_and_one_other_byte_is_found(
        self, place: StorePlace, store: Store, guest: GuestImages, tmp_path: Path
    ) -> None:
        backup = publish(store, guest)
        files = [image.file for image in (*backup.manifest.disks, *backup.manifest.images)]
        for file in files:
            store.verify(backup, file, CONTROL)
        place.damage_image(backup, files[-1])
        for call in (
            lambda: store.verify(backup, files[-1], CONTROL),
            lambda: store.fetch(backup, files[-1], tmp_path / "fetched", CONTROL),
        ):
            with pytest.raises(PermanentError) as error:
                call()
            assert error.value.reason == "DigestMismatch"
        for file in files[:-1]:
            store.verify(backup, file, CONTROL)

    def test_what_is_fetched_is_sparse_and_for_the_administrator_alone(
        self, store: Store, guest: GuestImages, tmp_path: Path
    ) -> None:
        backup = store.open(publish_one(store, guest.vdc, KEY).location, KEY.uid)
        seen: list[tuple[int, int]] = []
        control = CopyControl(progress=lambda done, total: seen.append((done, total)))
        store.fetch(backup, backup.manifest.disks[0].file, tmp_path / "vdc", control)
        found = (tmp_path / "vdc").stat()
        assert (found.st_size, found.st_mode & 0o777) == (ODD_BYTES, 0o600)
        assert found.st_blocks * 512 <= 3 * MIB
        assert seen == sorted(seen)
        assert seen[-1] == (ODD_BYTES, ODD_BYTES)

    def test_fetching_replaces_no_file_and_ends_when_told_to(
        self, store: Store, guest: GuestImages, tmp_path: Path
    ) -> None:
        backup = store.open(publish_one(store, guest.vdc, KEY).location, KEY.uid)
        file = backup.manifest.disks[0].file
        (tmp_path / "there").write_bytes(b"kept")
        with pytest.raises(PermanentError):
            store.fetch(backup, file, tmp_path / "there", CONTROL)
        assert (tmp_path / "there").read_bytes() == b"kept"
        with pytest.raises(Cancelled):
            store.fetch(backup, file, tmp_path / "fetched", cancelled())
        with pytest.raises(Cancelled):
            store.verify(backup, file, cancelled())

    # Deleting

    def test_a_published_backup_is_deleted_and_only_that(self, store: Store, guest: GuestImages) -> None:
        made, kept = publish_one(store, guest.vdc, KEY), publish_one(store, guest.vdc, OTHER)
        store.delete(made.location, KEY.uid)
        store.delete(made.location, KEY.uid)
        assert [entry.location for entry in store.list()] == [kept.location]
        assert store.published(KEY) == ""

    @pytest.mark.parametrize("change", [("", OTHER.uid), ("elsewhere/", KEY.uid), ("", "")])
    def test_a_backup_of_another_uid_or_location_is_not_deleted(
        self, change: tuple[str, str], store: Store, guest: GuestImages
    ) -> None:
        made = publish_one(store, guest.vdc, KEY)
        with pytest.raises(RefusedError) as error:
            store.delete(change[0] + made.location, change[1])
        assert error.value.reason == "NotOurs"
        assert store.published(KEY) == made.location

    def test_what_was_taken_since_is_not_deleted_with_it(self, store: Store, guest: GuestImages) -> None:
        made = publish_one(store, guest.vdc, KEY)
        store.take(OTHER, guest.vdc, CONTROL)
        store.delete(made.location, KEY.uid)
        assert [disk.target for disk in store.taken(OTHER)] == ["vdc"]
