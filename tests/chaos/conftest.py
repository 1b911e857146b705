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
    """Keeps its guests for all scenarios of a module; one that a scenario has left away from home is replaced."""

    def __init__(self, libvirtd: Libvirtd, directory: Path) -> None:
        self._libvirtd = libvirtd
        self._directory = directory
        self._witnesses: list[Witness] = []

    def witnesses(self, count: int, patch: pytest.MonkeyPatch) -> list[Witness]:
        """So many guests at home that write. Their snapshots are watched."""
        self._libvirtd.start()
        for witness in [witness for witness in self._witnesses if not _at_rest(witness)]:
            self._clear(witness)
        while len(self._witnesses) < count:
            guest = make_guest(self._libvirtd, self._directory, f"chaos-{next(_numbers)}", dirty_kib_per_second=128)
            self._witnesses.append(Witness(self._libvirtd, guest))
        for witness in self._witnesses[:count]:
            witness.guest.wait_for_agent()
            witness.guest.wait_for_more(3)
            witness.watch_snapshots(patch)
        return self._witnesses[:count]

    def clear(self, keep: int = 0) -> None:
        """No guest is left, or no more than these, and none of the others' images."""
        for witness in self._witnesses[keep:]:
            self._clear(witness)

    def _clear(self, witness: Witness) -> None:
        with suppress(KeyError):
            self._libvirtd.kill_guest(witness.name)
        with suppress(RuntimeError):
            self._libvirtd.virsh("undefine", witness.name)
        for image in [*witness.overlays(), *map(Path, witness.bases.values())]:
            image.unlink(missing_ok=True)
        self._witnesses.remove(witness)


def _at_rest(witness: Witness) -> bool:
    """Whether it can be used again."""
    if not witness.is_home():
        return False
    if witness.state() == "shut off":
        witness.guest.start()
    return witness.state() == "running"


@pytest.fixture(scope="module")
def stage(libvirtd: Libvirtd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    made = Stage(libvirtd, tmp_path_factory.mktemp("stage"))
    yield made
    libvirtd.start()
    made.clear()


@pytest.fixture
def witness(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> Witness:
    """A Linux guest at home that appends records to a raw and a qcow2 disk, and its witness."""
    stage.clear(keep=1)
    return stage.witnesses(1, monkeypatch)[0]
