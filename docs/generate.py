"""Write docs/reference.md from what it is about: the CRDs, the command lines, the metrics; and the decision table.

python docs/generate.py [--check]    --check: only say whether it is fresh, by the exit code
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.core import Metric

# Both would come into the text as defaults: the name of this machine, and what its environment says.
socket.gethostname = lambda: "the name of the host"
for variable in [name for name in os.environ if name.startswith("VMBACKUP_")]:
    del os.environ[variable]

import kubectl_vmbackup.cli  # noqa: E402
import vmbackup.cli  # noqa: E402
from vmbackup.api.names import CANCEL_ANNOTATION, FINALIZER, RETRY_ANNOTATION  # noqa: E402
from vmbackup.protocol.decide import decide  # noqa: E402
from vmbackup.protocol.guest_off import RULES_OFF  # noqa: E402
from vmbackup.protocol.guest_on import RULES_ON  # noqa: E402
from vmbackup.protocol.table import rows_of  # noqa: E402
from vmbackup.telemetry.metrics import Metrics  # noqa: E402
from vmbackup.version import __version__  # noqa: E402

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs" / "reference.md"
PROTOCOL = ROOT / "docs" / "protocol.md"
_TABLE = re.compile(r"(?<=<!-- decision table: begin -->\n).*?(?=<!-- decision table: end -->)", re.DOTALL)

_HEAD = """\
# Reference

Made by `make docs` from the CRDs, the command lines and the metrics: change those, not this.
"""
_IMMUTABLE = re.compile(r"oldSelf\.(\w+)")
_ANNOTATIONS = (
    (
        RETRY_ANNOTATION,
        "any new value",
        "A VMBackup that gave up bringing its guest home tries again. status.lastHandledRetry "
        "shows the value that was acted on last.",
    ),
    (
        CANCEL_ANNOTATION,
        '"true"',
        "A VMBackup that is running gives up its copy, brings its guest home, and ends as Failed with the reason "
        "Cancelled. Too late once BackupComplete is True.",
    ),
)


def reference() -> str:
    """The whole page."""
    resources = [yaml.safe_load(path.read_text()) for path in sorted(ROOT.glob("crds/vmbackup*.yaml"))]
    sections = [
        *(_resource(crd) for crd in resources),
        _annotations(),
        _commands("vmbackup", vmbackup.cli._parser()),
        _commands("kubectl vmbackup", kubectl_vmbackup.cli._parser()),
        _metrics(),
    ]
    titles = [section.partition("\n")[0].removeprefix("## ") for section in sections]
    contents = "\n".join(f"- [{title}](#{_anchor(title)})" for title in titles)
    return "\n".join([_HEAD, contents, "", *sections])


def _anchor(title: str) -> str:
    return re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")


# -- custom resources


def _resource(crd: dict[str, Any]) -> str:
    spec, names = crd["spec"], crd["spec"]["names"]
    version = next(each for each in spec["versions"] if each["storage"])
    schema = version["schema"]["openAPIV3Schema"]
    short = ", ".join(f"`{name}`" for name in names["shortNames"])
    about = (
        f"`{spec['group']}/{version['name']}`, {spec['scope'].lower()}; short name {short}; "
        f"category `{names['categories'][0]}`."
    )
    parts = [f"## {names['kind']}\n", schema["description"] + "\n", about + "\n"]
    if columns := version.get("additionalPrinterColumns"):
        parts.append(_columns(columns))
    for part in ("spec", "status"):
        if found := schema["properties"].get(part):
            fixed = set(_IMMUTABLE.findall(str(found.get("x-kubernetes-validations", ""))))
            rows = [(f"`{path}`", *rest) for path, *rest in _fields(found, part, fixed)]
            heads = ("Field", "Type", "Default", "Meaning") if part == "spec" else ("Field", "Type", "Meaning")
            width = len(heads)
            rows = [row if width == 4 else (row[0], row[1], row[3]) for row in rows]
            parts += [f"### {names['kind']}.{part}\n", found["description"] + "\n", _table(heads, rows)]
    return "\n".join(parts)


def _columns(columns: Sequence[dict[str, Any]]) -> str:
    shown = ", ".join(column["name"] for column in columns if not column.get("priority"))
    wide = ", ".join(column["name"] for column in columns if column.get("priority"))
    return f"`kubectl get` shows {shown}" + (f"; with `-o wide` also {wide}" if wide else "") + ".\n"


def _fields(schema: dict[str, Any], path: str, fixed: set[str]) -> Iterator[tuple[str, str, str, str]]:
    """Path, type, default and meaning of each field below."""
    required = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        notes = [word for word, so in (("Required.", name in required), ("Immutable.", name in fixed)) if so]
        default = "" if isinstance(field.get("default"), dict) else _word(field.get("default"))
        yield f"{path}.{name}", _type(field), default, " ".join([*notes, field.get("description", "")])
        below = fixed if path != "spec" else set()
        yield from _fields(field, f"{path}.{name}", below)
        if items := field.get("items"):
            yield from _fields(items, f"{path}.{name}[]", set())


def _type(field: dict[str, Any]) -> str:
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if field.get("x-kubernetes-int-or-string"):
        return "quantity"
    kind = field.get("format") if field.get("format") == "date-time" else field.get("type", "")
    if kind == "array":
        return f"list of {_type(field['items'])}"
    low, high = field.get("minimum"), field.get("maximum")
    if high is not None:
        return f"{kind}, {low}–{high}"
    return f"{kind}, {low} or more" if low else str(kind)


def _word(value: object) -> str:
    return "" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _annotations() -> str:
    rows = [(f"`{name}`", value, meaning) for name, value, meaning in _ANNOTATIONS]
    held = (
        f"The finalizer `{FINALIZER}` is the agent's promise that the guest is home before the object goes; only "
        "`kubectl vmbackup forget` may take it away by hand."
    )
    return "\n".join(["## Annotations\n", _table(("Annotation", "Value", "Meaning"), rows), held + "\n"])


# -- command lines


def _commands(program: str, parser: argparse.ArgumentParser) -> str:
    subparsers = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    rows = {name: [(_flag(action), _help(action)) for action in command._actions if action.dest != "help"]
            for name, command in subparsers.choices.items()}  # fmt: skip
    common = [row for row in next(iter(rows.values())) if all(row in each for each in rows.values())]
    parts = [f"## Command line: {program}\n", f"{parser.description}\n", _epilog(parser)]
    if common:
        parts += ["Flags of every command:\n", _table(("Flag", "Meaning"), common)]
    for name, command in subparsers.choices.items():
        own = [row for row in rows[name] if row not in common]
        parts += [f"### {program} {name}\n", f"{command.description}\n", _table(("Flag", "Meaning"), own)]
        if command.epilog and command.epilog != parser.epilog:
            parts.append(_epilog(command))
    return "\n".join(parts)


def _flag(action: argparse.Action) -> str:
    value = action.metavar if isinstance(action.metavar, str) else ""
    value = f"[{value}]" if value and action.nargs == "?" else value
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    return f"{names} {value}".strip() if action.nargs != 0 else names


def _help(action: argparse.Action) -> str:
    text = (action.help or "").replace("%%", "%")
    return re.sub(r"\[(VMBACKUP_\w+)", r"[`\1`", text)


def _epilog(parser: argparse.ArgumentParser) -> str:
    text = (parser.epilog or "").rstrip()
    return f"```\n{text}\n```\n" if "\n" in text else f"{text}\n"


# -- metrics


def _metrics() -> str:
    rows = []
    for family in Metrics().registry.collect():
        if family.name.startswith("vmbackup_"):
            suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
            shown = ", ".join(f"`{label}`" + _values(family, label) for label in _labels(family))
            rows.append((f"`{family.name}{suffix}`", family.type, shown, family.documentation))
    about = "Of the agent, at `/metrics` of its `--metrics-port`; Prometheus adds the label `node` when it scrapes.\n"
    return "\n".join(["## Metrics\n", about, _table(("Metric", "Type", "Labels", "Meaning"), rows)])


def _labels(family: Metric) -> list[str]:
    declared: Sequence[str] = getattr(family, "_labelnames", ())  # of those that have no sample yet
    return sorted({*declared, *(label for sample in family.samples for label in sample.labels)} - {"le"})


def _values(family: Metric, label: str) -> str:
    """The values that are there from the start; but not this version's."""
    values = sorted({sample.labels[label] for sample in family.samples if label in sample.labels} - {__version__})
    return f" ({', '.join(values)})" if values else ""


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def protocol() -> str:
    """docs/protocol.md with the rows of the rules, in the order in which they are asked."""
    lines = ["| guest | state | action | why |", "|---|---|---|---|"]
    for guest, rules in (("any", (decide,)), ("off", RULES_OFF), ("on", RULES_ON)):
        lines += [f"| {guest} | {row.when} | {row.do} | {row.why} |" for row in rows_of(rules)]
    table = "".join(f"{line}\n" for line in lines)
    return _TABLE.sub(lambda _: table, PROTOCOL.read_text())


def main() -> int:
    """Write both, or with --check say whether they are as they would be written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if one is not fresh")
    check = parser.parse_args().check
    stale = False
    for path, text in ((REFERENCE, reference()), (PROTOCOL, protocol())):
        if not check:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            stale = True
            print(f"{path.relative_to(ROOT)} is not fresh: make docs", file=sys.stderr)
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
