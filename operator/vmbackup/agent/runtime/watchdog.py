"""Checks for /healthz: the event loop turns, libvirtd answers, the watch notices VMBackups."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from vmbackup.hypervisor.hypervisor import Hypervisor
from vmbackup.telemetry.health import Check

_BEAT = 1.0  # seconds
_LOOP_LIMIT = 30.0  # seconds without a beat
_LIBVIRT_LIMIT = 60.0  # seconds without an answer: libvirtd restarts in less

RESTART_MENDS = ("event loop", "watch")  # of `checks`: a restart of the agent does not bring libvirtd back


class Watchdog:
    """The checks are called by the threads of the health server."""

    def __init__(self, hypervisor: Hypervisor, watch: Callable[[], str]) -> None:
        self._hypervisor = hypervisor
        self._watch = watch
        self._beat = time.monotonic()
        self._libvirt_missed: float | None = None

    @property
    def checks(self) -> Mapping[str, Check]:
        """By name."""
        return {"event loop": self._check_loop, "libvirt": self._check_libvirt, "watch": self._watch}

    async def beat(self) -> None:
        """Record that the event loop turns. Runs until it is cancelled."""
        while True:
            self._beat = time.monotonic()
            await asyncio.sleep(_BEAT)

    def _check_loop(self) -> str:
        silent = time.monotonic() - self._beat
        return f"it has been stuck for {silent:.0f} s" if silent > _LOOP_LIMIT else ""

    def _check_libvirt(self) -> str:
        if self._hypervisor.answering_since is not None:
            self._libvirt_missed = None
            return ""
        missed = self._libvirt_missed = self._libvirt_missed or time.monotonic()
        silent = time.monotonic() - missed
        return f"{self._hypervisor.uri} has not answered for {silent:.0f} s" if silent > _LIBVIRT_LIMIT else ""
