"""One writer for each domain."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from vmbackup.errors import PermanentError
from vmbackup.reconcile.state.domain_lock import domain_lock


def never() -> bool:
    return False


def test_the_second_waits_for_the_first(tmp_path: Path) -> None:
    with domain_lock("a", never, tmp_path) as first, domain_lock("a", never, tmp_path) as second:
        assert (first, second) == (True, False)


def test_domains_do_not_wait_for_each_other(tmp_path: Path) -> None:
    with domain_lock("a", never, tmp_path) as first, domain_lock("b", never, tmp_path) as second:
        assert first
        assert second


def test_it_can_be_had_again_and_leaves_no_file(tmp_path: Path) -> None:
    for _ in range(2):
        with domain_lock("a", never, tmp_path) as held:
            assert held
    assert not list(tmp_path.iterdir())


def test_one_that_was_not_acquired_does_not_touch_the_file_of_the_other(tmp_path: Path) -> None:
    with domain_lock("a", never, tmp_path):
        with domain_lock("a", never, tmp_path):
            pass
        with domain_lock("a", never, tmp_path) as still:
            assert not still


def test_of_many_processes_one_has_it_at_a_time(tmp_path: Path) -> None:
    """Each creates a file that must not be there yet, while it has the lock."""
    workers = [multiprocessing.Process(target=take_turns, args=(tmp_path,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4


def take_turns(directory: Path) -> None:
    for _ in range(50):
        with domain_lock("a", lambda: True, directory / "locks"):
            os.close(os.open(directory / "inside", os.O_CREAT | os.O_EXCL))
            (directory / "inside").unlink()


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PermanentError, match="file"), domain_lock("a", never, tmp_path / "file" / "locks"):
        pass
