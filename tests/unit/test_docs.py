"""What the documents name is there: links, files, commands; and the reference is that of the code."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import kubectl_vmbackup.cli
import vmbackup.cli
import vmbackup.version
from tests.model.mutants import MUTANTS
from tests.model.settings import SETTINGS
from vmbackup.api.backup import BackupSpec
from vmbackup.api.names import GROUP, VERSION
from vmbackup.protocol.guest_off import RULES_OFF
from vmbackup.protocol.guest_on import RULES_ON
from vmbackup.protocol.table import rows_of

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "operator" / "vmbackup"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]

_LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"```.*?```", re.DOTALL)
_MANIFEST = re.compile(r"\b(?:kubectl|helm)\b[^\n`|]*?\s((?:manifests|crds)(?:/[\w./-]*)?)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(document: Path):
    lost = [target for target in _links(document) if not _leads_somewhere(document, target)]
    assert lost == []


def _links(document: Path) -> Iterator[str]:
    for target in _LINK.findall(_CODE.sub("", document.read_text())):
        if not target.startswith(("http://", "https://", "mailto:")):
            yield target


def _leads_somewhere(document: Path, target: str) -> bool:
    path, _, anchor = target.partition("#")
    file = (document.parent / path).resolve() if path else document
    if not file.exists() or not file.is_relative_to(ROOT):
        return False
    return not anchor or (file.suffix == ".md" and anchor in _anchors(file))


def _anchors(document: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.+)$", _CODE.sub("", document.read_text()), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in titles]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in plain}


def test_every_manifest_that_a_command_names_is_there():
    named = {path for document in DOCUMENTS for path in _MANIFEST.findall(document.read_text())}
    assert {"manifests/samples/store.yaml", "manifests/"} <= named
    assert [path for path in sorted(named) if not (ROOT / path.rstrip(".")).exists()] == []


def test_every_path_of_a_test_that_a_document_names_is_there():
    named = {path for document in DOCUMENTS for path in re.findall(r"`(tests/[\w./-]+)`", document.read_text())}
    assert len(named) > 15
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_every_image_that_a_document_builds_is_of_this_version():
    built = {version for document in DOCUMENTS for version in re.findall(r"/vmbackup:([\d.]+)\b", document.read_text())}
    assert built == {vmbackup.version.__version__}


def test_every_make_target_that_is_named_is_there():
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for document in DOCUMENTS for name in re.findall(r"`make ([a-z0-9-]+)", document.read_text())}
    assert named
    assert named <= targets


@pytest.mark.parametrize(("program", "parser"), [("vmbackup", vmbackup.cli._parser()),
                                                 ("kubectl vmbackup", kubectl_vmbackup.cli._parser())])  # fmt: skip
def test_every_command_that_is_named_is_there(program: str, parser: object):
    known = set(re.findall(r"^    (\w+) ", parser.format_help(), re.MULTILINE))  # type: ignore[attr-defined]
    pattern = re.compile(rf"(?:`|^|\$ ){program} ([a-z]+)", re.MULTILINE)
    named = {word for document in DOCUMENTS for word in pattern.findall(document.read_text())}
    assert named
    assert named <= known


def test_every_vmbackup_that_a_document_shows_is_valid():
    """On its own, and within the ConfigMap of a CronJob."""
    shown = [each for document in DOCUMENTS for each in _shown(document.read_text()) if each.get("kind") == "VMBackup"]
    assert len(shown) >= 3
    for each in shown:
        assert each["apiVersion"] == f"{GROUP}/{VERSION}"
        BackupSpec.parse(each["spec"])


def _shown(text: str) -> Iterator[dict[str, Any]]:
    """The objects of the YAML that names a VMBackup."""
    for block in re.findall(r"^(?:```yaml|.*<<EOF)\n(.*?)^(?:```|EOF)$", text, re.DOTALL | re.MULTILINE):
        if "kind: VMBackup\n" in block:
            objects: list[dict[str, Any]] = list(yaml.safe_load_all(block))
            held = [text for each in objects if each["kind"] == "ConfigMap" for text in each["data"].values()]
            yield from [*objects, *map(yaml.safe_load, held)]


def test_the_benchmarks_count_the_settings_and_mutants_of_the_model():
    text = " ".join((ROOT / "docs" / "benchmarks.md").read_text().split())
    assert f"quick settings in `make test` ({len(SETTINGS)} of them, {len(MUTANTS)} mutants" in text


def test_what_is_cited_of_the_protocol_is_in_it():
    protocol = (ROOT / "docs" / "protocol.md").read_text()
    rows = set(re.findall(r"^\| (V\d+) \|", protocol, re.MULTILINE)) | set(re.findall(r"\*\*(R\d)", protocol))
    cited = {each for document in DOCUMENTS for each in re.findall(r"\b[VR]\d{1,2}\b", document.read_text())}
    assert cited == rows
    assert re.findall(r"^\| (\d+) \|", protocol, re.MULTILINE) == [str(number) for number in range(1, 26)]


def test_the_reference_is_fresh():
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stderr}: run `make docs`, and commit docs/reference.md"


def test_the_architecture_describes_every_folder_of_the_package_and_no_other():
    described = re.findall(r"^### `(operator/vmbackup/\w+)/`$", ARCHITECTURE.read_text(), re.MULTILINE)
    assert sorted(described) == sorted(str(each.parent.relative_to(ROOT)) for each in PACKAGE.glob("*/__init__.py"))


def test_the_architecture_describes_every_folder_within_a_folder_of_the_package():
    text = ARCHITECTURE.read_text()
    inner = {each.parent for each in PACKAGE.glob("*/*/__init__.py")}
    section = {folder: text[text.index(f"### `{folder.parent.relative_to(ROOT)}/`") :] for folder in inner}
    assert len(inner) > 5
    missing = [str(folder) for folder in inner if f"`{folder.name}/`" not in section[folder].split("\n### ")[0]]
    assert sorted(missing) == []


def test_every_path_that_the_architecture_names_is_there():
    named = set(re.findall(r"`((?:operator|manifests|crds|tests|docs)/[\w./-]*)`", ARCHITECTURE.read_text()))
    assert len(named) > 30
    assert sorted(path for path in named if not (ROOT / path).exists()) == []


def test_the_decision_table_has_the_order_of_the_rules():
    """Each rule has a row, and they stand in docs/protocol.md in the order in which decide() asks them."""
    text = (ROOT / "docs" / "protocol.md").read_text()
    section = text[text.index("<!-- decision table: begin -->") : text.index("<!-- decision table: end -->")]
    cells = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith(("| off", "| on"))]
    expected = [("off", row.when) for row in rows_of(RULES_OFF)] + [("on", row.when) for row in rows_of(RULES_ON)]
    assert [(guest, when) for guest, when, *_ in cells] == expected


def test_what_the_architecture_says_to_look_for_is_in_a_file_that_it_names():
    table = ARCHITECTURE.read_text().partition("## Where is it decided?")[2]
    rows = [re.findall(r"`([^`]+)`", row) for row in table.splitlines() if row.startswith("| ")]
    for row in filter(None, rows):
        files = [word for word in row if "/" in word]
        assert len(files) <= 3, "a reader is to open three files at most"
        text = "".join((ROOT / file).read_text() for file in files)
        assert [word for word in row if word not in files and word.rpartition(".")[2] not in text] == []


def test_the_messages_that_operations_quotes_are_those_of_the_code():
    rows = re.findall(r"^\| `\w+`: [^|]*?\"([^\"|]+)\"", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    advice = (PACKAGE / "protocol" / "advice.py").read_text()
    assert len(rows) >= 2
    assert [quoted for quoted in rows if quoted not in advice] == []
