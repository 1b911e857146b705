"""The alerts of manifests/components/monitoring: each fires when it should and only then, and has its runbook."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sandbox import binaries

ROOT = Path(__file__).parent.parent.parent
CASES: dict[str, Any] = yaml.load(Path(__file__).with_name("alerts.yaml").read_text(), yaml.BaseLoader)  # 0x60 is text
RUNBOOKS = ROOT / "docs" / "runbooks"
MONITORING = ROOT / "docs" / "monitoring.md"
RULES_FILE = ROOT / "manifests/components/monitoring/prometheusrule.yaml"
RULES: dict[str, Any] = yaml.safe_load(RULES_FILE.read_text())["spec"]
ALERTS: dict[str, dict[str, Any]] = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}
STATIC = ("summary", "runbook_url")
PROGRAMS = {  # and what knows their subcommands and options, where they have any
    "virsh": ["virsh"],
    "kubectl": [binaries.path("kubectl")],
    "vmbackup": [sys.executable, "-m", "vmbackup.cli"],
    "kubectl_vmbackup": [sys.executable, "-m", "kubectl_vmbackup"],
    "qemu-img": ["qemu-img"],
    **dict.fromkeys(("systemctl", "journalctl", "df", "dmesg", "curl")),
}
KUBECTL_OPTIONS = "--namespace --as"  # of every subcommand, so in the help of none
CLUSTER_WIDE = ("get node ", "get --raw", "label node ", "auth can-i")  # what needs no namespace
FIND_VMBACKUP = (
    "Its VMBackup: kubectl get vmb -A{{ with $labels.node }} --field-selector spec.nodeName={{ . }}{{ end }} "
    "| grep -w {{ $labels.domain }}"
)


def runbook(alert: str) -> str:
    """The name of its runbook: VMBackupAgentDown has agent-down.md."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", alert.removeprefix("VMBackup")).lower()


def test_each_alert_fires_when_it_should_and_only_then(tmp_path: Path) -> None:
    for case in CASES["tests"]:
        for check in case["alert_rule_test"]:
            fixed = {name: ALERTS[check["alertname"]]["annotations"][name] for name in STATIC}
            for expected in check["exp_alerts"]:
                expected["exp_annotations"] |= fixed
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(RULES))
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(CASES))
    done = subprocess.run(["promtool", "test", "rules", "alerts.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not(alert: str) -> None:
    checks = [
        (len(check["exp_alerts"]), len(subjects(case)))
        for case in CASES["tests"]
        for check in case["alert_rule_test"]
        if check["alertname"] == alert
    ]
    assert any(firing for firing, _ in checks)
    assert any(firing < shown for firing, shown in checks)


def subjects(case: dict[str, Any]) -> set[str]:
    """What the series of a case are about: guests, nodes or objects."""
    texts = [re.findall(r'\b(domain|name|node)="([^"]*)"', series["series"]) for series in case["input_series"]]
    return {dict(labels).get("domain") or dict(labels).get("name") or dict(labels)["node"] for labels in texts}


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_says_what_it_is_and_what_to_do(alert: str) -> None:
    rule = ALERTS[alert]
    notes = rule["annotations"]
    assert alert.startswith("VMBackup")
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(notes) == {"summary", "description", "runbook_url"}
    assert "{{" not in notes["summary"]
    assert notes["summary"].endswith(".")
    assert "{{" in notes["description"]
    assert notes["runbook_url"] == f"docs/runbooks/{runbook(alert)}.md"
    assert (ROOT / notes["runbook_url"]).exists()


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_about_a_guest_leads_to_its_vmbackup(alert: str) -> None:
    """The agent's metrics have only the domain; those of kube-state-metrics have namespace and name."""
    description = ALERTS[alert]["annotations"]["description"]
    if "$labels.domain" in description:
        assert description.endswith(FIND_VMBACKUP)
    elif "kube_vmbackup" in ALERTS[alert]["expr"]:
        assert "{{ $labels.namespace }}/{{ $labels.name }}" in description
    else:
        assert "$labels.node" in description


def test_runbook_url_can_be_a_link_to_a_copy_of_the_runbooks(tmp_path: Path) -> None:
    """As docs/monitoring.md shows it for kustomize; tests/cluster/test_chart.py has the chart."""
    shown = re.search(r"^```yaml\n(configMapGenerator:.*?)^```$", MONITORING.read_text(), re.DOTALL | re.MULTILINE)
    assert shown
    kustomization = {"resources": ["rules.yaml"], **yaml.safe_load(shown[1])}
    shutil.copyfile(RULES_FILE, tmp_path / "rules.yaml")
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    command = [binaries.path("kubectl"), "kustomize", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    [made] = list(yaml.safe_load_all(done.stdout))
    urls = {
        rule["alert"]: rule["annotations"]["runbook_url"] for group in made["spec"]["groups"] for rule in group["rules"]
    }
    base = "https://git.example/vmbackup/blob/main/docs"
    assert urls == {alert: f"{base}/runbooks/{runbook(alert)}.md" for alert in ALERTS}


def test_each_alert_has_its_runbook_and_each_runbook_its_alert() -> None:
    assert {file.stem for file in RUNBOOKS.glob("*.md")} == {runbook(alert) for alert in ALERTS}
    for alert in ALERTS:
        text = (RUNBOOKS / f"{runbook(alert)}.md").read_text()
        assert text.startswith(f"# {alert}\n\n## What it means\n")
        headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
        assert headings == [
            "What it means",
            "What is at risk",
            "What to look at",
            "What to do",
            "When to call for help",
        ]


def test_the_docs_list_and_count_all_alerts_and_patch_the_one_that_it_means() -> None:
    text = MONITORING.read_text()
    listed = re.findall(r"^\| \[(\w+)\]\(runbooks/([a-z-]+)\.md\) \| (\w+) \|", text, re.MULTILINE)
    assert listed == [(alert, runbook(alert), rule["labels"]["severity"]) for alert, rule in ALERTS.items()]
    group, rule = map(int, re.findall(r"path: /spec/groups/(\d)/rules/(\d)/expr", text)[0])
    assert RULES["groups"][group]["rules"][rule]["alert"] == "VMBackupNoRecentSuccess"
    assert f"{len(ALERTS)} alerts" in (ROOT / "README.md").read_text()


def commands() -> list[str]:
    """What runbooks tell people to type: each text in backquotes that begins with a program."""
    quoted = {code for file in RUNBOOKS.glob("*.md") for code in re.findall(r"`([^`]+)`", file.read_text())}
    return sorted(code for code in quoted if code.split()[0] in PROGRAMS or (" " in code and code.split()[0].isalpha()))


@pytest.mark.parametrize("command", commands())
def test_what_a_runbook_tells_people_to_type_exists(command: str) -> None:
    program, *words = subcommand(command).split()
    assert program in PROGRAMS
    if asks := PROGRAMS[program]:
        done = subprocess.run([*asks, words[0], "--help"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        options = [word.partition("=")[0] for word in words if word.startswith("--")]
        assert [option for option in options if option not in done.stdout + KUBECTL_OPTIONS] == []


def subcommand(command: str) -> str:
    """A command without its connection or namespace: the words after the program begin with the subcommand."""
    plain = command.replace("kubectl vmbackup", "kubectl_vmbackup")
    return re.sub(r"^(virsh -c|kubectl -n) \S+", lambda found: found[1].split()[0], plain)


@pytest.mark.parametrize("command", commands())
def test_what_a_runbook_tells_people_to_type_can_be_copied(command: str) -> None:
    """It names the namespace and the libvirt that it means, and works for any user who may do it."""
    if command.startswith("virsh ") and " " in command.removeprefix("virsh "):
        assert command.startswith("virsh -c qemu:///system ")
    elif command.startswith("kubectl ") and not command.removeprefix("kubectl ").startswith(CLUSTER_WIDE):
        assert re.search(r" (-n|-A)( |$)", command)
