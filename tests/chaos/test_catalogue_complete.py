"""Every scenario of the catalogue has a test that is marked with it: `@pytest.mark.scenario(12)` and its like.

The marks are read from the sources, so that this holds whichever tests are selected.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests.support.marks import marked

# What else may happen to a backup.
MISFORTUNES = (
    "the agent is killed at every step",
    "the agent is killed at each kind of step",
    "libvirtd is killed",
    "QEMU is killed",
    "libvirtd dies in a user's snapshot",
    "libvirt forgets a guest that runs",
    "power-off, destroy",
    "reboot, reset",
    "migrated in the commit",
    "migrated on the overlay, and undefined",
    "migrated, and libvirtd has forgotten it",
    "a migration that is aborted",
    "migrated before the snapshot",
    "undefine",
    "the base's file system is full",
    "the configuration's is full",
    "the store is full",
    "the store is read-only",
    "an image is replaced or truncated",
    "an overlay is removed or replaced",
    "two agents",
    "409 Conflict",
    "deleted and made again",
    "the clock jumps",
    "the agent is upgraded",
    "the journal is lost",
    "the guest agent hangs",
)
CATALOGUE: Mapping[str, frozenset[object]] = {
    "scenario": frozenset(range(1, 26)),  # the rows of docs/protocol.md
    "vulnerability": frozenset(f"V{n}" for n in range(1, 14)),  # how the first rules failed, ibid.
    "misfortune": frozenset(MISFORTUNES),
}


@pytest.mark.parametrize("kind", CATALOGUE)
def test_every_entry_of_the_catalogue_has_a_marked_test(kind: str) -> None:
    assert not CATALOGUE[kind] - marked(kind).keys()


@pytest.mark.parametrize("kind", CATALOGUE)
def test_no_test_is_marked_with_an_entry_that_the_catalogue_lacks(kind: str) -> None:
    assert not marked(kind).keys() - CATALOGUE[kind]
