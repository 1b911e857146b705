"""Status and events reach a real API server, once it is there, and never the wrong object; nothing waits for it."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from sandbox.kube import KubeApi
from tests.support.manifests import backup, store
from tests.support.stopwatch import Stopwatch
from vmbackup.api.identity import BackupId, ObjectId
from vmbackup.api.names import BACKUPS
from vmbackup.api.resource import condition, with_generation
from vmbackup.api.status import DiskReport, DiskState, Outcome, Phase, Reason, Report
from vmbackup.cluster.client import Cluster, load_client
from vmbackup.cluster.events import Events, NodeRef
from vmbackup.cluster.status_writer import StatusWriter
from vmbackup.errors import PermanentError, RefusedError, TransientError

NAMESPACE = "writer"
COPYING = Report(phase=Phase.COPYING, reason=Reason.COPYING, chain_clean=False, start_time=1_750_000_000)
_numbers = count()


class CountingCluster(Cluster):
    """The real one; it also keeps what was sent."""

    def __init__(self, kubeconfig: Path) -> None:
        super().__init__(load_client(str(kubeconfig)), timeout=(1.0, 5.0))
        self.written: list[Mapping[str, Any]] = []

    def put_status(self, identity: ObjectId, status: Mapping[str, Any]) -> dict[str, Any] | None:
        self.written.append(status)
        return super().put_status(identity, status)


@pytest.fixture(scope="module")
def namespace(kube: KubeApi) -> str:
    kube.kubectl("create", "namespace", NAMESPACE)
    return NAMESPACE


@pytest.fixture
def cluster(kube: KubeApi, namespace: str) -> CountingCluster:
    return CountingCluster(kube.kubeconfig)


@pytest.fixture
def body(kube: KubeApi, cluster: CountingCluster) -> dict[str, Any]:
    """A new VMBackup, as the API server has it."""
    name = f"web-{next(_numbers)}"
    kube.apply(backup(name, NAMESPACE))
    found = cluster.get(BACKUPS, NAMESPACE, name)
    assert found is not None
    return found


@pytest.fixture
def writer(cluster: CountingCluster, body: dict[str, Any]) -> Iterator[StatusWriter]:
    writer = writer_of(cluster, body)
    yield writer
    writer.close()


@pytest.fixture
def outage(kube: KubeApi) -> Iterator[Callable[[], None]]:
    """The API server is stopped; call it to have it back."""
    kube.apiserver.stop()
    yield kube.start_apiserver
    kube.start_apiserver()


def writer_of(cluster: Cluster, body: dict[str, Any], interval: float = 60.0) -> StatusWriter:
    return StatusWriter(cluster, BackupId.of(body), generation=1, previous=body["status"], interval=interval)


def status_of(cluster: Cluster, body: dict[str, Any]) -> dict[str, Any]:
    found = cluster.get(BACKUPS, NAMESPACE, body["metadata"]["name"])
    assert found is not None
    return found["status"]


def copied(number: int, report: Report = COPYING) -> Report:
    return replace(report, disks=(DiskReport("vda", DiskState.COPYING, copied_bytes=number, total_bytes=1000),))


def wait_for(what: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "did not come about in time"
        time.sleep(0.02)


# Writing


def test_a_report_becomes_the_status(cluster: CountingCluster, body: dict[str, Any], writer: StatusWriter) -> None:
    writer.write(copied(250))
    assert writer.flush(10)
    status = status_of(cluster, body)
    assert status["phase"] == "Copying"
    assert status["observedGeneration"] == 1
    assert status["progress"]["summary"] == "25%"
    assert condition(status, "ChainClean")["status"] == "False"
    assert condition(status, "Ready")["lastTransitionTime"] > "2025"
    assert status == writer.latest


def test_what_matters_is_sent_at_once_and_in_order(
    cluster: CountingCluster, body: dict[str, Any], writer: StatusWriter
) -> None:
    phases = [Phase.PENDING, Phase.SNAPSHOTTING, Phase.COPYING, Phase.COMMITTING, Phase.PIVOTED]
    for phase in phases:
        writer.write(replace(COPYING, phase=phase))
    wait_for(lambda: status_of(cluster, body)["phase"] == "Pivoted")
    assert [status["phase"] for status in cluster.written] == phases


def test_mere_progress_is_sent_only_every_so_often(cluster: CountingCluster, body: dict[str, Any]) -> None:
    writer = writer_of(cluster, body, interval=0.4)
    begun = time.monotonic()
    for number in range(0, 1001, 10):
        writer.write(copied(number))
        time.sleep(0.01)  # 1 s of copying
    wait_for(lambda: status_of(cluster, body)["progress"]["copiedBytes"] == 1000)  # the last one, with no push
    assert 2 <= len(cluster.written) <= 2 + (time.monotonic() - begun) / 0.4


def test_waiting_progress_goes_along_with_what_matters(cluster: CountingCluster, writer: StatusWriter) -> None:
    writer.write(copied(0))
    assert writer.flush(10)
    writer.write(copied(500))
    writer.write(copied(600, replace(COPYING, phase=Phase.COMMITTING)))
    wait_for(lambda: len(cluster.written) == 2)
    assert cluster.written[1]["phase"] == "Committing"
    assert cluster.written[1]["progress"]["copiedBytes"] == 600


def test_the_same_again_is_not_sent(cluster: CountingCluster, writer: StatusWriter) -> None:
    for _ in range(3):
        writer.write(COPYING)
        assert writer.flush(10)
    assert len(cluster.written) == 1


def test_no_thread_is_left_when_all_is_sent(writer: StatusWriter, body: dict[str, Any]) -> None:
    writer.write(COPYING)
    assert writer.flush(10)
    name = f"status-{body['metadata']['name']}"
    wait_for(lambda: name not in {thread.name for thread in threading.enumerate()})
    writer.write(replace(COPYING, phase=Phase.COMMITTING))
    assert writer.flush(10)


def test_what_an_earlier_run_left_is_cleared(cluster: CountingCluster, body: dict[str, Any]) -> None:
    """Even if this run has seen an old status only."""
    earlier = writer_of(cluster, body)
    earlier.write(replace(copied(9), location="/store/old", snapshot_time=1_750_000_000))
    assert earlier.flush(10)
    later = writer_of(cluster, body)
    later.write(Report(reason=Reason.QUEUED, chain_clean=True))
    assert later.flush(10)
    assert set(status_of(cluster, body)) == {"observedGeneration", "phase", "message", "conditions"}


def test_what_somebody_else_changed_is_put_right(
    kube: KubeApi, cluster: CountingCluster, body: dict[str, Any], writer: StatusWriter
) -> None:
    writer.write(COPYING)
    assert writer.flush(10)
    forged = json.dumps({"status": {"phase": "Pivoted", "location": "/elsewhere"}})
    name = body["metadata"]["name"]
    kube.kubectl("patch", "vmb", name, "-n", NAMESPACE, "--subresource=status", "--type=merge", "-p", forged)
    writer.write(copied(1))
    assert writer.flush(10)
    status = status_of(cluster, body)
    assert status["phase"] == "Copying"
    assert "location" not in status


def test_kubectl_wait_sees_success_and_failure(
    kube: KubeApi, cluster: CountingCluster, body: dict[str, Any], writer: StatusWriter
) -> None:
    name = f"vmb/{body['metadata']['name']}"
    writer.write(replace(COPYING, phase=Phase.FAILED, reason=Reason.COPY_FAILED, outcome=Outcome.FAILED))
    kube.kubectl("wait", "--for=condition=Ready=False", name, "-n", NAMESPACE, "--timeout=10s")
    writer.write(replace(COPYING, phase=Phase.PIVOTED, outcome=Outcome.SUCCEEDED, backup_complete=True))
    kube.kubectl("wait", "--for=condition=Ready", name, "-n", NAMESPACE, "--timeout=10s")


def test_an_edit_after_the_end_is_acknowledged(
    kube: KubeApi, cluster: CountingCluster, body: dict[str, Any], writer: StatusWriter
) -> None:
    metadata = body["metadata"]
    writer.write(replace(COPYING, phase=Phase.PIVOTED, outcome=Outcome.SUCCEEDED, backup_complete=True))
    assert writer.flush(10)
    edit = json.dumps({"spec": {"ttlSecondsAfterFinished": 60}})
    kube.kubectl("patch", "vmb", metadata["name"], "-n", NAMESPACE, "--type=merge", "-p", edit)
    edited = cluster.get(BACKUPS, NAMESPACE, metadata["name"])
    assert edited is not None
    assert edited["metadata"]["generation"] == 2
    seen = with_generation(edited["status"], 2)
    cluster.put_status(BackupId.of(body), seen)
    assert status_of(cluster, body) == seen
    kube.kubectl("wait", "--for=condition=Ready", f"vmb/{metadata['name']}", "-n", NAMESPACE, "--timeout=10s")


# The object is gone


def test_a_deleted_object_is_noticed(kube: KubeApi, body: dict[str, Any], writer: StatusWriter) -> None:
    kube.kubectl("delete", "vmb", body["metadata"]["name"], "-n", NAMESPACE)
    writer.write(COPYING)
    assert writer.flush(10)
    assert writer.gone


def test_another_object_of_the_same_name_is_never_written_to(
    kube: KubeApi, cluster: CountingCluster, body: dict[str, Any], writer: StatusWriter
) -> None:
    name = body["metadata"]["name"]
    kube.kubectl("delete", "vmb", name, "-n", NAMESPACE)
    kube.apply(backup(name, NAMESPACE))
    writer.write(COPYING)
    assert writer.flush(10)
    assert writer.gone
    assert status_of(cluster, body)["phase"] == "Pending"
    sent = len(cluster.written)
    writer.write(replace(COPYING, phase=Phase.FAILED))
    assert writer.flush(10)
    assert len(cluster.written) == sent


# The server is away


def test_nothing_waits_for_a_server_that_is_away_and_the_newest_arrives_when_it_is_back(
    cluster: CountingCluster, body: dict[str, Any], writer: StatusWriter, outage: Callable[[], None]
) -> None:
    watch = Stopwatch()
    for number in range(100):
        writer.write(copied(number))
    writer.write(replace(COPYING, phase=Phase.COMMITTING))
    assert watch.within(1), watch
    assert not writer.flush(0.5)
    assert not writer.gone
    outage()
    assert writer.flush(10)
    assert status_of(cluster, body)["phase"] == "Committing"


def test_it_tells_since_when_the_oldest_status_waits_and_when_it_has_arrived(
    cluster: CountingCluster, body: dict[str, Any], outage: Callable[[], None]
) -> None:
    late: list[float | None] = []
    writer = StatusWriter(cluster, BackupId.of(body), generation=1, previous=body["status"], late=late.append)
    begun = time.time()
    writer.write(COPYING)
    writer.write(replace(COPYING, phase=Phase.COMMITTING))
    assert not writer.flush(0.5)
    (since,) = late
    assert since is not None
    assert begun <= since <= begun + 0.5
    outage()
    assert writer.flush(10)
    assert late[-1] is None


def test_closed_it_gives_up(writer: StatusWriter, body: dict[str, Any], outage: Callable[[], None]) -> None:
    writer.write(COPYING)
    writer.close()
    name = f"status-{body['metadata']['name']}"
    wait_for(lambda: name not in {thread.name for thread in threading.enumerate()})


def test_calls_to_a_server_that_is_away_are_worth_a_retry(
    cluster: CountingCluster, body: dict[str, Any], outage: Callable[[], None]
) -> None:
    with pytest.raises(TransientError, match="does not answer"):
        cluster.get(BACKUPS, NAMESPACE, body["metadata"]["name"])
    with pytest.raises(TransientError, match="does not answer"):
        cluster.store("local")


def test_a_server_that_hangs_is_given_up_in_time(kube: KubeApi, body: dict[str, Any]) -> None:
    hurried = Cluster(load_client(str(kube.kubeconfig)), timeout=(0.5, 0.5))
    assert hurried.get(BACKUPS, NAMESPACE, body["metadata"]["name"])
    pid = kube.apiserver.pid
    subprocess.run(["kill", "-STOP", str(pid)], check=True)
    try:
        watch = Stopwatch()
        with pytest.raises(TransientError):
            hurried.get(BACKUPS, NAMESPACE, body["metadata"]["name"])
        assert watch.within(3), watch
    finally:
        subprocess.run(["kill", "-CONT", str(pid)], check=True)


def test_a_user_without_rights_is_told_what_to_check(kube: KubeApi, body: dict[str, Any]) -> None:
    nobody = Cluster(load_client(str(kube.kubeconfig_for("nobody"))))
    with pytest.raises(PermanentError, match="check the ClusterRole") as refused:
        nobody.get(BACKUPS, NAMESPACE, body["metadata"]["name"])
    assert refused.value.reason == "Forbidden"
    with pytest.raises(PermanentError, match="check the ClusterRole"):
        nobody.store("local")
    with pytest.raises(PermanentError, match="check the ClusterRole"):
        nobody.delete(BackupId.of(body))


# Events


def test_events_are_what_kubectl_describe_shows(kube: KubeApi, cluster: CountingCluster, body: dict[str, Any]) -> None:
    events = Events(cluster, node="node-a")
    events.normal(BackupId.of(body), "Snapshotting", "Took the snapshot of vda and vdb in 40 ms.")
    events.warning(BackupId.of(body), "CommitRetrying", "Commit of vda failed. " + "x" * 2000)
    assert events.flush(10)
    events.close()
    shown = kube.kubectl("describe", "vmb", body["metadata"]["name"], "-n", NAMESPACE)
    rows = [" ".join(row.split()) for row in shown[shown.index("Events:") :].splitlines()]
    assert any(
        row.startswith("Normal Snapshotting") and row.endswith("vmbackup Took the snapshot of vda and vdb in 40 ms.")
        for row in rows
    )
    assert any(row.startswith("Warning CommitRetrying") and row.endswith("xxx…") for row in rows)


def test_an_event_about_the_node_is_shown_where_events_of_nodes_are(kube: KubeApi, cluster: CountingCluster) -> None:
    kube.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "writer-node"}})
    events = Events(cluster, node="writer-node")
    events.warning(NodeRef("writer-node"), "OrphanOverlay", "Nobody knows /images/web.vmb-01234567-vda.qcow2.")
    assert events.flush(10)
    events.close()
    assert "Nobody knows /images/web.vmb-01234567-vda.qcow2." in kube.kubectl("describe", "node", "writer-node")


def test_events_wait_for_a_server_that_is_away_and_arrive_in_order_with_their_own_time(
    kube: KubeApi, cluster: CountingCluster, body: dict[str, Any], outage: Callable[[], None]
) -> None:
    events = Events(cluster, node="node-a")
    begun, watch = time.time(), Stopwatch()
    for number in range(20):
        events.normal(BackupId.of(body), f"Step{number}", "Copying vda.")
    took = time.time() - begun
    assert watch.allows(took, 1), watch
    assert not events.flush(0.5)
    outage()
    assert events.flush(20)
    events.close()
    name = body["metadata"]["name"]
    found = [each for each in events_in(kube) if each["regarding"]["name"] == name]
    assert [each["reason"] for each in found] == [f"Step{number}" for number in range(20)]
    stored = [each["metadata"]["creationTimestamp"] for each in found]
    assert stored == sorted(stored)
    assert all(datetime.fromisoformat(each["eventTime"]).timestamp() - begun < took + 0.01 for each in found)


def test_of_too_many_events_the_oldest_are_dropped_and_counted(
    kube: KubeApi,
    cluster: CountingCluster,
    body: dict[str, Any],
    outage: Callable[[], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    events = Events(cluster, node="node-a", limit=5)
    for number in range(8):
        events.normal(BackupId.of(body), f"Step{number}", "Copying vda.")
    outage()
    assert events.flush(20)
    events.close()
    name = body["metadata"]["name"]
    reasons = [each["reason"] for each in events_in(kube) if each["regarding"]["name"] == name]
    assert reasons == [f"Step{number}" for number in range(3, 8)]
    assert "3 events were dropped" in caplog.text


def test_an_event_that_is_refused_is_logged_and_holds_nothing_up(
    kube: KubeApi, cluster: CountingCluster, body: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    events = Events(cluster, node="node-a")
    events.normal(BackupId("no-such-namespace", "web", "1"), "Copying", "Copying vda.")
    events.normal(BackupId.of(body), "Pivoted", "Home.")
    assert events.flush(10)
    events.close()
    events.normal(BackupId.of(body), "TooLate", "Closed.")
    assert "event Copying about web" in caplog.text
    assert [e["reason"] for e in events_in(kube) if e["regarding"]["name"] == body["metadata"]["name"]] == ["Pivoted"]


def events_in(kube: KubeApi) -> list[dict[str, Any]]:
    """All events of the namespace, oldest first."""
    found = kube.get("events.v1.events.k8s.io", "-n", NAMESPACE)["items"]
    return sorted(found, key=lambda each: each["eventTime"])


# Reading and deleting


def test_a_store_is_found_or_named_with_its_cure(kube: KubeApi, cluster: CountingCluster) -> None:
    kube.apply(store("writer-store", directory={"path": "/srv/backups"}))
    assert cluster.store("writer-store").directory.path == "/srv/backups"
    with pytest.raises(RefusedError, match="there is no VMBackupStore of this name; create it") as refused:
        cluster.store("writer-other")
    assert refused.value.reason == "StoreNotFound"
    assert "'writer-other'" in str(refused.value)


def test_a_backup_that_is_not_there_is_none(cluster: CountingCluster) -> None:
    assert cluster.get(BACKUPS, NAMESPACE, "not-there") is None


def test_the_backups_of_a_node_are_listed_in_all_namespaces(kube: KubeApi, cluster: CountingCluster) -> None:
    names = {f"listed-{number}" for number in range(5)}
    kube.apply(*(backup(name, NAMESPACE, nodeName="writer-node-b") for name in names))
    kube.apply(backup("listed-default", "default", nodeName="writer-node-b"))
    found = cluster.of_node(BACKUPS, "writer-node-b", page_size=2)
    assert {one["metadata"]["name"] for one in found} == names | {"listed-default"}


def test_only_the_very_object_is_deleted(kube: KubeApi, cluster: CountingCluster, body: dict[str, Any]) -> None:
    ref = BackupId.of(body)
    cluster.delete(replace(ref, uid="00000000-0000-0000-0000-000000000000"))
    assert cluster.get(BACKUPS, NAMESPACE, ref.name)
    cluster.delete(ref)
    assert cluster.get(BACKUPS, NAMESPACE, ref.name) is None
    cluster.delete(ref)


def test_without_a_kubeconfig_the_cure_is_named(tmp_path: Path) -> None:
    with pytest.raises(PermanentError, match="set --kubeconfig"):
        load_client(str(tmp_path / "not-there"))


def test_in_a_pod_without_a_service_account_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    with pytest.raises(PermanentError, match="run in a pod with a service account"):
        load_client()
