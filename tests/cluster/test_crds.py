"""The resources on a real API server: what it refuses and with which words, what it fills in, what it shows."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.client import ApiException, CustomObjectsApi

from sandbox.kube import KubeApi, KubectlError
from tests.support.manifests import (
    IMMUTABLE,
    INVALID_BACKUPS,
    INVALID_RULES,
    INVALID_STORES,
    LIVE_PAUSE,
    MUTABLE,
    VALID_BACKUPS,
    VALID_PATHS,
    VALID_RULES,
    Invalid,
    backup,
    policy,
    rule,
    store,
)
from vmbackup.api.backup import IMMUTABLE_FIELDS, BackupSpec
from vmbackup.api.names import BACKUPS, GROUP, POLICIES, STORES, VERSION
from vmbackup.api.status import DiskReport, DiskState, Report
from vmbackup.cluster.client import load_client
from vmbackup.cluster.status import CONDITION_TYPES, render

CRDS = Path(__file__).parents[2] / "crds"
NAMESPACE = "crds"
STRICT = {"field_validation": "Strict"}  # what kubectl asks for
DRY = {"dry_run": "All", **STRICT}


@pytest.fixture(scope="module")
def api(kube: KubeApi) -> CustomObjectsApi:
    kube.kubectl("create", "namespace", NAMESPACE)
    return CustomObjectsApi(load_client(str(kube.kubeconfig)))


def create_backup(api: CustomObjectsApi, body: dict[str, Any], **options: Any) -> Any:
    return api.create_namespaced_custom_object(GROUP, VERSION, NAMESPACE, BACKUPS, body, **options)


def create_store(api: CustomObjectsApi, body: dict[str, Any]) -> Any:
    return api.create_cluster_custom_object(GROUP, VERSION, STORES, body, **DRY)


def create_policy(api: CustomObjectsApi, *rules: dict[str, Any]) -> Any:
    return api.create_cluster_custom_object(GROUP, VERSION, POLICIES, policy("table", *rules), **DRY)


def refusal(error: ApiException) -> str:
    return json.loads(error.body)["message"]


@pytest.fixture
def two_disks(api: CustomObjectsApi) -> Iterator[str]:
    """The name of a VMBackup of the disks vda and vdb."""
    created = create_backup(api, backup("two-disks", NAMESPACE, disks=["vda", "vdb"]))
    name: str = created["metadata"]["name"]
    yield name
    api.delete_namespaced_custom_object(GROUP, VERSION, NAMESPACE, BACKUPS, name)


def patch_spec(api: CustomObjectsApi, name: str, field: str, value: Any) -> Any:
    body = {"spec": {field: value}}
    return api.patch_namespaced_custom_object(
        GROUP, VERSION, NAMESPACE, BACKUPS, name, body, _content_type="application/merge-patch+json", **DRY
    )


# What is refused, what is taken


@pytest.mark.parametrize("invalid", INVALID_BACKUPS, ids=str)
def test_an_invalid_backup_is_refused_with_its_field_and_cure(api: CustomObjectsApi, invalid: Invalid) -> None:
    body = backup("invalid", NAMESPACE, **{invalid.field.removeprefix("spec."): invalid.value})
    with pytest.raises(ApiException) as refused:
        create_backup(api, body, **DRY)
    assert invalid.field in refusal(refused.value)
    assert (invalid.schema_says or invalid.cure) in refusal(refused.value)


def test_a_guest_that_is_never_suspended_is_not_paused_for_a_commit_either(api: CustomObjectsApi) -> None:
    with pytest.raises(ApiException) as refused:
        create_backup(api, backup("live-pause", NAMESPACE, **LIVE_PAUSE), **DRY)
    assert "spec.commit.stallPolicy" in refusal(refused.value)
    assert "must be Hold or Throttle, because switchPolicy Live never suspends the guest" in refusal(refused.value)


@pytest.mark.parametrize("invalid", INVALID_STORES, ids=str)
def test_an_invalid_store_is_refused_with_its_field_and_cure(api: CustomObjectsApi, invalid: Invalid) -> None:
    with pytest.raises(ApiException) as refused:
        create_store(api, store("invalid", **invalid.value))
    assert invalid.field in refusal(refused.value)
    assert (invalid.schema_says or invalid.cure) in refusal(refused.value)


@pytest.mark.parametrize("changes", VALID_BACKUPS, ids=lambda changes: ",".join(changes) or "as is")
def test_a_valid_backup_is_taken(api: CustomObjectsApi, changes: dict[str, Any]) -> None:
    assert create_backup(api, backup("valid", NAMESPACE, **changes), **DRY)["spec"]["nodeName"]


@pytest.mark.parametrize("path", VALID_PATHS)
def test_a_valid_store_is_taken(api: CustomObjectsApi, path: str) -> None:
    assert create_store(api, store("valid", directory={"path": path}))["spec"]["directory"]["path"] == path


@pytest.mark.parametrize(("changes", "named"), INVALID_RULES, ids=repr)
def test_an_invalid_policy_is_refused_by_name_of_its_field(
    api: CustomObjectsApi, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ApiException) as refused:
        create_policy(api, rule(), rule(**changes))
    assert "spec.rules[1]" in refusal(refused.value)
    assert named in refusal(refused.value)


@pytest.mark.parametrize("changes", VALID_RULES, ids=repr)
def test_a_valid_policy_is_taken_and_allows_backups_if_it_does_not_say_what(
    api: CustomObjectsApi, changes: dict[str, Any]
) -> None:
    (made,) = create_policy(api, rule(**changes))["spec"]["rules"]
    assert made["operations"] == ["Backup"]


def test_a_policy_without_rules_is_taken(api: CustomObjectsApi) -> None:
    assert create_policy(api)["spec"]["rules"] == []


def test_a_name_that_no_folder_could_have_is_refused(api: CustomObjectsApi) -> None:
    assert create_backup(api, backup("n" * 200, NAMESPACE), **DRY)
    with pytest.raises(ApiException) as refused:
        create_backup(api, backup("n" * 201, NAMESPACE), **DRY)
    assert "metadata.name may have at most 200 characters" in refusal(refused.value)


def test_kubectl_shows_the_user_what_is_wrong(kube: KubeApi) -> None:
    with pytest.raises(KubectlError) as refused:
        kube.apply(backup("wrong", **{"copy.bandwidth": "fast", "domain": "a/b"}))
    assert 'spec.copy.bandwidth: Invalid value: "fast": must be bytes per second' in refused.value.stderr
    assert "spec.domain: Invalid value" in refused.value.stderr


# What may be changed


@pytest.mark.parametrize(("field", "value"), IMMUTABLE, ids=lambda value: json.dumps(value))
def test_what_says_which_backup_it_is_cannot_be_changed(
    api: CustomObjectsApi, two_disks: str, field: str, value: Any
) -> None:
    with pytest.raises(ApiException) as refused:
        patch_spec(api, two_disks, field, value)
    assert f"{field} cannot be changed" in refusal(refused.value)
    assert "create another VMBackup" in refusal(refused.value)


def test_disks_cannot_be_added_later(api: CustomObjectsApi) -> None:
    create_backup(api, backup("all-disks", NAMESPACE))
    with pytest.raises(ApiException) as refused:
        patch_spec(api, "all-disks", "disks", ["vda"])
    assert "disks cannot be changed" in refusal(refused.value)


@pytest.mark.parametrize(("field", "value"), MUTABLE, ids=lambda value: json.dumps(value))
def test_the_knobs_may_be_changed(api: CustomObjectsApi, two_disks: str, field: str, value: Any) -> None:
    changed = patch_spec(api, two_disks, field, value)["spec"][field]
    assert changed == ({**changed, **value} if isinstance(value, dict) else value)


def test_every_field_is_either_in_the_one_table_or_in_the_other() -> None:
    fields = set(schema("vmbackups")["properties"]["spec"]["properties"])
    assert {field for field, _ in IMMUTABLE} == set(IMMUTABLE_FIELDS)
    assert {field for field, _ in IMMUTABLE + MUTABLE} == fields


# What the server fills in


def test_defaults_are_filled_in_group_by_group(api: CustomObjectsApi) -> None:
    assert create_backup(api, backup("defaults", NAMESPACE), **DRY)["spec"] == {
        "nodeName": "node-a",
        "domain": "web-01",
        "storeRef": {"name": "local"},
        "snapshot": {"quiesce": "Try", "freezeTimeoutSeconds": 10},
        "copy": {"deadlineSeconds": 14400},
        "commit": {
            "deadlineSeconds": 3600,
            "backoffLimit": 6,
            "stallPolicy": "Hold",
            "stallPauseSeconds": 10,
            "offline": False,
        },
        "switchPolicy": "Guarded",
        "deletionPolicy": "Retain",
    }


def test_the_servers_defaults_are_those_of_the_parser(api: CustomObjectsApi) -> None:
    manifest = backup("defaults", NAMESPACE)
    assert BackupSpec.parse(create_backup(api, manifest, **DRY)["spec"]) == BackupSpec.parse(manifest["spec"])


def test_a_new_backup_is_pending_before_any_agent_has_seen_it(api: CustomObjectsApi) -> None:
    created = create_backup(api, backup("new", NAMESPACE))
    assert created["status"]["observedGeneration"] == -1
    assert created["status"]["phase"] == "Pending"
    (ready,) = created["status"]["conditions"]
    assert (ready["type"], ready["status"], ready["reason"]) == ("Ready", "Unknown", "Pending")
    assert ready["lastTransitionTime"] == "1970-01-01T00:00:00Z"


def test_nobody_but_a_writer_of_the_status_can_set_it(api: CustomObjectsApi) -> None:
    forged = backup("forged", NAMESPACE) | {"status": {"phase": "Pivoted"}}
    assert create_backup(api, forged)["status"]["phase"] == "Pending"


def test_applying_twice_changes_nothing(kube: KubeApi) -> None:
    manifest = json.dumps(backup("applied", NAMESPACE, disks=["vda"], **{"copy.bandwidth": "200Mi"}))
    apply = ("apply", "--server-side", "--field-manager=flux", "-f", "-")
    kube.kubectl(*apply, stdin=manifest)
    before = kube.get("vmb", "applied", "-n", NAMESPACE)
    kube.kubectl(*apply, stdin=manifest)
    after = kube.get("vmb", "applied", "-n", NAMESPACE)
    # The first write after the creation, by anybody, stores the status that was only shown until then.
    before["metadata"].pop("resourceVersion")
    stored = after["metadata"].pop("resourceVersion")
    assert after == before
    kube.kubectl(*apply, stdin=manifest)
    assert kube.get("vmb", "applied", "-n", NAMESPACE)["metadata"]["resourceVersion"] == stored
    assert kube.kubectl("diff", "--server-side", "--field-manager=flux", "-f", "-", stdin=manifest) == ""


# What it shows


def test_an_agent_can_select_its_own_on_the_server(kube: KubeApi, api: CustomObjectsApi) -> None:
    create_backup(api, backup("elsewhere", NAMESPACE, nodeName="crds-node-b"))
    select = ("get", "vmb", "-n", NAMESPACE, "-o", "name")
    assert kube.kubectl(*select, "--field-selector=spec.nodeName=crds-node-b").split() == [
        "vmbackup.vmbackup.dev/elsewhere"
    ]
    assert kube.kubectl(*select, "--field-selector=spec.nodeName=crds-node-b,status.phase=Failed") == ""


def test_the_columns_are_those_that_people_look_for(kube: KubeApi, api: CustomObjectsApi) -> None:
    create_backup(api, backup("columns", NAMESPACE))
    get = ("get", "vmb", "columns", "-n", NAMESPACE)
    titles = "NAME DOMAIN NODE PHASE PROGRESS READY REASON AGE"
    assert " ".join(kube.kubectl(*get).splitlines()[0].split()) == titles
    wide = f"{titles} STORE SNAPSHOT COMPLETE CHAIN CLEAN MERGED BYTES MESSAGE"
    assert " ".join(kube.kubectl(*get, "-o", "wide").splitlines()[0].split()) == wide
    row = kube.kubectl(*get).splitlines()[1].split()
    assert row[:6] == ["columns", "web-01", "node-a", "Pending", "Unknown", "Pending"]


def test_all_kinds_have_a_short_name_and_the_category(kube: KubeApi) -> None:
    rows = kube.kubectl("api-resources", f"--api-group={GROUP}", "-o", "wide", "--no-headers").splitlines()
    shown = {row.split()[0]: (row.split()[1], row.split()[-1]) for row in rows}
    short = {"vmbackups": "vmb", "vmbackupstores": "vmbs", "vmbackuppolicies": "vmbp"}
    assert shown == {plural: (name, "vm-backup") for plural, name in short.items()}


def test_explain_reads_well(kube: KubeApi) -> None:
    deadline = time.monotonic() + 20  # the server publishes a new CRD's documentation some seconds later
    while True:
        try:
            text = kube.kubectl("explain", "vmbackup.spec.snapshot.quiesce")
        except KubectlError:
            assert time.monotonic() < deadline
            time.sleep(0.2)
            continue
        if text or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    words = " ".join(text.split())
    assert "Whether the guest agent freezes the guest's file systems" in words
    assert "Try: freeze if the agent can, otherwise continue without it" in words


# The files


def schema(plural: str) -> dict[str, Any]:
    crd = yaml.safe_load((CRDS / f"{plural}.yaml").read_text())
    return crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def fields(node: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every field below a node of a schema, with its path."""
    for name, child in node.get("properties", {}).items():
        yield f"{path}.{name}", child
        yield from fields(child, f"{path}.{name}")
    if "items" in node:
        yield f"{path}[]", node["items"]
        yield from fields(node["items"], f"{path}[]")


@pytest.mark.parametrize("plural", ["vmbackups", "vmbackupstores", "vmbackuppolicies"])
def test_every_field_is_described(plural: str) -> None:
    # metadata is the server's own: a CRD may not describe it.
    bare = [path for path, node in fields(schema(plural), plural) if not node.get("description")]
    assert bare == [f"{plural}.metadata"]


@pytest.mark.parametrize("plural", ["vmbackups", "vmbackupstores", "vmbackuppolicies"])
def test_every_list_says_how_it_is_merged(plural: str) -> None:
    lists = {path: node for path, node in fields(schema(plural), plural) if node.get("type") == "array"}
    assert [path for path, node in lists.items() if "x-kubernetes-list-type" not in node] == []


def test_every_field_that_is_rendered_is_in_the_schema_and_the_other_way_round() -> None:
    known = DiskReport("vda", DiskState.HOME, *("x",) * 4, digest="x", commit_seconds=1.0, last_error="x")
    times = dict.fromkeys(("snapshot_time", "start_time", "completion_time", "last_progress_time"), 0.0)
    words = dict.fromkeys(("domain_uuid", "location", "last_handled_retry"), "x")
    report = Report(quiesced=False, disks=(known,), **times, **words)
    status = render(report, generation=1, previous={}, now=0.0)
    described = dict(fields(schema("vmbackups")["properties"]["status"], "status"))
    rendered = {
        *(f"status.{name}" for name in status),
        *(f"status.progress.{name}" for name in status["progress"]),
        *(f"status.disks[].{name}" for name in status["disks"][0]),
        *(f"status.conditions[].{name}" for name in status["conditions"][0]),
    }
    assert {path for path in described if not path.endswith("[]")} == rendered
    assert all(kind in described["status.conditions"]["description"] for kind in CONDITION_TYPES)
