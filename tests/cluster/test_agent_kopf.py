"""The traps of kopf (see agent.py), and that the agent does not fall into them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from sandbox.kube import KubeApi
from tests.support.agents import SECONDS, Agent, CatchBackup, assert_home, assert_stored
from tests.support.blackhole import Blackhole
from tests.support.domains import DomainFactory, wait_until

PEERING_CRD = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "clusterkopfpeerings.kopf.dev"},
    "spec": {
        "group": "kopf.dev",
        "scope": "Cluster",
        "names": {"kind": "ClusterKopfPeering", "plural": "clusterkopfpeerings"},
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
            }
        ],
    },
}


@pytest.fixture
def peering(kube: KubeApi) -> Iterator[None]:
    """Somebody else's operator, which claims to come first."""
    kube.apply(PEERING_CRD)
    kube.kubectl("wait", "--for=condition=Established", "crd/clusterkopfpeerings.kopf.dev", "--timeout=30s")
    boss = {"priority": 1000, "lifetime": 3600, "lastseen": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    name = {"name": "default"}
    kube.apply({"apiVersion": "kopf.dev/v1", "kind": "ClusterKopfPeering", "metadata": name, "status": {"boss": boss}})
    yield
    kube.kubectl("delete", "crd/clusterkopfpeerings.kopf.dev")


def test_no_snapshot_is_taken_before_the_finalizer_is_stored(
    kube: KubeApi, own_agent: Agent, domain: DomainFactory
) -> None:
    """Its user may read, and write the status, but not the object."""
    user = f"agent-{own_agent.node}"
    rules = {
        "look": (
            "get,list,watch",
            ",".join(f"{each}.vmbackup.dev" for each in ("vmbackups", "vmbackupstores", "vmbackuppolicies")),
        ),
        "tell": ("patch,create", "vmbackups.vmbackup.dev/status,events.events.k8s.io"),
    }
    for name, (verbs, resources) in rules.items():
        kube.kubectl("create", "clusterrole", f"{user}-{name}", f"--verb={verbs}", f"--resource={resources}")
        kube.kubectl("create", "clusterrolebinding", f"{user}-{name}", f"--clusterrole={user}-{name}", f"--user={user}")
    own_agent.start(kubeconfig=str(kube.kubeconfig_for(user)))
    guest = domain(size="8M")
    made = own_agent.apply(guest.name)
    wait_until(lambda: "forbidden" in own_agent.log, "the finalizer is refused", SECONDS)
    assert guest.live().source == guest.bases["vda"]
    assert made.condition("Ready") == ("Unknown", "Pending")
    assert not own_agent.records()
    kube.kubectl("create", "clusterrole", f"{user}-hold", "--verb=patch", "--resource=vmbackups.vmbackup.dev")
    kube.kubectl("create", "clusterrolebinding", f"{user}-hold", f"--clusterrole={user}-hold", f"--user={user}")
    made.patch({"copy": {"bandwidth": "900Mi"}})
    made.wait()


def test_a_daemon_that_has_ended_is_started_again_by_a_retry(agent: Agent, domain: DomainFactory) -> None:
    made = agent.apply(domain(size="8M").name)
    made.wait()
    for value in ("1", "2"):
        wait_until(lambda: "finalizers" not in made.get()["metadata"], "kopf is done with it")
        made.retry(value)
        wait_until(lambda value=value: made.status.get("lastHandledRetry") == value, f"retry {value}", SECONDS)


def test_it_leaves_no_marks_of_its_own_in_metadata(agent: Agent, domain: DomainFactory) -> None:
    made = agent.apply(domain(size="8M").name)
    made.wait()
    wait_until(lambda: "finalizers" not in made.get()["metadata"], "kopf is done with it")
    written = made.get()["metadata"]
    assert set(written["annotations"]) == {"kubectl.kubernetes.io/last-applied-configuration"}
    assert "kopf" not in json.dumps(written)


def test_while_a_deleted_backup_comes_home_nobody_writes_to_it_for_nothing(
    agent: Agent, committing: CatchBackup
) -> None:
    made, guest = committing(agent)
    made.delete("--wait=false")
    merged = made.status["progress"]["mergedBytes"]
    wait_until(lambda: made.status["progress"]["mergedBytes"] > merged + (2 << 20), "2 s of commit", SECONDS)
    assert "touch" not in json.dumps(made.get()["metadata"])
    made.patch({"commit": {"bandwidth": None}})
    made.wait_until_gone()
    assert_home(guest, 0x22)


def test_somebodys_peering_does_not_pause_it(peering: None, own_agent: Agent, domain: DomainFactory) -> None:
    own_agent.start()
    assert_stored(own_agent.apply(domain(size="8M").name).wait())


def test_only_the_backups_of_its_node_are_touched(agent: Agent, domain: DomainFactory) -> None:
    guest = domain(size="8M")
    foreign = agent.apply(guest.name, nodeName="somewhere-else")
    agent.apply(guest.name).wait()
    assert foreign.status["observedGeneration"] == -1


def test_stripped_of_its_finalizer_and_gone_it_is_as_good_as_deleted(own_agent: Agent, copying: CatchBackup) -> None:
    own_agent.start(relist_interval="300")
    made, guest = copying(own_agent)
    uid = made.uid
    made.vanish()
    made = own_agent.apply(guest.name, name=made.name)
    assert_stored(made.wait())
    assert made.uid != uid
    assert_home(guest)
    assert uid not in [record.uid for record in own_agent.records()]


def test_a_watch_that_has_died_in_silence_is_noticed_by_healthz(
    kube: KubeApi, own_agent: Agent, domain: DomainFactory
) -> None:
    with Blackhole(kube.url) as network:
        kubeconfig = json.loads(kube.kubeconfig.read_text())
        kubeconfig["clusters"][0]["cluster"]["server"] = network.url
        elsewhere = own_agent.program.log.with_name("kubeconfig")
        elsewhere.write_text(json.dumps(kubeconfig))
        own_agent.start(kubeconfig=str(elsewhere), relist_interval="1")
        own_agent.apply(domain(size="8M").name).wait()
        assert own_agent.healthz() == (200, "ok\n")
        network.swallow_what_is_open()
        made = own_agent.apply(domain(size="8M").name)
        wait_until(lambda: (own_agent.healthz() or (0, ""))[0] == 503, "not healthy", SECONDS)
        assert "watch" in (own_agent.healthz() or (0, ""))[1]
        assert made.condition("Ready") == ("Unknown", "Pending")
        own_agent.kill()  # as a supervisor that reads /healthz does
        own_agent.start(kubeconfig=str(elsewhere))
        made.wait()
