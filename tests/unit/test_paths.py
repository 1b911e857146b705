"""What other hands have prepared in a folder leads nowhere: links of every kind, `..`, FIFOs, swapped folders."""

from __future__ import annotations

import os
import threading
from itertools import count
from pathlib import Path

import pytest

from vmbackup.paths import held, name_of, open_trusted, read_trusted

MALLORY = 12345  # a user of this machine, who may own a folder that we or QEMU work in


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of root's."""
    path = tmp_path / "secret"
    path.write_text("root alone")
    return path


@pytest.fixture
def hers(tmp_path: Path) -> Path:
    """A folder that Mallory owns."""
    path = tmp_path / "hers"
    path.mkdir()
    os.chown(path, MALLORY, MALLORY)
    return path


def link(path: Path, to: Path | str, owner: int) -> Path:
    path.symlink_to(to)
    os.chown(path, owner, owner, follow_symlinks=False)
    return path


def content(path: Path) -> bytes:
    with os.fdopen(open_trusted(path), "rb") as file:
        return file.read()


class TestImagesAndVariables:
    def test_a_plain_file_opens(self, secret: Path) -> None:
        assert content(secret) == b"root alone"

    @pytest.mark.parametrize("relative", [False, True])
    def test_a_link_that_root_made_is_followed(self, relative: bool, secret: Path, tmp_path: Path) -> None:
        assert content(link(tmp_path / "link", "secret" if relative else secret, 0)) == b"root alone"

    def test_a_link_to_a_file_of_its_own_maker_is_followed(self, hers: Path) -> None:
        (hers / "disk").write_text("hers")
        os.chown(hers / "disk", MALLORY, MALLORY)
        assert content(link(hers / "link", hers / "disk", MALLORY)) == b"hers"

    def test_a_link_that_another_made_to_a_file_of_root_is_not(self, hers: Path, secret: Path) -> None:
        with pytest.raises(OSError, match="Too many levels of symbolic links"):
            open_trusted(link(hers / "disk", secret, MALLORY))

    def test_nor_is_one_in_the_middle_of_the_path(self, hers: Path, secret: Path) -> None:
        with pytest.raises(OSError, match="Too many levels of symbolic links"):
            open_trusted(link(hers / "images", secret.parent, MALLORY) / "secret")

    def test_nor_is_one_behind_a_link_of_root(self, hers: Path, secret: Path, tmp_path: Path) -> None:
        link(hers / "disk", "../secret", MALLORY)
        with pytest.raises(OSError, match="Too many levels of symbolic links"):
            open_trusted(link(tmp_path / "link", hers / "disk", 0))

    def test_links_in_a_circle_end(self, tmp_path: Path) -> None:
        link(tmp_path / "a", "b", 0)
        with pytest.raises(OSError, match="Too many levels of symbolic links"):
            open_trusted(link(tmp_path / "b", "a", 0))

    def test_a_fifo_does_not_keep_us_waiting(self, hers: Path) -> None:
        os.mkfifo(hers / "disk")
        with pytest.raises(OSError, match="Invalid argument"):
            open_trusted(hers / "disk")

    @pytest.mark.parametrize("device", ["/dev/null", "/dev/tty"])
    def test_a_character_device_is_not_opened_at_all(self, device: str) -> None:
        with pytest.raises(OSError, match="Invalid argument"):
            open_trusted(Path(device))

    def test_a_missing_file_is_just_missing_and_nothing_is_left_open(self, tmp_path: Path) -> None:
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(3):
            with pytest.raises(FileNotFoundError):
                open_trusted(tmp_path / "no" / "disk")
        assert len(list(Path("/proc/self/fd").iterdir())) == before

    def test_variables_that_have_another_name_are_not_read(self, hers: Path, secret: Path) -> None:
        os.link(secret, hers / "vars.fd")
        with pytest.raises(OSError, match="Too many links"):
            read_trusted(hers / "vars.fd", 1 << 20)

    def test_variables_of_any_size_do_not_fill_our_memory(self, hers: Path) -> None:
        (hers / "vars.fd").touch()
        os.truncate(hers / "vars.fd", 1 << 40)
        with pytest.raises(OSError, match="File too large"):
            read_trusted(hers / "vars.fd", 1 << 20)


class TestFoldersOfAStore:
    def test_a_folder_is_held_whatever_its_name_leads_to_later(self, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        outside.mkdir()
        with held(tmp_path, "store", "ns", make_mode=0o700) as folder:
            (tmp_path / "store" / "ns").rename(tmp_path / "store" / "old")
            (tmp_path / "store" / "ns").symlink_to(outside)
            (folder / "disk").write_text("data")
            assert name_of(folder / "disk") == str(tmp_path / "store" / "old" / "disk")
        assert (tmp_path / "store" / "old" / "disk").read_text() == "data"
        assert not any(outside.iterdir())

    @pytest.mark.parametrize("make", [None, 0o700])
    def test_a_link_is_no_folder_even_to_one_inside(self, make: int | None, tmp_path: Path) -> None:
        (tmp_path / "b").mkdir()
        (tmp_path / "a").symlink_to("b")
        for names in [("a",), ("a", "deeper")]:
            with pytest.raises(NotADirectoryError), held(tmp_path, *names, make_mode=make):
                pass
        assert not any((tmp_path / "b").iterdir())

    @pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/etc"])
    def test_a_name_is_never_a_path(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="Invalid argument"), held(tmp_path, name, make_mode=0o700):
            pass

    def test_a_folder_that_is_swapped_for_a_link_all_the_time_never_leads_outside(self, tmp_path: Path) -> None:
        outside, root = tmp_path / "outside", tmp_path / "store"
        outside.mkdir()
        (root / "ns").mkdir(parents=True)
        (root / "link").symlink_to(outside)
        over = threading.Event()

        def swap() -> None:
            while not over.is_set():
                (root / "ns").rename(root / "aside")
                (root / "link").rename(root / "ns")
                (root / "ns").rename(root / "link")
                (root / "aside").rename(root / "ns")

        swapping = threading.Thread(target=swap)
        swapping.start()
        outcomes = {True: 0, False: 0}
        try:
            for number in count():
                try:
                    with held(root, "ns") as folder:
                        (folder / f"disk-{number}").touch()
                    outcomes[True] += 1
                except (NotADirectoryError, FileNotFoundError):
                    outcomes[False] += 1
                if min(outcomes.values()) >= 50 or number > 200_000:
                    break
        finally:
            over.set()
            swapping.join()
        assert min(outcomes.values()) >= 50
        assert not any(outside.iterdir())
