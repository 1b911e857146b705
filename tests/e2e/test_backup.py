"""Backups that a user of the cluster makes, with everything between them and the guest as it is in production."""

from __future__ import annotations

import os
import select
import signal
import time

import pytest

from sandbox.demo.proof import acknowledged, prove_guest
from sandbox.kube import KubeApi, KubectlError
from sandbox.oracle import Bounds
from tests.e2e.cluster import SECONDS, Cluster, agent_process
from tests.support.agents import VMBackup
from tests.support.domains import wait_until

pytestmark = pytest.mark.e2e

# A copy of 72 MiB takes so long that the guest writes some 40 MiB to its overlays; and a commit of them never ends by
# itself, since the guest writes faster than it merges.
SLOW = {"copy.bandwidth": "4Mi", "commit.bandwidth": "1Mi"}
RESUMED_WITHIN = 45.0  # seconds from the start of the next container, if a call was under way (docs/operations.md)


def test_a_user_of_a_namespace_backs_up_a_running_guest(cluster: Cluster, user: KubeApi) -> None:
    with pytest.raises(KubectlError, match="orbidden"):
        user.kubectl("get", "vmbackups", "--namespace=default")

    with cluster.proven_backup(user, "first") as made:
        pass

    assert made.condition("ChainClean")[0] == "True"
    assert made.status["quiesced"]


def test_a_daemonset_that_is_rolled_in_the_middle_of_a_commit_loses_nothing(cluster: Cluster, user: KubeApi) -> None:
    with cluster.proven_backup(user, "rolled", **SLOW) as made:
        made.wait_for_phase("Committing", SECONDS)
        before = cluster.pod_name()

        cluster.roll()

        assert cluster.pod_name() != before
        merged = made.status["progress"]["mergedBytes"]
        wait_until(lambda: made.status["progress"]["mergedBytes"] > merged, "the commit goes on", SECONDS)
        assert made.status["phase"] == "Committing"
        made.patch({"commit": {"bandwidth": None}})

    assert [disk["attempts"] for disk in made.status["disks"]] == [1, 1]
    list(prove_guest(cluster.guest))


def test_a_guest_that_is_suspended_when_its_agent_is_killed_runs_again(cluster: Cluster, user: KubeApi) -> None:
    for attempt in range(10):
        with cluster.told_of_states() as states:
            before = acknowledged(cluster.guest)
            made = cluster.back_up(user, f"killed-{attempt}")
            killed = _kill_while_suspended(cluster, made, states)
        if killed:
            break
    else:
        pytest.fail("the agent was never caught while it had suspended the guest")
    wait_until(lambda: agent_process() not in (None, killed), "the next container", SECONDS)
    started = time.monotonic()

    wait_until(cluster.guest_runs, "the guest runs", SECONDS)

    assert time.monotonic() - started < RESUMED_WITHIN
    made.wait(seconds=SECONDS)
    cluster.prove(made, Bounds.around(before, acknowledged(cluster.guest)))


def _kill_while_suspended(cluster: Cluster, made: VMBackup, states: int) -> int | None:
    """The process of the agent, if it could be killed with the guest suspended, which takes some 40 ms, twice."""
    agent = agent_process()
    assert agent is not None
    while made.condition("Ready")[0] != "True":
        while select.select([states], [], [], 0.5)[0]:
            if b"Suspended" in os.read(states, 4096):
                os.kill(agent, signal.SIGSTOP)  # what it has asked for already may still be done
                if not any(cluster.guest_runs() for _ in range(3)):
                    os.kill(agent, signal.SIGKILL)
                    return agent
                os.kill(agent, signal.SIGCONT)
    return None
