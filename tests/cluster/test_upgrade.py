"""From the definitions of before to these, with live objects and a guest in the middle of its backup.

Of the last release; and of the commit before the last one that changed them, where git knows it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sandbox.kube import KubeApi, KubectlError
from sandbox.libvirtd import Libvirtd
from tests.support.agents import SECONDS, Agent, CatchBackup, VMBackup, agent_of, assert_home, assert_stored
from tests.support.crds import CRDS, RELEASED, ROOT, Crd, commit_before, load, of_commit
from tests.support.domains import DomainFactory, wait_until
from tests.support.manifests import backup
from vmbackup.api.identity import BackupId
from vmbackup.cluster.client import Cluster, load_client
from vmbackup.reconcile.state.journal import Journal

BEFORE = [str(RELEASED[-1].relative_to(ROOT)), *filter(None, [commit_before()])]  # no history: only the release


@pytest.fixture(params=BEFORE)
def old_kube(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[KubeApi]:
    """An API server with the definitions of before."""
    released = ROOT / request.param
    with KubeApi(tmp_path / "kube") as kube:
        kube.apply_crds(released if released.exists() else of_commit(request.param, tmp_path))
        yield kube


@pytest.fixture
def old_agent(old_kube: KubeApi, libvirtd: Libvirtd, tmp_path: Path) -> Iterator[Agent]:
    """An agent of that API server, not started yet."""
    with agent_of(old_kube, libvirtd, tmp_path) as own:
        yield own


def serve(kube: KubeApi, crd: Crd) -> None:
    kube.apply(crd)
    kube.kubectl("wait", "--for=condition=Established", "--timeout=30s", f"crd/{crd['metadata']['name']}")


def test_live_objects_outlast_new_definitions_and_a_running_backup_goes_on(
    old_kube: KubeApi, old_agent: Agent, domain: DomainFactory, copying: CatchBackup
) -> None:
    policies = load(CRDS)["vmbackuppolicies"]
    serve(old_kube, policies)  # what is new may be there before: agents of either version read it
    old_agent.start()
    finished = old_agent.apply(domain(size="8M").name)
    assert_stored(finished.wait())
    wait_until(lambda: "finalizers" not in finished.get()["metadata"], "the agent is done with it", SECONDS)
    running, guest = copying(old_agent)
    waiting = VMBackup(old_kube, "of-another-node")
    old_kube.apply(backup(waiting.name, nodeName="elsewhere"))
    resting = {each: each.get() for each in (finished, waiting)}
    uid, spec, status = running.uid, running.get()["spec"], running.status

    old_kube.apply_crds(CRDS)

    assert {each: each.get() for each in resting} == resting
    assert (running.uid, running.get()["spec"]) == (uid, spec)
    assert running.status["snapshotTime"] == status["snapshotTime"]
    running.patch({"copy": {"bandwidth": None}})
    assert_stored(running.wait())
    assert_home(guest)
    assert finished.condition("Ready") == ("True", "Succeeded")
    old_agent.stop()
    old_agent.start()
    assert_stored(old_agent.apply(guest.name).wait())


def with_a_field_of_a_later_version(crd: Crd) -> dict[str, Any]:
    later = copy.deepcopy(crd)
    schema = later["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    schema["properties"]["spec"]["properties"]["commit"]["properties"]["later"] = {"type": "integer"}
    return later


@pytest.fixture
def later_kube(tmp_path: Path) -> Iterator[KubeApi]:
    """An API server with the definitions of a later version."""
    with KubeApi(tmp_path / "kube") as kube:
        kube.apply_crds(CRDS)
        serve(kube, with_a_field_of_a_later_version(load(CRDS)["vmbackups"]))
        yield kube


@pytest.fixture
def later_agent(later_kube: KubeApi, libvirtd: Libvirtd, tmp_path: Path) -> Iterator[Agent]:
    with agent_of(later_kube, libvirtd, tmp_path) as own:
        yield own


def test_after_a_roll_back_what_a_later_version_had_begun_comes_home_before_its_finalizer_goes(
    later_agent: Agent, copying: CatchBackup
) -> None:
    """This one cannot read its spec, neither that of the object nor that of the journal."""
    later_agent.start()
    running, guest = copying(later_agent)
    later_agent.kill()
    running.patch({"commit": {"later": 1}})
    (journal,) = later_agent.records()
    commit = {**journal.spec.get("commit", {}), "later": 1}
    Journal.start(later_agent.state_dir, replace(journal, spec={**journal.spec, "commit": commit})).close()

    later_agent.start()
    running.delete("--wait=false")
    wait_until(lambda: not running.exists(), "the finalizer goes", SECONDS)
    assert_home(guest)


def test_each_resource_is_stored_in_one_version_and_comes_back_the_same_in_each_that_is_served(kube: KubeApi) -> None:
    for plural, crd in load(CRDS).items():
        name = crd["metadata"]["name"]
        stored = [version["name"] for version in crd["spec"]["versions"] if version["storage"]]
        assert kube.get("crd", name)["status"]["storedVersions"] == stored, plural
    kube.apply(backup("in-each-version", nodeName="elsewhere"))
    for version in load(CRDS)["vmbackups"]["spec"]["versions"]:
        found = kube.get(f"vmbackups.{version['name']}.vmbackup.dev", "in-each-version")
        kube.apply({**found, "metadata": {"name": found["metadata"]["name"], "namespace": "default"}})
        again = kube.get(f"vmbackups.{version['name']}.vmbackup.dev", "in-each-version")
        assert again["spec"] == found["spec"]
        assert again["metadata"]["generation"] == found["metadata"]["generation"] == 1


def with_a_limit_of_5(crd: Crd) -> dict[str, Any]:
    """What a version with a mistake might do: let no commit.backoffLimit be above 5."""
    tightened = copy.deepcopy(crd)
    schema = tightened["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    schema["properties"]["spec"]["properties"]["commit"]["properties"]["backoffLimit"] |= {"maximum": 5, "default": 5}
    return tightened


@pytest.fixture
def tighter_kube(kube: KubeApi) -> Iterator[KubeApi]:
    """The API server with such a definition. It has the VMBackup `large` of before, whose limit is 50."""
    kube.apply(backup("large", nodeName="elsewhere", **{"commit.backoffLimit": 50}))
    serve(kube, with_a_limit_of_5(load(CRDS)["vmbackups"]))
    wait_until(lambda: refused(kube), "the limit is in force", SECONDS)
    yield kube
    kube.apply_crds(CRDS)
    wait_until(lambda: not refused(kube), "the limit is lifted", SECONDS)


def test_what_a_tighter_definition_would_refuse_can_still_be_reported_on_edited_and_deleted(
    tighter_kube: KubeApi,
) -> None:
    large = VMBackup(tighter_kube, "large")
    cluster = Cluster(load_client(str(tighter_kube.kubeconfig)))
    assert cluster.put_status(BackupId.of(large.get()), {**large.status, "message": "written by the agent"})
    large.patch({"copy": {"bandwidth": "10Mi"}})
    large.retry("1")
    assert large.get()["spec"]["commit"]["backoffLimit"] == 50
    assert large.status["message"] == "written by the agent"
    large.delete()
    assert not large.exists()


def refused(kube: KubeApi) -> bool:
    """Whether a new one is."""
    try:
        body = json.dumps(backup("new", **{"commit.backoffLimit": 50}))
        kube.kubectl("create", "--dry-run=server", "-f", "-", stdin=body)
    except KubectlError as error:
        return "less than or equal to 5" in error.stderr
    return False
