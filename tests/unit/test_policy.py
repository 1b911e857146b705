"""Who may back up what to where: what a rule allows, and that whatever is not understood allows nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.support.manifests import DROP, INVALID_RULES, VALID_RULES, policy, rule
from vmbackup.api.policy import Asked, Operation, allowed, parse_rules, unknown_domain
from vmbackup.errors import RefusedError

WEB = "5a9c4a3e-3d55-4c39-bd2c-5d9c6b1b51a1"
ASKED = Asked(Operation.BACKUP, "team-a", {"team": "a"}, "web-01", WEB, "node-a", "local")


def allows(*rules: dict[str, Any], asked: Asked = ASKED) -> bool:
    return allowed(parse_rules(policy("test", *rules)["spec"]), asked)


def selecting(**selector: Any) -> dict[str, Any]:
    return rule(namespaces=DROP, namespaceSelector=selector)


def requiring(operator: str, *values: str, key: str = "team") -> dict[str, Any]:
    with_values = {"values": list(values)} if values else {}
    return selecting(matchExpressions=[{"key": key, "operator": operator, **with_values}])


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"namespaces": ["team-b"]}, False),
        ({"namespaces": ["team-b", "team-?"]}, True),
        ({"namespaces": ["team"]}, False),
        ({"namespaces": ["eam-a"]}, False),
        ({"domains": ["web-01"]}, True),
        ({"domains": ["web"]}, False),
        ({"domains": ["web-*"]}, True),
        ({"domains": ["WEB-*"]}, False),
        ({"domains": ["db-*", "*-02"]}, False),
        ({"domains": [WEB]}, True),
        ({"domains": [WEB.upper()]}, True),
        ({"domains": [WEB.replace("5a9c", "5a9d")]}, False),
        ({"nodes": ["node-b"]}, False),
        ({"nodes": ["node-?"]}, True),
        ({"stores": ["other"]}, False),
        ({"stores": ["loc*"]}, True),
        ({"operations": ["Restore"]}, False),
        ({"operations": ["Restore", "Backup"]}, True),
    ],
    ids=repr,
)
def test_a_rule_allows_what_fits_all_of_its_parts(changes: dict[str, Any], fits: bool) -> None:
    assert allows(rule(**changes)) is fits


@pytest.mark.parametrize(
    ("chosen", "fits"),
    [
        (selecting(matchLabels={"team": "a"}), True),
        (selecting(matchLabels={"team": "a", "stage": "prod"}), False),
        (selecting(matchLabels={"team": ""}), False),
        (requiring("In", "b", "a"), True),
        (requiring("In", "b"), False),
        (requiring("In", "", key="stage"), False),
        (requiring("NotIn", "b"), True),
        (requiring("NotIn", "a"), False),
        (requiring("NotIn", "a", key="stage"), True),
        (requiring("Exists"), True),
        (requiring("Exists", key="stage"), False),
        (requiring("DoesNotExist"), False),
        (requiring("DoesNotExist", key="stage"), True),
    ],
    ids=repr,
)
def test_namespaces_are_selected_by_their_labels_as_everywhere_in_kubernetes(
    chosen: dict[str, Any], fits: bool
) -> None:
    assert allows(chosen) is fits


def test_rules_add_up_and_their_parts_do_not_mix() -> None:
    a, b = rule(domains=["web-01"], stores=["cold"]), rule(domains=["db"], stores=["local"])
    assert not allows(a, b)
    assert allows(a, b, rule(domains=["web-01"], stores=["local"]))


def test_a_policy_without_rules_allows_nothing() -> None:
    assert not allows()


@pytest.mark.parametrize("pattern", ["5*", "5a9c4a3e-*", "????????-????-????-????-????????????", "*1"])
def test_a_pattern_is_for_names_and_never_fits_a_uuid(pattern: str) -> None:
    assert not allows(rule(domains=[pattern]), asked=replace(ASKED, domain="db"))


def test_a_uuid_does_not_fit_a_domain_that_has_it_as_its_name() -> None:
    assert not allows(rule(domains=[WEB]), asked=replace(ASKED, domain=WEB, domain_uuid=WEB.replace("5", "6")))


@pytest.mark.parametrize("name", ["web[1]", "a*b", "new\nline", "-rf", "$(id)", "../x", "{}", "Büro", "x" * 255])
def test_any_name_of_a_domain_fits_itself_and_no_other(name: str) -> None:
    assert allows(rule(domains=["web[1]"]), asked=replace(ASKED, domain=name)) is (name == "web[1]")
    assert allows(rule(domains=["*"]), asked=replace(ASKED, domain=name))
    assert not allows(rule(domains=["web-*"]), asked=replace(ASKED, domain=name))


@pytest.mark.parametrize("pattern", ["5*", "?a9c*", "web-*"])
def test_who_names_a_uuid_cannot_tell_from_the_answer_whether_a_domain_of_others_has_it(pattern: str) -> None:
    name, uuid = unknown_domain(WEB)
    there = allows(rule(domains=[pattern]), asked=replace(ASKED, domain="others"))
    absent = allows(rule(domains=[pattern]), asked=replace(ASKED, domain=name, domain_uuid=uuid))
    assert (there, absent) == (False, False)


def test_a_domain_that_is_not_there_is_asked_for_by_what_it_was_called() -> None:
    assert unknown_domain("web-02") == ("web-02", "")
    assert unknown_domain(WEB) == ("", WEB)


@pytest.mark.parametrize(("changes", "named"), INVALID_RULES, ids=repr)
def test_what_is_not_understood_is_refused_by_name_of_its_field(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(RefusedError, match=r"spec\.rules\[1\]") as refused:
        allows(rule(), rule(**changes))
    assert named in str(refused.value)


@pytest.mark.parametrize("changes", VALID_RULES, ids=repr)
def test_what_the_api_server_takes_is_understood(changes: dict[str, Any]) -> None:
    assert parse_rules(policy("test", rule(**changes))["spec"])


@pytest.mark.parametrize("spec", [{}, {"rules": None}, {"rules": {}}, {"rules": ["all"]}, {"rules": [], "deny": []}])
def test_a_policy_of_another_form_is_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(RefusedError, match="spec"):
        parse_rules(spec)


def test_a_hostile_pattern_takes_no_time() -> None:
    assert not allows(rule(domains=["*a" * 127 + "b"]), asked=replace(ASKED, domain="a" * 255))
