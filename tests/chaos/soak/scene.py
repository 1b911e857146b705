"""What a fault happens to, and what it may do there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from tests.chaos.soak.driving import Driving
from tests.chaos.soak.guests import Subject
from tests.chaos.soak.host import Host
from vmbackup.protocol.record import Record

Undo = Callable[[], object]
PATIENCE = 3.0
"""Seconds for which a fault waits for its opportunity."""


class NotNowError(Exception):
    """There is nothing that it could happen to at this moment, or nobody who may do it."""


class Scene(Protocol):
    """What a fault happens to."""

    host: Host
    subject: Subject
    driving: Driving

    @property
    def journal(self) -> Path: ...
    def record(self) -> Record | None: ...
    def kill_driver(self, again_after: float) -> None: ...
    def stop_driver(self, again_after: float) -> None: ...
    def start_second_driver(self) -> None: ...
    def cut_power(self, again_after: float) -> None: ...
    def delete_backup(self) -> None: ...
    def expect_off(self, seconds: float, *, within: float = 0.0) -> None: ...
    def found(self, what: str) -> None: ...


def virsh(scene: Scene, *arguments: str) -> str:
    """What virsh prints. Raises NotNowError where it is refused."""
    try:
        return scene.host.virsh(*arguments)
    except RuntimeError as error:
        raise NotNowError(str(error)) from error
