"""What Flux and Argo CD make of a VMBackup at every moment: said by kstatus itself, and by Argo CD's Lua."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from sandbox.kube import KubeApi
from tests.gitops.stored import CASES, TESTDATA, Case, as_testdata, stored
from tests.support.judge import HEALTH_CHECK, Verdict, argo_cd, kstatus
from tests.support.manifests import store

Found = dict[str, dict[str, Any]]
CONFIG_MAP = HEALTH_CHECK.parents[3] / "argocd-cm.yaml"


@pytest.fixture(scope="module")
def found(kube: KubeApi) -> Found:
    """The VMBackup of each case, by its name, as the API server has it."""
    return {case.name: each for case, each in stored(kube)}


@pytest.fixture(scope="module")
def by_kstatus(found: Found) -> dict[str, Verdict]:
    return dict(zip(found, kstatus(*found.values()), strict=True))


@pytest.fixture(scope="module")
def by_argo_cd(found: Found) -> dict[str, Verdict]:
    return dict(zip(found, argo_cd(*found.values()), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kstatus_says_whether_it_is_done(by_kstatus: dict[str, Verdict], case: Case) -> None:
    assert by_kstatus[case.name].status == case.verdict, by_kstatus[case.name]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_argo_cd_says_whether_it_is_healthy(by_argo_cd: dict[str, Verdict], case: Case) -> None:
    assert by_argo_cd[case.name].status == case.health, by_argo_cd[case.name]


def test_flux_shows_why_a_backup_failed(by_kstatus: dict[str, Verdict]) -> None:
    assert by_kstatus["shipping failed"].message == "disk vda: the store went away"


def test_without_our_check_argo_cd_knows_nothing_of_it_and_kstatus_of_a_store_says_it_is_there() -> None:
    assert kstatus(store("local", directory={"path": "/store"})) == [Verdict("Current", "Resource is current")]


# The files for Argo CD, in the form of its own repository


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_test_data_is_what_the_agent_and_the_api_server_make(found: Found, case: Case) -> None:
    written = (TESTDATA / f"{case.slug}.yaml").read_text()
    assert written == as_testdata(found[case.name]), "write them again: python -m tests.gitops.stored"


def test_every_test_of_the_health_check_passes_and_there_is_one_for_each_moment() -> None:
    tests = yaml.safe_load(HEALTH_CHECK.with_name("health_test.yaml").read_text())["tests"]
    objects = [yaml.safe_load((HEALTH_CHECK.parent / each["inputPath"]).read_text()) for each in tests]
    said = argo_cd(*objects)
    assert [{"status": each.status, "message": each.message} for each in said] == [
        each["healthStatus"] for each in tests
    ]
    assert {each["inputPath"] for each in tests} == {f"testdata/{case.slug}.yaml" for case in CASES}


def test_the_config_map_holds_this_very_check() -> None:
    data = yaml.safe_load(CONFIG_MAP.read_text())["data"]
    assert data == {"resource.customizations.health.vmbackup.dev_VMBackup": HEALTH_CHECK.read_text()}


@pytest.mark.parametrize("status", [{}, {"conditions": []}, {"conditions": [{"type": "Stalled", "status": "False"}]}])
def test_the_check_takes_whatever_an_older_agent_leaves_out(status: dict[str, Any]) -> None:
    made = {"metadata": {"generation": 1}, "spec": {"nodeName": "a"}, "status": {**status, "observedGeneration": 1}}
    said = argo_cd({"apiVersion": "vmbackup.dev/v1alpha1", "kind": "VMBackup", **made})
    assert said == [Verdict("Progressing", "")]


def test_the_check_needs_none_of_the_libraries_that_argo_cd_leaves_out() -> None:
    assert not re.search(r"\b(string|os|io|math|debug)\.|\brequire\b|:\w+\(", HEALTH_CHECK.read_text())
