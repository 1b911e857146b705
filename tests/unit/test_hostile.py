"""Images, folders and documents that somebody has made to harm: they do nothing, and are refused by name."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from tests.support.storage import run, sha256sum
from vmbackup.api.identity import BackupId
from vmbackup.errors import PermanentError, RefusedError
from vmbackup.hypervisor import chain
from vmbackup.imaging import CopyControl, image
from vmbackup.imaging import merge as merging
from vmbackup.imaging.image import images_below, info, qcow_state
from vmbackup.imaging.locks import has_writer, is_locked
from vmbackup.imaging.merge import merge
from vmbackup.imaging.sizes import allocated_bytes, length
from vmbackup.protocol.record import DiskRecord
from vmbackup.protocol.terms import OverlayFile
from vmbackup.reconcile.observe import Observer
from vmbackup.stores.base import DiskSource, GuestFacts, SourceImage
from vmbackup.stores.directory.store import DirectoryStore
from vmbackup.stores.manifest import Manifest

MIB = 1 << 20
KEY = BackupId("tenant", "web", "6f0b1f9e")
FACTS = GuestFacts("web", "11111111-2222", "<domain/>", None, 1_790_000_000.0)
CONTROL = CopyControl()
MALLORY = 12345
SECRET = b"root:$6$secret" * 100


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "shadow"
    path.write_bytes(SECRET)
    return path


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """The folder of the namespace, which is there already."""
    folder = tmp_path / "store" / KEY.namespace
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    return folder


def qcow2(path: Path, backing: Path | None = None, options: str = "") -> Path:
    """A qcow2; its header names `backing`, which nobody has looked at."""
    below = ("-b", str(backing), "-F", "raw", "-u") if backing else ()
    more = ("-o", options) if options else ()
    run("qemu-img", "create", "-q", "-f", "qcow2", *more, *below, str(path), "1M")
    return path


def raw(path: Path, content: bytes = b"data") -> Path:
    path.write_bytes(content.ljust(MIB, b"\0"))
    return path


def disk(*images: Path, target: str = "vda") -> DiskSource:
    return DiskSource(target, tuple(SourceImage(str(each), each.suffix[1:]) for each in images), MIB)


class TestHeaders:
    def test_a_backing_file_that_only_the_header_names_is_refused_before_anything_is_copied(
        self, store: DirectoryStore, tmp_path: Path, secret: Path
    ) -> None:
        with pytest.raises(RefusedError, match="shadow") as refused:
            store.check(KEY, [disk(qcow2(tmp_path / "disk.qcow2", backing=secret))])
        assert refused.value.reason == "ChainMismatch"

    def test_a_backing_file_other_than_that_of_libvirts_chain_is_never_read(
        self, store: DirectoryStore, tmp_path: Path, secret: Path
    ) -> None:
        source = disk(qcow2(tmp_path / "disk.qcow2", backing=secret), raw(tmp_path / "template.raw"))
        store.check(KEY, [source])
        folder = Path(store.publish(KEY, [store.take(KEY, source, CONTROL)], FACTS, CONTROL).location)
        assert info(folder / "vda.qcow2", "qcow2").backing == "backing-1.raw"
        assert (folder / "backing-1.raw").read_bytes().startswith(b"data")
        assert not any(SECRET in file.read_bytes() for file in folder.iterdir())

    def test_a_raw_disk_into_which_its_guest_has_written_a_qcow2_header_stays_raw(
        self, store: DirectoryStore, tmp_path: Path, secret: Path
    ) -> None:
        probing = raw(tmp_path / "disk.raw", qcow2(tmp_path / "evil.qcow2", backing=secret).read_bytes())
        assert info(probing).backing == str(secret)  # what qemu-img takes it for that is not told
        source = disk(probing)
        store.check(KEY, [source])
        folder = Path(store.publish(KEY, [store.take(KEY, source, CONTROL)], FACTS, CONTROL).location)
        manifest = json.loads((folder / "manifest.json").read_text())
        assert (manifest["disks"][0]["format"], manifest["images"]) == ("raw", [])
        assert sha256sum(folder / "vda.raw") == sha256sum(probing)

    @pytest.mark.parametrize("image_format", ["qcow2", None])
    def test_an_external_data_file_is_named_without_qemu_img_which_would_open_it(
        self, image_format: str | None, tmp_path: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = qcow2(tmp_path / "disk.qcow2", options=f"data_file={tmp_path / 'other'}")
        run("qemu-img", "amend", "-q", "-f", "qcow2", "-o", f"data_file={secret}", str(path))
        monkeypatch.setattr(image, "qemu_img", lambda *_, **__: pytest.fail("qemu-img was run"))
        assert info(path, image_format).data_file == str(secret)
        assert info(path, image_format).virtual_bytes == MIB

    @pytest.mark.parametrize(
        ("offset", "content"),
        [
            (16, struct.pack(">I", 0xFFFFFFFF)),  # a name of 4 GiB
            (8, struct.pack(">Q", 1 << 63)),  # beyond every file
            (8, struct.pack(">QI", 4, 8)),  # NUL in the name
        ],
    )
    def test_a_header_that_lies_about_its_backing_file_has_none(
        self, offset: int, content: bytes, tmp_path: Path, secret: Path
    ) -> None:
        path = qcow2(tmp_path / "disk.qcow2", backing=secret)
        os.truncate(path, 1 << 40)
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(content)
        tracemalloc.start()
        assert images_below(path) == []
        assert tracemalloc.get_traced_memory()[1] < MIB
        tracemalloc.stop()

    @pytest.mark.fault(10)
    def test_a_header_that_a_guest_has_written_into_a_raw_template_is_not_followed(self, tmp_path: Path, secret: Path):
        template = raw(tmp_path / "template.raw", qcow2(tmp_path / "evil.qcow2", backing=secret).read_bytes())
        above = tmp_path / "above.qcow2"
        run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", str(template), "-F", "raw", str(above), "1M")
        assert images_below(above) == [str(template)]
        run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", str(template), "-F", "qcow2", str(above))
        assert images_below(above) == [str(template), str(secret)]

    def test_a_header_that_names_a_fifo_a_device_or_itself_keeps_nobody_waiting(self, tmp_path: Path) -> None:
        fifo, itself = tmp_path / "fifo", tmp_path / "itself.qcow2"
        os.mkfifo(fifo)
        assert images_below(qcow2(tmp_path / "a.qcow2", backing=fifo)) == [str(fifo)]
        assert images_below(qcow2(tmp_path / "b.qcow2", backing=Path("/dev/tty"))) == ["/dev/tty"]
        run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", itself.name, "-F", "qcow2", str(qcow2(itself)))
        assert images_below(itself) == [str(itself)]

    @pytest.mark.parametrize(("entries", "offset"), [(0xFFFFFFFF, 1 << 20), (1, 1 << 63)])
    def test_an_overlay_with_a_table_of_any_size_is_not_called_empty(
        self, entries: int, offset: int, tmp_path: Path
    ) -> None:
        path = qcow2(tmp_path / "overlay.qcow2")
        os.truncate(path, 1 << 40)
        with path.open("r+b") as file:
            file.seek(36)
            file.write(struct.pack(">IQ", entries, offset))
        found = qcow_state(path)
        assert found is not None
        assert found.empty is False


@pytest.mark.timeout(20)
class TestWhatTookThePlaceOfAnImage:
    """Who owns a directory of images may replace what we have looked at before."""

    @pytest.fixture(params=["a FIFO", "a link to a device", "a socket", "a link to a FIFO"])
    def planted(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        path = tmp_path / "disk.vmb-6f0b1f9e-vda.qcow2"
        if request.param == "a link to a device":
            path.symlink_to("/dev/zero")
        elif request.param == "a socket":
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(str(path))
        else:
            os.mkfifo(path)
        if request.param == "a link to a FIFO":
            path.rename(tmp_path / "fifo")
            path.symlink_to(tmp_path / "fifo")
        return path

    @pytest.mark.parametrize("look", [qcow_state, is_locked, has_writer, length, allocated_bytes])
    def test_is_not_opened_whatever_is_asked_of_it(self, look: Callable[[Path], object], planted: Path) -> None:
        with pytest.raises(PermanentError, match=str(planted)):
            look(planted)

    def test_counts_as_an_overlay_in_use_that_holds_something_so_nothing_is_deleted(self, planted: Path) -> None:
        seen = Observer(cast(Any, None), cast(Any, None))._overlay(DiskRecord("vda", overlay=str(planted)))
        assert seen == OverlayFile(locked=True, empty=False)

    def test_is_not_merged_into_a_base(self, planted: Path, tmp_path: Path) -> None:
        with pytest.raises(PermanentError, match=str(planted)):
            merge(planted, raw(tmp_path / "base.raw"), "raw", None, CONTROL)

    def test_is_not_copied_into_a_store(self, planted: Path, store: DirectoryStore) -> None:
        with pytest.raises(PermanentError, match=str(planted)):
            store.take(KEY, disk(planted), CONTROL)


def test_an_overlay_swapped_for_a_fifo_after_it_was_merged_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = raw(tmp_path / "base.raw")
    overlay = qcow2(tmp_path / "overlay.qcow2", backing=base)

    def swap(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        overlay.unlink()
        os.mkfifo(overlay)
        return subprocess.CompletedProcess([], 0, "", "")

    monkeypatch.setattr(merging, "qemu_img", swap)
    with pytest.raises(PermanentError, match=str(overlay)):
        merge(overlay, base, "raw", None, CONTROL)


class TestStore:
    def test_a_namespace_that_is_swapped_for_a_link_while_copying_leads_nowhere(
        self, store: DirectoryStore, places: Path, outside: Path, tmp_path: Path
    ) -> None:
        def swap(_done: int, _total: int) -> None:
            if not places.is_symlink():
                places.rename(tmp_path / "aside")
                places.symlink_to(outside)

        store.take(KEY, disk(raw(tmp_path / "disk.raw")), CopyControl(progress=swap))
        assert places.is_symlink()
        assert not any(outside.iterdir())
        assert (tmp_path / "aside" / ".web.6f0b1f9e.partial" / "vda.raw").exists()

    @pytest.mark.parametrize("name", ["", ".web.6f0b1f9e.partial"])
    def test_a_link_that_waits_where_a_folder_will_be_is_refused(
        self, name: str, store: DirectoryStore, places: Path, outside: Path, tmp_path: Path
    ) -> None:
        planted = places / name if name else places
        if not name:
            places.rmdir()
        planted.symlink_to(outside)
        with pytest.raises(PermanentError, match=f"{planted} is a symbolic link"):
            store.take(KEY, disk(raw(tmp_path / "disk.raw")), CONTROL)
        assert not any(outside.iterdir())

    def test_links_that_wait_where_files_will_be_are_not_written_through(
        self, store: DirectoryStore, places: Path, secret: Path, tmp_path: Path
    ) -> None:
        partial = places / ".web.6f0b1f9e.partial"
        partial.mkdir()
        for name in ("vda.raw", "manifest.json", "manifest.json.new", "domain.xml", "README.txt"):
            (partial / name).symlink_to(secret)
        os.link(secret, partial / "vdb.raw")
        source = disk(raw(tmp_path / "disk.raw"))
        store.publish(KEY, [store.take(KEY, source, CONTROL)], FACTS, CONTROL)
        assert secret.read_bytes() == SECRET
        assert {file.name for file in (places / "web.6f0b1f9e").iterdir() if file.is_symlink()} == set()

    def test_notes_that_are_a_link_or_name_other_files_are_refused(
        self, store: DirectoryStore, places: Path, secret: Path
    ) -> None:
        notes = places / ".web.6f0b1f9e.taken.json"
        notes.symlink_to(secret)
        with pytest.raises(PermanentError, match="symbolic link"):
            store.taken(KEY)
        notes.unlink()
        taken = {"file": "../../shadow", "format": "raw", "bytes": 1, "digest": "", "source": "/x"}
        notes.write_text(json.dumps([{"target": "vda", "virtual_bytes": 1, "images": [taken]}]))
        with pytest.raises(PermanentError, match=r"'\.\./\.\./shadow' is no file of this folder"):
            store.taken(KEY)

    def test_a_folder_of_another_user_is_refused(self, store: DirectoryStore, places: Path, tmp_path: Path) -> None:
        os.chown(places, MALLORY, MALLORY)
        with pytest.raises(RefusedError, match=f"{places} belongs to the user {MALLORY}") as refused:
            store.check(KEY, [disk(raw(tmp_path / "disk.raw"))])
        assert refused.value.reason == "FolderNotOurs"

    def test_deleting_reads_no_manifest_through_a_link(
        self, store: DirectoryStore, places: Path, outside: Path, tmp_path: Path
    ) -> None:
        source = disk(raw(tmp_path / "disk.raw"))
        folder = Path(store.publish(KEY, [store.take(KEY, source, CONTROL)], FACTS, CONTROL).location)
        (folder / "manifest.json").rename(outside / "manifest.json")
        (folder / "manifest.json").symlink_to(outside / "manifest.json")
        with pytest.raises(PermanentError, match="symbolic link"):
            store.delete(str(folder), KEY.uid)
        assert (folder / "vda.raw").exists()

    def test_a_disk_whose_path_another_user_leads_to_a_secret_is_not_copied(
        self, store: DirectoryStore, tmp_path: Path, secret: Path
    ) -> None:
        link = tmp_path / "disk.raw"
        link.symlink_to(secret)
        os.chown(link, MALLORY, MALLORY, follow_symlinks=False)
        with pytest.raises(RefusedError, match="symbolic link"):
            store.check(KEY, [disk(link)])
        with pytest.raises(PermanentError, match="symbolic link"):
            store.take(KEY, disk(link), CONTROL)

    @pytest.mark.parametrize(
        "name",
        ["a'b\"c", "-rf", "json:{}", "nbd:unix:x", "*?[a]", "new\nline", "$(id)", "ü→\u202e", "a,b=c,format=raw"],
    )
    def test_an_image_may_be_called_anything(self, name: str, store: DirectoryStore, tmp_path: Path) -> None:
        template = raw(tmp_path / f"{name} template.raw")
        source = disk(qcow2(tmp_path / f"{name}.qcow2", backing=template), template)
        store.check(KEY, [source])
        published = store.publish(KEY, [store.take(KEY, source, CONTROL)], FACTS, CONTROL)
        folder = Path(published.location)
        assert {"vda.qcow2", "backing-1.raw"} < {file.name for file in folder.iterdir()}
        assert (folder / "backing-1.raw").read_bytes() == template.read_bytes()


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"schemaVersion": 1' + "0" * 10_000 + "}",
        '{"schemaVersion": 1e999}',
        '{"schemaVersion": 1, "uid": "' + "\\u0000" + '"}',
        '"' + "x" * 1_000_000,
    ],
    ids=["deep", "a huge number", "infinity", "NUL", "cut off"],
)
def test_a_manifest_that_is_made_to_harm_is_a_bad_manifest(text: str) -> None:
    with pytest.raises(PermanentError, match=r"^store/manifest\.json") as refused:
        Manifest.from_json(text, "store/manifest.json")
    assert refused.value.reason == "BadManifest"
    assert len(str(refused.value)) < 1000


_LAUGHS = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10 if n else "ha"}">' for n in range(20))
_DISK = "<devices><disk><target dev='vda'/><source file='{}'/></disk></devices>"
_READERS: list[Callable[[str], Any]] = [
    chain.disks,
    chain.domain_facts,
    chain.guest_agent,
    lambda xml: chain.disk_xml(xml, "vda"),
    lambda xml: chain.with_images(xml, {"vda": "<disk/>"}),
    chain.on_base,
    lambda xml: chain.on_overlay(xml, "/o.qcow2"),
]


@pytest.mark.parametrize("read", _READERS)
@pytest.mark.parametrize("declared", [_LAUGHS, '<!ENTITY l19 SYSTEM "file:///etc/passwd">'], ids=["laughs", "a file"])
def test_xml_with_entities_is_refused_by_every_reader(read: Callable[[str], Any], declared: str) -> None:
    with pytest.raises((ValueError, PermanentError)) as refused:  # defusedxml's errors are ValueErrors
        read(f"<!DOCTYPE domain [{declared}]><domain>{_DISK.format('&l19;')}</domain>")
    assert "root:" not in str(refused.value)


def test_xml_that_names_a_definition_elsewhere_lets_nobody_fetch_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/domain.dtd"
        xml = f'<!DOCTYPE domain SYSTEM "{url}"><domain>{_DISK.format("/x")}</domain>'
        assert chain.disks(xml)[0].source == "/x"
        assert "/x" in chain.disk_xml(xml, "vda")
        with pytest.raises(BlockingIOError):
            server.accept()
