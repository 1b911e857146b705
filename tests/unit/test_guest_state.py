"""What the states of libvirt mean for a backup."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import libvirt
import pytest

from vmbackup.hypervisor.guest import Guest
from vmbackup.hypervisor.hypervisor import Hypervisor
from vmbackup.protocol.terms import Power


@dataclass
class OneDomain:
    """Stands for a Hypervisor, its connection and its one domain."""

    libvirt_state: int
    libvirt_reason: int
    libvirt_id: int

    def one_connection(self, _doing: str) -> AbstractContextManager[None]:
        return nullcontext()

    def call(self, _doing: str, function: Callable[[Any], Any], *, mutating: bool = False) -> Any:
        return function(self)

    def lookupByUUIDString(self, _uuid: str) -> OneDomain:  # noqa: N802
        return self

    def state(self) -> list[int]:
        return [self.libvirt_state, self.libvirt_reason]

    def ID(self) -> int:  # noqa: N802
        return self.libvirt_id


@pytest.mark.parametrize(
    ("state", "reason", "seen"),
    [
        (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_RUNNING_BOOTED, Power.RUNNING),
        (libvirt.VIR_DOMAIN_BLOCKED, 0, Power.RUNNING),
        (libvirt.VIR_DOMAIN_SHUTDOWN, libvirt.VIR_DOMAIN_SHUTDOWN_USER, Power.RUNNING),
        (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_USER, Power.PAUSED),
        (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_MIGRATION, Power.PAUSED),
        (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR, Power.IO_ERROR),
        (libvirt.VIR_DOMAIN_PMSUSPENDED, 0, Power.PAUSED),
        (libvirt.VIR_DOMAIN_CRASHED, libvirt.VIR_DOMAIN_CRASHED_PANICKED, Power.PAUSED),
    ],
)
def test_a_domain_that_qemu_runs_is(state: int, reason: int, seen: Power) -> None:
    assert guest(OneDomain(state, reason, 7)).state() == (seen, 7)


@pytest.mark.parametrize(
    "domain",
    [
        OneDomain(libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_CRASHED, -1),
        OneDomain(libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED, 7),  # ended after the look-up
        OneDomain(libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_RUNNING_BOOTED, -1),  # started after the look-up
    ],
)
def test_a_domain_that_is_off_has_no_id(domain: OneDomain) -> None:
    assert guest(domain).state() == (Power.OFF, None)


def guest(domain: OneDomain) -> Guest:
    return Guest(cast("Hypervisor", domain), "uuid", "web")
