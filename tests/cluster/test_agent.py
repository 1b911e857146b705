"""`kubectl apply` a VMBackup, and the agent of its node takes it: to Ready, to a refusal, or home when deleted."""

from __future__ import annotations

import pytest

from tests.agents import Agent, Apply, assert_stored
from tests.domains import DomainFactory


def test_a_backup_that_is_applied_becomes_ready_and_is_stored_with_its_digests(
    agent: Agent, apply: Apply, domain: DomainFactory
) -> None:
    guest = domain({"vda": "raw", "vdb": "qcow2"}, size="16M")
    guest.write("vda", 0x11)
    made = apply(guest.name)
    status = made.wait()
    folder = assert_stored(status)
    assert folder.name == f"{made.name}.{made.uid}"
    assert {disk["target"]: disk["state"] for disk in status["disks"]} == {"vda": "Home", "vdb": "Home"}
    assert guest.live("vda").source == guest.bases["vda"]
    assert made.events() == ["Pending", "Snapshotting", "Copying", "Committing", "Pivoted"]
