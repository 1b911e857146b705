"""The settings that the model is explored in: quick ones for each run of the tests, large ones for `make model`."""

from __future__ import annotations

from tests.model.world import Setting

SETTINGS = (
    Setting(disks=1, faults=2, writes=3),
    Setting(disks=1, faults=2, writes=2, orphan=True),
    Setting(disks=2, faults=1, writes=1),
    Setting(disks=1, faults=1, writes=2, quiesce=True),
    Setting(disks=1, faults=1, writes=2, paused=True),
    Setting(disks=1, faults=2, writes=1, live=True),
    Setting(disks=1, faults=2, writes=1, limit=0),
    Setting(disks=1, faults=1, writes=2, config_full=True),
    Setting(disks=1, faults=1, writes=1, config_stuck=True),
    Setting(disks=1, faults=2, writes=1, edits=True),
    Setting(disks=1, faults=2, writes=1, clock=True),
    Setting(disks=1, faults=2, writes=1, migration=True),
    Setting(disks=1, faults=2, writes=1, pauses=True),
    Setting(disks=1, faults=2, writes=1, foreign=True),
    Setting(disks=1, faults=2, writes=1, offline=True),
    Setting(disks=1, faults=1, writes=2, room=True),
    Setting(disks=1, faults=2, writes=1, stall=True),
    Setting(disks=1, faults=2, writes=1, cancel=True),
    Setting(disks=1, faults=2, writes=1, swaps=True),
    Setting(disks=2, faults=1, writes=1, swaps=True),
    Setting(disks=1, faults=2, writes=1, snapshots=True),
    Setting(disks=2, faults=1, writes=1, snapshots=True),
    Setting(disks=1, faults=2, writes=1, snapshots=True, offline=True),
)

LARGE = (
    Setting(disks=2, faults=3, writes=3),
    Setting(disks=2, faults=2, writes=2, orphan=True),
    Setting(disks=2, faults=2, writes=1, quiesce=True),
    Setting(disks=2, faults=2, writes=1, paused=True, pauses=True),
    Setting(disks=2, faults=2, writes=2, live=True),
    Setting(disks=2, faults=2, writes=1, limit=1),
    Setting(disks=2, faults=2, writes=1, config_full=True),
    Setting(disks=2, faults=2, writes=1, config_stuck=True),
    Setting(disks=2, faults=2, writes=1, foreign=True),
    Setting(disks=2, faults=2, writes=1, edits=True),
    Setting(disks=2, faults=2, writes=1, migration=True),
    Setting(disks=2, faults=2, writes=1, clock=True),
    Setting(disks=2, faults=2, writes=1, offline=True, room=True),
    Setting(disks=2, faults=2, writes=1, stall=True),
    Setting(disks=2, faults=2, writes=1, cancel=True),
    Setting(disks=2, faults=2, writes=1, swaps=True),
    Setting(disks=2, faults=2, writes=1, snapshots=True),
    Setting(disks=1, faults=2, writes=1, orphan=True, quiesce=True, offline=True, cancel=True),
    Setting(
        disks=1, faults=3, writes=2, foreign=True, migration=True, pauses=True, clock=True, offline=True, room=True
    ),
    Setting(disks=1, faults=2, writes=2, edits=True),
    Setting(disks=1, faults=3, writes=2, orphan=True, quiesce=True, offline=True, limit=1),
)
