"""What tools that keep a cluster as Git has it see of a VMBackup: no drift, no conflict, and an end they understand."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from sandbox.kube import KubeApi
from tests.support.agents import SECONDS, SLOW, Agent, CatchBackup, VMBackup, assert_home, assert_stored, manifest
from tests.support.domains import Domain, DomainFactory, wait_until
from tests.support.judge import argo_cd

HOOK_FINALIZER = "argocd.argoproj.io/hook-finalizer"
AGENT = ("vmbackup", "kopf")  # the names under which the agent writes status and finalizer
SERVER_SIDE = ("--server-side", "--field-manager=flux")


@dataclass
class Declared:
    """A VMBackup as Git has it, and what a tool does with it over and over."""

    made: VMBackup
    body: dict[str, Any]

    @property
    def kube(self) -> KubeApi:
        return self.made.kube

    def apply(self, *flags: str) -> None:
        self.kube.kubectl("apply", *flags, "-f", "-", stdin=json.dumps(self.body))

    def assert_no_drift(self, *flags: str) -> None:
        """A diff shows nothing, applying it again changes nothing, and nobody else has written to what Git declares."""
        assert self.kube.kubectl("diff", *flags, "-f", "-", stdin=json.dumps(self.body)) == ""
        before = self.made.get()
        self.apply(*flags)
        after = self.made.get()
        assert without_reports(after) == without_reports(before)
        if after["status"] == before["status"]:
            assert after["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]
        assert {path for manager in AGENT for path in owned(self.made, manager)} <= {
            "status",
            "metadata/finalizers/vmbackup.dev/chain-home",
        }


def managed(made: VMBackup) -> list[dict[str, Any]]:
    """Who has written which fields."""
    shown = made.kube.get("vmbackup", made.name, "-n", made.namespace, "--show-managed-fields")
    return shown["metadata"]["managedFields"]


def owned(made: VMBackup, manager: str) -> set[str]:
    """What this field manager has written: status, or the path of a field."""
    written: set[str] = set()
    for entry in managed(made):
        if entry["manager"] == manager:
            fields = entry["fieldsV1"]
            written |= {"status"} if entry.get("subresource") == "status" else set(leaves(fields))
    return written


def leaves(fields: dict[str, Any], path: str = "") -> Iterator[str]:
    """The paths of a FieldsV1: f:… is a field, v:… the value in a set, . the thing itself."""
    for name, below in fields.items():
        if name != ".":
            here = f"{path}/{name.split(':', 1)[1].strip(chr(34))}".strip("/")
            yield from leaves(below, here) if below else [here]


def without_reports(body: dict[str, Any]) -> dict[str, Any]:
    return {**body, "metadata": {**body["metadata"], "resourceVersion": None}, "status": None}


def declare(agent: Agent, guest: Domain, name: str, **spec: Any) -> Declared:
    return Declared(VMBackup(agent.kube, name), manifest(name, agent.node, agent.node, guest.name, **spec))


@pytest.mark.parametrize("flags", [(), SERVER_SIDE], ids=["client-side", "server-side"])
def test_at_no_phase_of_a_backup_is_there_drift(agent: Agent, domain: DomainFactory, flags: tuple[str, ...]) -> None:
    guest = domain(size="64M")
    guest.write("vda", 0x11, length="16M")
    name = f"{guest.name}-declared"
    slow = {"copy.bandwidth": "1Mi", "commit.bandwidth": "1Mi", "ttlSecondsAfterFinished": 3600}
    declared = declare(agent, guest, name, **slow)
    declared.apply(*flags)
    declared.made.wait_for_copying()
    declared.assert_no_drift(*flags)
    guest.write("vda", 0x22, offset="16M", length="32M")
    del declared.body["spec"]["copy"]["bandwidth"]
    declared.apply(*flags)  # an edit of what may be edited arrives, against nobody
    declared.made.wait_for_phase("Committing")
    declared.assert_no_drift(*flags)
    del declared.body["spec"]["commit"]["bandwidth"]
    declared.apply(*flags)
    assert_stored(declared.made.wait())
    wait_until(lambda: declared.made.status["observedGeneration"] == 3, "the edits are noted", SECONDS)
    declared.assert_no_drift(*flags)
    declared.assert_no_drift(*flags)


def test_nobody_but_the_agent_and_its_users_writes_to_a_backup(agent: Agent, domain: DomainFactory) -> None:
    made = agent.apply(domain(size="8M").name)
    assert_stored(made.wait())
    managers = {entry["manager"] for entry in managed(made)}
    assert managers <= {"kubectl-client-side-apply", *AGENT}
    assert owned(made, "vmbackup") == {"status"}


# Hooks of Argo CD: it holds them by a finalizer until their health says how they ended


def hook(agent: Agent, guest: Domain, **spec: Any) -> VMBackup:
    """A backup as Argo CD makes it before a sync."""
    body = manifest(f"{guest.name}-presync", agent.node, agent.node, guest.name, **spec)
    body["metadata"] |= {"annotations": {"argocd.argoproj.io/hook": "PreSync"}, "finalizers": [HOOK_FINALIZER]}
    agent.kube.apply(body)
    return VMBackup(agent.kube, body["metadata"]["name"])


def held_only_by_argo_cd(made: VMBackup) -> bool:
    metadata = made.get()["metadata"]
    return "deletionTimestamp" in metadata and metadata["finalizers"] == [HOOK_FINALIZER]


def health(made: VMBackup) -> str:
    return argo_cd(made.get())[0].status


def test_a_hook_whose_time_to_live_has_passed_still_counts_as_taken(agent: Agent, domain: DomainFactory) -> None:
    made = hook(agent, domain(size="8M"), ttlSecondsAfterFinished=0)
    wait_until(lambda: held_only_by_argo_cd(made), "expired", SECONDS)
    assert health(made) == "Healthy"
    assert_stored(made.status)
    made.strip_finalizers()
    assert not made.exists()


def test_a_hook_that_is_deleted_counts_as_failed_and_its_agent_as_healthy(
    own_agent: Agent, copying: CatchBackup
) -> None:
    own_agent.start(relist_interval="0.5")
    first, guest = copying(own_agent)
    queued = hook(own_agent, guest)
    wait_until(lambda: queued.condition("Ready")[1] == "Queued", "queued", SECONDS)
    assert health(queued) == "Progressing"
    queued.delete("--wait=false")
    wait_until(lambda: held_only_by_argo_cd(queued), "released", SECONDS)
    assert health(queued) == "Degraded"
    queued.strip_finalizers()
    first.patch({"copy": {"bandwidth": None}})
    assert_stored(first.wait())
    running = hook(own_agent, guest, **{"copy.bandwidth": SLOW})
    running.wait_for_copying()
    running.delete("--wait=false")
    wait_until(lambda: held_only_by_argo_cd(running), "released", SECONDS)
    assert_home(guest)
    assert health(running) == "Degraded"
    time.sleep(2)  # for three looks at what is on the API server
    assert own_agent.healthz() == (200, "ok\n")


def test_a_hook_that_was_deleted_before_any_agent_saw_it_counts_as_failed(
    own_agent: Agent, domain: DomainFactory
) -> None:
    made = hook(own_agent, domain(size="8M"))
    made.delete("--wait=false")
    assert health(made) == "Progressing"
    own_agent.start(relist_interval="0.5")
    wait_until(lambda: made.condition("Ready") == ("False", "Deleted"), "it says so", SECONDS)
    assert health(made) == "Degraded"
    assert own_agent.healthz() == (200, "ok\n")


def test_a_guest_that_was_off_when_its_hook_was_deleted_comes_home_while_argo_cd_still_holds_that(
    own_agent: Agent, domain: DomainFactory
) -> None:
    own_agent.start(relist_interval="0.5")
    guest = domain(size="64M")
    guest.write("vda", 0x11, length="16M")
    made = hook(own_agent, guest, **{"copy.bandwidth": SLOW})
    made.wait_for_copying()
    guest.libvirtd.kill_guest(guest.name)
    made.delete("--wait=false")
    wait_until(lambda: held_only_by_argo_cd(made), "released", SECONDS)
    assert health(made) == "Degraded"
    guest.libvirtd.virsh("start", guest.name, "--paused")
    wait_until(lambda: not list(guest.directory.glob("*.vmb-*")), "home", SECONDS)
    assert_home(guest)
    assert held_only_by_argo_cd(made)
