"""What no agent can close (docs/protocol.md): assumption A lifted, one part at a time, breaks just this."""

from __future__ import annotations

from dataclasses import dataclass

from tests.model.world import Setting

STALE, UNLINKED = "I1 boot from a stale image", "I3 unlink of an overlay with data that base lacks"
NO_WAY_HOME, LET_GO = "I4 there is no way home", "I5 finalizer released with the guest suspended or frozen by us"
RESUMED = "GUARD a guest that its user had paused is resumed"


@dataclass(frozen=True)
class Residual:
    """What may happen after all, and what then breaks."""

    what: str
    setting: Setting
    breaks: frozenset[str]
    large: bool = False  # takes minutes: only `make model` shows it


RESIDUALS = (
    Residual(
        "a user resumes the guest in the middle of a switch, and then QEMU or the host dies",
        Setting(faults=2, writes=1, residual="resume"),
        frozenset({STALE, UNLINKED}),
    ),
    Residual(
        "the guest dies in the middle of a switch, is booted before the agent looks again, and dies once more",
        Setting(faults=2, writes=2, residual="reboot"),
        frozenset({STALE, UNLINKED, NO_WAY_HOME}),
    ),
    Residual(
        "the journal is lost while the guest is suspended",
        Setting(faults=2, writes=1, residual="journal"),
        frozenset({NO_WAY_HOME, LET_GO}),
    ),
    Residual(
        "a user pauses the guest between the agent's look and its intent",
        Setting(faults=1, writes=1, pauses=True, residual="window"),
        frozenset({RESUMED}),
    ),
    Residual(
        "a user takes a snapshot of his own while P is being settled, and then QEMU dies",
        Setting(faults=2, writes=1, foreign=True, residual="window"),
        frozenset({STALE, NO_WAY_HOME}),
    ),
    Residual(
        "a user redefines the domain at any moment: harmless",
        Setting(faults=1, writes=1, edits=True, residual="window"),
        frozenset(),
    ),
    Residual(
        "QEMU dies around a pivot, and a user who edits the definition by hand lets it name the overlay",
        Setting(disks=1, faults=3, writes=2, edits=True),
        frozenset({STALE, NO_WAY_HOME}),
        large=True,
    ),
    Residual(
        "a user starts a migration at any moment: harmless",
        Setting(faults=1, writes=1, migration=True, residual="window"),
        frozenset(),
    ),
)
