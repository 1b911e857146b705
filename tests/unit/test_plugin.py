"""What the kubectl plugin says, and what it is packed into; that it works is shown in tests/cluster/test_plugin.py."""

from __future__ import annotations

import ast
import hashlib
import subprocess
import tarfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

import kubectl_vmbackup
from kubectl_vmbackup import view
from kubectl_vmbackup.advice import next_step, span
from kubectl_vmbackup.forget import signs_of_life, what_remains
from kubectl_vmbackup.node import Signs
from kubectl_vmbackup.policy import judge
from plugins.build import ARCHIVE, build
from vmbackup.api.names import FINALIZER
from vmbackup.api.resource import BackupResource
from vmbackup.api.status import Outcome, Phase, Reason, Report
from vmbackup.cluster.status import render

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
LONG_AGO = "2026-05-01T10:00:00Z"
TEN_MINUTES = timedelta(minutes=10)


def backup(report: Report | None = None, **metadata: Any) -> BackupResource:
    status = render(report, generation=1, previous={}, now=0.0) if report else {"observedGeneration": -1}
    known = {"name": "nightly", "namespace": "default", "creationTimestamp": LONG_AGO, **metadata}
    spec = {"domain": "web", "nodeName": "node-a", "storeRef": {"name": "local"}}
    return BackupResource({"metadata": known, "spec": spec, "status": status})


def ended(reason: str, *, home: bool = True) -> Report:
    return Report(Phase.FAILED, reason, "why", Outcome.FAILED, chain_clean=home, backup_complete=False)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (backup(Report(Phase.PIVOTED, outcome=Outcome.SUCCEEDED, chain_clean=True)), "nothing: it can be restored"),
        (backup(Report(Phase.COPYING, Reason.COPYING)), "nothing: it is running"),
        (backup(Report(Phase.COPYING, Reason.COPYING, last_progress_time=0.0)), "there was no progress"),
        (backup(Report(Phase.COMMITTING, Reason.DOMAIN_OFF, chain_clean=False)), "virsh start web"),
        (backup(Report(Phase.COMMITTING, Reason.DOMAIN_MIGRATED, chain_clean=False)), "never start it here"),
        (backup(ended(Reason.COMMIT_LIMIT_REACHED, home=False)), "kubectl vmbackup retry nightly -n default"),
        (backup(ended(Reason.COPY_FAILED)), "kubectl vmbackup retry nightly -n default --new"),
        (backup(ended(Reason.QUARANTINED, home=False)), "delete no file"),
        (backup(ended("BaseInUse")), "fix the problem that the message names"),
        (backup(), "no agent has taken it"),
        (backup(creationTimestamp=NOW.isoformat()), "about to take it"),
        (backup(deletionTimestamp=NOW.isoformat(), finalizers=[FINALIZER]), "nothing: it was deleted"),
        (backup(deletionTimestamp=LONG_AGO, finalizers=[FINALIZER]), "kubectl vmbackup forget nightly -n default"),
        (backup(deletionTimestamp=LONG_AGO, finalizers=["of/another"]), "of/another"),
    ],
)
def test_the_next_step_is_named_at_every_moment(given: BackupResource, says: str):
    assert says in next_step(given, NOW).text


def signs(**changes: Any) -> Signs:
    gone: dict[str, Any] = {"exists": False, "ready": None, "since": None, "pods": (), "last_write": None}
    return Signs("node-a", **(gone | changes))


READY_POD = {
    "metadata": {"namespace": "vmbackup-system", "name": "agent-1"},
    "status": {"conditions": [{"type": "Ready", "status": "True"}]},
}
DELETED = backup(deletionTimestamp=LONG_AGO)


@pytest.mark.parametrize(
    ("given", "seen", "says"),
    [
        (DELETED, signs(exists=True, ready=True), "the node is Ready"),
        (DELETED, signs(exists=True, ready=False, since=NOW - timedelta(minutes=2)), "not Ready for 2m only"),
        (DELETED, signs(pods=[READY_POD]), "vmbackup-system/agent-1"),
        (DELETED, signs(last_write=NOW - timedelta(minutes=9)), "wrote a status 9m ago"),
        (DELETED, signs(exists=None), "may not see nodes"),
        (DELETED, signs(pods=None), "may not see pods"),
        (backup(), signs(), "its agent was not asked to release it yet"),
        (backup(deletionTimestamp=(NOW - timedelta(minutes=3)).isoformat()), signs(), "deleted 3m ago only"),
    ],
)
def test_a_sign_of_life_keeps_a_backup_from_being_forgotten(given: BackupResource, seen: Signs, says: str):
    assert [says in found for found in signs_of_life(given, seen, NOW, TEN_MINUTES)] == [True]


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        (DELETED, signs()),
        (DELETED, signs(exists=True, ready=False, since=NOW - timedelta(hours=1))),
        (backup(), signs(exists=True, ready=False, since=NOW - timedelta(hours=1))),
        (DELETED, signs(last_write=NOW - timedelta(minutes=11), pods=[{**READY_POD, "status": {}}])),
    ],
)
def test_a_node_without_any_sign_of_life_for_long_enough_is_gone(given: BackupResource, seen: Signs):
    assert signs_of_life(given, seen, NOW, TEN_MINUTES) == []


def test_what_remains_says_so_where_the_disks_were_never_seen():
    assert "the state of the guest's disks was never reported" in "\n".join(what_remains(backup()))


def test_what_a_user_chose_as_a_name_cannot_drive_the_terminal():
    assert view.printable("web\x1b[2J\r\u202eoverlay\n") == "web?[2J??overlay\n"
    evil = BackupResource({**backup().body, "spec": {"domain": "web\x1b]0;x\x07", "nodeName": "node-a"}})
    assert "\x1b" not in view.table([evil], NOW, namespaces=True) + view.details(evil, (), NOW)
    told = BackupResource({**evil.body, "status": {"phase": "Failed", "message": "no domain web\x1b[2J\u202e"}})
    assert view.outcome(told).endswith("no domain web?[2J?")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59, "59s"), (61, "1m1s"), (3600, "1h"), (5400, "1h30m"), (90000, "1d1h")]
)
def test_a_length_of_time_is_short_to_read(seconds: int, text: str):
    assert span(timedelta(seconds=seconds)) == text


def test_the_same_sources_make_the_same_archive_and_the_manifest_has_its_digest(tmp_path: Path):
    for name in ("one", "two"):
        build(tmp_path / name, url="https://example.org/plugin.tar.gz")
    archive = (tmp_path / "one" / ARCHIVE).read_bytes()
    assert archive == (tmp_path / "two" / ARCHIVE).read_bytes()
    manifest = yaml.safe_load((tmp_path / "one" / "vmbackup.yaml").read_text())
    (platform,) = manifest["spec"]["platforms"]
    assert platform["sha256"] == hashlib.sha256(archive).hexdigest()
    assert platform["uri"] == "https://example.org/plugin.tar.gz"
    with tarfile.open(tmp_path / "one" / ARCHIVE) as packed:
        modes = {member.name: member.mode for member in packed}
    assert modes == {"kubectl-vmbackup": 0o755, "kubectl_complete-vmbackup": 0o755, "LICENSE": 0o644}
    assert {file["from"] for file in platform["files"]} == set(modes)


def test_it_needs_nothing_but_the_standard_library(tmp_path: Path):
    build(tmp_path)
    bare = ["/usr/bin/python3", "-I", "-S", str(tmp_path / "kubectl-vmbackup"), "check", "--help"]
    assert "changes nothing" in subprocess.run(bare, capture_output=True, text=True, check=True).stdout


def test_an_old_python_is_told_so_instead_of_failing_on_the_syntax():
    start = Path(kubectl_vmbackup.__file__).with_name("__main__.py").read_text()
    ast.parse(start, feature_version=(3, 4))
    assert start.index("sys.exit") < start.index("from kubectl_vmbackup")


def rules(**changes: Any) -> dict[str, Any]:
    rule = {"namespaces": ["default"], "domains": ["web*"], "nodes": ["*"], "stores": ["local"], **changes}
    return {"rules": [{name: value for name, value in rule.items() if value is not None}]}


BY_LABEL: dict[str, Any] = {"namespaces": None, "namespaceSelector": {"matchLabels": {"team": "a"}}}


@pytest.mark.parametrize(
    ("spec", "labels", "answer"),
    [
        (rules(), {}, True),
        (rules(nodes=["node-b"]), {}, False),
        (rules(domains=["db"]), {}, None),  # perhaps the rule means its UUID, or its other name
        (rules(**BY_LABEL), {"team": "a"}, True),
        (rules(**BY_LABEL), {}, False),
        (rules(**BY_LABEL), None, None),
        (rules(verbs=["all"]), {}, False),  # not understood: it allows nothing
    ],
)
def test_the_policies_are_read_as_the_agent_reads_them(
    spec: dict[str, Any], labels: dict[str, str] | None, answer: bool | None
):
    assert judge({"one": spec}, backup(), labels).allowed is answer
