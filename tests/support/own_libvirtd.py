"""A libvirtd for one test module, in which both fixtures replace those that all modules share:

    libvirtd, hypervisor = own_libvirtd.libvirtd, own_libvirtd.hypervisor

For tests in which a domain may be defined while a snapshot of it is in flight. libvirt 9.0 then writes to memory
that it has freed, and may crash much later, in another test.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sandbox.libvirtd import Libvirtd
from tests.support.fixtures_hypervisor import connected, private_libvirtd
from vmbackup.hypervisor.hypervisor import Hypervisor


@pytest.fixture(scope="module")
def libvirtd() -> Iterator[Libvirtd]:
    with private_libvirtd() as running:
        yield running


@pytest.fixture(scope="module")
def hypervisor(libvirtd: Libvirtd) -> Iterator[Hypervisor]:
    with connected(libvirtd) as hypervisor:
        yield hypervisor
