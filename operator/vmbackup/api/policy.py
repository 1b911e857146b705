"""Who may back up what to where: the rules of a VMBackupPolicy, and whether they allow a backup. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any
from uuid import UUID

from vmbackup.api.fields import Fields

# The same as in crds/, rule by rule. In a pattern, * stands for any text, also none, and ? for one character.
_NAMES = re.compile(r"[-a-z0-9.*?]{1,253}")
_DOMAINS = re.compile(r"[^/\x00-\x1f\x7f]{1,255}")
_WORD = re.compile(r"[A-Za-z]{1,63}")
_LABEL = re.compile(r"(?s).{0,317}")  # what cannot be a label fits none


class Operation(StrEnum):
    """What a rule allows. A rule for an operation that this version does not know does not concern it."""

    BACKUP = "Backup"


@dataclass(frozen=True)
class Asked:
    """What somebody wants to do.

    `labels` are those of the namespace. `domain` and `domain_uuid` are those that libvirt knows, not what was written
    in a spec; each is empty where there is none.
    """

    operation: Operation
    namespace: str
    labels: Mapping[str, str]
    domain: str
    domain_uuid: str
    node: str
    store: str


class _Operator(StrEnum):
    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"


@dataclass(frozen=True)
class _Requirement:
    """One requirement of a label selector (meta/v1, LabelSelectorRequirement)."""

    key: str
    operator: _Operator
    values: tuple[str, ...] = ()

    def holds(self, labels: Mapping[str, str]) -> bool:
        there, value = self.key in labels, labels.get(self.key)
        return {
            _Operator.IN: there and value in self.values,
            _Operator.NOT_IN: not there or value not in self.values,
            _Operator.EXISTS: there,
            _Operator.DOES_NOT_EXIST: not there,
        }[self.operator]


@dataclass(frozen=True)
class Rule:
    """Allows a backup that matches all of its parts. Exactly one of `namespaces` and `selector` is set."""

    operations: tuple[str, ...]
    namespaces: tuple[str, ...]
    selector: tuple[_Requirement, ...]
    domains: tuple[str, ...]
    nodes: tuple[str, ...]
    stores: tuple[str, ...]

    def allows(self, asked: Asked) -> bool:
        """Whether this rule allows it."""
        return (
            asked.operation in self.operations
            and (_any(self.namespaces, asked.namespace) or self._selects(asked.labels))
            and any(_fits_domain(pattern, asked) for pattern in self.domains)
            and _any(self.nodes, asked.node)
            and _any(self.stores, asked.store)
        )

    def _selects(self, labels: Mapping[str, str]) -> bool:
        return bool(self.selector) and all(requirement.holds(labels) for requirement in self.selector)


def unknown_domain(text: str) -> tuple[str, str]:
    """Name and UUID, for `Asked`, of a domain that a spec names so and libvirt does not know.

    A UUID is never taken as a name: otherwise the answer would reveal whether the domain of another tenant has it.
    """
    try:
        return "", str(UUID(text))
    except ValueError:
        return text, ""


def allowed(rules: Iterable[Rule], asked: Asked) -> bool:
    """Whether any of these rules allows it."""
    return any(rule.allows(asked) for rule in rules)


def parse_rules(spec: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The rules of a VMBackupPolicy. Raises RefusedError naming the field and the cure.

    An unknown field, also one of a later version, is an error: ignoring it could allow more than was intended.
    """
    top = Fields("spec", spec)
    rules = tuple(_rule(fields) for fields in top.mappings("rules", "must be a list of rules, [] to allow nothing"))
    top.refuse_unknown()
    return rules


def _rule(fields: Fields) -> Rule:
    selected = fields.has("namespaceSelector")
    if selected == fields.has("namespaces"):
        raise fields.bad("namespaces", "set exactly one of namespaces and namespaceSelector")
    everything = "must contain at least one pattern, such as '*'"
    operations = ("Backup",)
    if fields.has("operations"):
        operations = fields.strings("operations", _WORD, "must be operations such as [Backup]")
    rule = Rule(
        operations=operations,
        namespaces=() if selected else fields.strings("namespaces", _NAMES, everything),
        selector=_selector(fields.mapping("namespaceSelector")) if selected else (),
        domains=fields.strings("domains", _DOMAINS, everything),
        nodes=fields.strings("nodes", _NAMES, everything),
        stores=fields.strings("stores", _NAMES, everything),
    )
    fields.refuse_unknown()
    return rule


def _selector(fields: Fields) -> tuple[_Requirement, ...]:
    requirements: list[_Requirement] = []
    for key, value in fields.texts("matchLabels", _LABEL, "must be labels and their values").items():
        requirements.append(_Requirement(key, _Operator.IN, (value,)))
    if fields.has("matchExpressions"):
        for each in fields.mappings("matchExpressions", "must be a list of requirements"):
            operator = _Operator(each.string("operator", _OPERATORS, "must be In, NotIn, Exists or DoesNotExist"))
            with_values = operator in (_Operator.IN, _Operator.NOT_IN)
            values = each.strings("values", _LABEL, "must contain at least one value") if with_values else ()
            requirements.append(_Requirement(each.string("key", _LABEL, "must be a label"), operator, values))
            each.refuse_unknown()
    fields.refuse_unknown()
    if not requirements:
        raise fields.bad(
            "matchLabels", "set matchLabels or matchExpressions; for all namespaces set namespaces ['*'] instead"
        )
    return tuple(requirements)


_OPERATORS = re.compile("|".join(_Operator))


def _any(patterns: Iterable[str], name: str) -> bool:
    return any(_fits(pattern, name) for pattern in patterns)


def _fits(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern.replace("[", "[[]"))  # no classes of characters: a domain may be named web[1]


def _fits_domain(pattern: str, asked: Asked) -> bool:
    """A UUID must match as a whole: otherwise the pattern a* would allow every domain whose UUID begins with a."""
    try:
        return str(UUID(pattern)) == asked.domain_uuid
    except ValueError:
        return _fits(pattern, asked.domain)
