"""A libvirtd that dies inside a call: QEMU has done its part, libvirt has not saved it.

No kill hits these windows of milliseconds, so they are acted while libvirtd is dead: through QEMU's own monitor, or in
the status that libvirtd has saved of a running domain.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from sandbox.libvirtd import Libvirtd
from tests.support.domains import wait_until
from vmbackup.errors import UnknownOutcomeError
from vmbackup.hypervisor.hypervisor import Hypervisor

_SECONDS = 60


class CaughtCall:
    """The next call of this name ("taking the snapshot", "pivoting vda", …) for a domain: the backup is held in it.

    `sent`: after libvirtd has answered; else before it is asked. `send` or `lose` ends that.
    """

    def __init__(self, patch: pytest.MonkeyPatch, domain: str, name: str, *, sent: bool = False) -> None:
        call = Hypervisor.call
        self._caught, self._over = threading.Event(), threading.Event()
        self._lost = False

        def held(hypervisor: Hypervisor, doing: str, function: Callable[..., object], *, mutating: bool = False) -> Any:
            if doing != f"{domain}: {name}" or not mutating or self._caught.is_set():
                return call(hypervisor, doing, function, mutating=mutating)
            answer = call(hypervisor, doing, function, mutating=mutating) if sent else None
            self._caught.set()
            assert self._over.wait(_SECONDS)
            if self._lost:
                raise UnknownOutcomeError(f"{doing}: the answer was lost", reason="ConnectionLost")
            return answer if sent else call(hypervisor, doing, function, mutating=mutating)

        patch.setattr(Hypervisor, "call", held)

    def wait(self) -> None:
        """Wait for the call."""
        assert self._caught.wait(_SECONDS), "there was no such call"

    def send(self) -> None:
        """Let it go to libvirtd, or its answer to the backup."""
        self._over.set()

    def lose(self) -> None:
        """Let the backup see that there will be no answer."""
        self._lost = True
        self._over.set()


def dies_having_switched(libvirtd: Libvirtd, domain: str, overlays: Mapping[str, str]) -> None:
    """In the snapshot: QEMU writes the overlays, every XML names the bases."""
    libvirtd.kill()
    ((*devices,),) = libvirtd.qmp(domain, ("query-block", {}))
    nodes = {_target(device): device["inserted"]["node-name"] for device in devices if "inserted" in device}
    switches = [
        {
            "type": "blockdev-snapshot-sync",
            "data": {
                "node-name": nodes[target],
                "snapshot-file": overlay,
                "format": "qcow2",
                "snapshot-node-name": f"switched-{target}",
            },
        }
        for target, overlay in overlays.items()
    ]
    libvirtd.qmp(domain, ("transaction", {"actions": switches}))
    libvirtd.start()


def dies_having_pivoted(libvirtd: Libvirtd, domain: str, target: str) -> None:
    """In the pivot, the job being dismissed: QEMU writes the base, every XML names the overlay, the mirror is ready."""
    libvirtd.kill()
    job = next(job["id"] for job in _jobs(libvirtd, domain) if target in job["id"].split("-"))
    libvirtd.qmp(domain, ("job-complete", {"id": job}))
    wait_until(lambda: _status(libvirtd, domain, job) == "concluded", "QEMU is on the base")
    libvirtd.qmp(domain, ("job-dismiss", {"id": job}))
    libvirtd.start()


def dies_before_the_mirror(libvirtd: Libvirtd, domain: str, target: str) -> None:
    """In the start of a commit: the job runs, and the XML has no <mirror>. Call it with the job begun."""
    libvirtd.kill()
    status = libvirtd.runtime_dir / f"libvirt/qemu/run/{domain}.xml"  # what it has saved of a running domain
    before = status.read_text()
    disk = re.search(rf"<disk type(?:(?!</disk>).)*<target dev='{target}'.*?</disk>", before, re.DOTALL)
    assert disk is not None
    assert "<mirror" in disk[0]
    status.write_text(before.replace(disk[0], re.sub(r"<mirror.*</mirror>", "", disk[0], flags=re.DOTALL)))
    libvirtd.start()


def dies_with_a_mirror_of_no_kind(libvirtd: Libvirtd, domain: str) -> None:
    """As libvirt 9.0 may save it: what it cannot read when it starts again, and so it forgets a guest that runs."""
    libvirtd.kill()
    status = libvirtd.runtime_dir / f"libvirt/qemu/run/{domain}.xml"
    before = status.read_text()
    assert "job='active-commit'" in before
    status.write_text(before.replace("job='active-commit'", "job=''"))
    libvirtd.start()


def _target(device: Mapping[str, Any]) -> str:
    """vda for the device path of virtio-disk0, and so on."""
    number = re.search(r"virtio-disk(\d+)", str(device["qdev"]))
    assert number is not None
    return f"vd{chr(ord('a') + int(number[1]))}"


def _jobs(libvirtd: Libvirtd, domain: str) -> list[dict[str, Any]]:
    (jobs,) = libvirtd.qmp(domain, ("query-jobs", {}))
    return jobs


def _status(libvirtd: Libvirtd, domain: str, job: str) -> str:
    return next(each["status"] for each in _jobs(libvirtd, domain) if each["id"] == job)
