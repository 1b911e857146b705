"""A copy in the background, when its store hangs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmbackup.imaging import CopyControl
from vmbackup.imaging.copy import opened_image
from vmbackup.imaging.locks import is_locked
from vmbackup.reconcile import transfer
from vmbackup.reconcile.transfer import Transfer


@pytest.fixture
def dead_store() -> Iterator[threading.Event]:
    """A store whose calls return once this is set."""
    answers = threading.Event()
    yield answers
    answers.set()


def test_a_cancelled_copy_that_hangs_in_its_store_lets_go_of_the_base(
    tmp_path: Path, dead_store: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_PATIENCE", 0.1)
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(4096))
    hangs = threading.Event()

    def copy(control: CopyControl) -> None:
        with opened_image(base) as fd, control.reading(fd):
            hangs.set()
            dead_store.wait()

    running = Transfer(copy, CopyControl(), lambda: None, "copy")
    assert hangs.wait(10)
    assert is_locked(base)
    running.cancel()
    assert not is_locked(base), "no commit could ever write the base"
