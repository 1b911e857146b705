"""A guest that writes, reused from scenario to scenario, and the proof that it lost nothing (tests/chaos/proof.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest

from sandbox.libvirtd import Libvirtd
from tests.chaos.proof import Witness, make_guest

_numbers = count(1)


class Stage:
    """Keeps one guest for all scenarios of a module; another one where a scenario has left it away from home."""

    def __init__(self, libvirtd: Libvirtd, directory: Path) -> None:
        self._libvirtd = libvirtd
        self._directory = directory
        self._witness: Witness | None = None

    def witness(self) -> Witness:
        """A guest at home that writes."""
        if self._witness is not None and not (self._witness.is_home() and self._running(self._witness)):
            self.clear()
        if self._witness is None:
            guest = make_guest(self._libvirtd, self._directory, f"chaos-{next(_numbers)}", dirty_kib_per_second=128)
            self._witness = Witness(self._libvirtd, guest)
            guest.wait_for_agent()
        self._witness.guest.wait_for_more(3)
        return self._witness

    def _running(self, witness: Witness) -> bool:
        if witness.state() == "shut off":
            witness.guest.start()
            witness.guest.wait_for_agent()
        return witness.state() == "running"

    def clear(self) -> None:
        """The guest is gone, and its images too."""
        if self._witness is None:
            return
        with suppress(KeyError):
            self._libvirtd.kill_guest(self._witness.name)
        with suppress(RuntimeError):
            self._libvirtd.virsh("undefine", self._witness.name)
        for image in [*self._witness.overlays(), *map(Path, self._witness.bases.values())]:
            image.unlink(missing_ok=True)
        self._witness = None


@pytest.fixture(scope="module")
def stage(libvirtd: Libvirtd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    made = Stage(libvirtd, tmp_path_factory.mktemp("stage"))
    yield made
    libvirtd.start()
    made.clear()


@pytest.fixture
def witness(stage: Stage, libvirtd: Libvirtd, monkeypatch: pytest.MonkeyPatch) -> Witness:
    """A Linux guest at home that appends records to a raw and a qcow2 disk, and its witness."""
    libvirtd.start()
    found = stage.witness()
    found.watch_snapshots(monkeypatch)
    return found
