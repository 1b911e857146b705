"""The dashboard and the alerts, asked of a real Prometheus that has scraped a real agent through good and bad times."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from sandbox.libvirtd import Libvirtd
from sandbox.prometheus import Prometheus
from tests.agents import SECONDS, SLOW, Agent, CatchBackup
from tests.domains import DomainFactory, wait_until

COMPONENT = Path(__file__).parent.parent.parent / "manifests/components/monitoring"
DASHBOARD: dict[str, Any] = json.loads((COMPONENT / "dashboard.json").read_text())
RULES: dict[str, Any] = yaml.safe_load((COMPONENT / "prometheusrule.yaml").read_text())["spec"]
VARIABLES = {"$__rate_interval": "10s", "$__range": "5m", "$node": ".*", "$domain": ".*"}
NAMES = re.compile(r"\b(?:kube_)?(?:vmbackup|process)_[a-z_]+\b")

NOT_HERE = {"Freezes": "no guest of this test has a guest agent"}
"""Panels that show nothing here, and why."""


@dataclass(frozen=True)
class Watched:
    """A Prometheus, and when it began to watch."""

    prometheus: Prometheus
    since: float

    def values(self, expression: str) -> list[float]:
        """All that was ever true of it, but what is not a number."""
        found = self.prometheus.query_range(expression, self.since, time.time() + 1)
        values = [float(value) for series in found for _, value in series["values"]]
        return [value for value in values if not math.isnan(value)]

    def wait_for(self, expression: str) -> None:
        """Wait until this has a value."""
        wait_until(lambda: bool(self.prometheus.query(expression)), expression, SECONDS)


@pytest.fixture
def watched(own_agent: Agent, tmp_path: Path) -> Iterator[Watched]:
    """A running agent that is scraped from its start on."""
    address = own_agent.url.removeprefix("http://")
    with Prometheus(tmp_path / "prometheus", {own_agent.node: address}, rules=RULES) as prometheus:
        since = time.time()
        own_agent.start()
        watched = Watched(prometheus, since)
        watched.wait_for("vmbackup_backups_total")
        yield watched


def test_every_query_of_the_dashboard_and_of_the_alerts_returns_data(
    watched: Watched, own_agent: Agent, domain: DomainFactory, libvirtd: Libvirtd
) -> None:
    good = domain()
    own_agent.apply(good.name).wait()
    a_commit_that_does_not_converge(watched, own_agent, domain, libvirtd)
    a_quarantine(watched, own_agent, domain)
    late = domain()
    late.write("vda", 0x11, length="16M")
    own_agent.apply(late.name, **{"copy.bandwidth": SLOW, "copy.deadlineSeconds": 1}).wait(ready="False")
    watched.wait_for('ALERTS{alertname="VMBackupFailed", alertstate="firing"}')

    assert {title for title, query in panels() if not watched.values(query)} == set(NOT_HERE)
    asked = [query for _, query in panels()] + [rule["expr"] for rule in alerts()]
    names = {name for query in asked for name in NAMES.findall(query)}
    from_objects = {name for name in names if name.startswith("kube_")}  # test_kube_state_metrics has them
    assert {name for name in names - from_objects if not watched.prometheus.series(name)} == set()
    for variable in DASHBOARD["templating"]["list"][1:]:
        selector, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]
        assert any(label in series for series in watched.prometheus.series(selector))

    assert {(rule["health"], rule.get("lastError", "")) for rule in watched.prometheus.rules()} == {("ok", "")}
    firing = {rule["name"] for rule in watched.prometheus.rules() if rule["state"] == "firing"}
    assert firing == {"VMBackupFailed"}
    a_restart(own_agent, good.name, late.name)
    own_agent.apply(late.name).wait()
    wait_until(lambda: not watched.prometheus.query("vmbackup_last_failure_timestamp_seconds"), "no failure", SECONDS)


def test_top_shows_what_a_real_agent_does(agent: Agent, copying: CatchBackup) -> None:
    made, guest = copying(agent)
    assert re.search(rf"{guest.name} +Copying +\d+%", top(agent))
    made.patch({"copy": {"bandwidth": None}})
    made.wait()
    assert re.search(rf"{guest.name} +- +\d+s ago", top(agent))


def top(agent: Agent) -> str:
    vmbackup = Path(sys.executable).with_name("vmbackup")
    command = [vmbackup, "top", "--once", f"--url={agent.url}/metrics"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr  # other tests share the agent, and may have failed backups
    return done.stdout


def a_commit_that_does_not_converge(watched: Watched, agent: Agent, domain: DomainFactory, libvirtd: Libvirtd) -> None:
    """A guest that writes to its overlay, and is suspended at the end until its commit has converged."""
    guest = domain()
    libvirtd.virsh("resume", guest.name)
    guest.write("vda", 0x11, length="16M")
    commit = {"bandwidth": SLOW, "deadlineSeconds": 1, "stallPolicy": "Pause", "stallPauseSeconds": 300}
    made = agent.apply(guest.name, **{"copy.bandwidth": SLOW, "commit": commit})
    watched.wait_for("vmbackup_overlay_bytes")
    guest.write("vda", 0x22, offset="16M", length="32M")  # a commit takes 16 MiB at once
    watched.wait_for("vmbackup_overlay_bytes > 3e7")
    made.patch({"copy": {"bandwidth": None}})
    watched.wait_for("vmbackup_commit_stalled")
    watched.wait_for("vmbackup_guest_suspended_seconds > 1")
    watched.wait_for("vmbackup_guest_suspended_limit_seconds > 290")
    watched.wait_for("vmbackup_backup_merged_bytes > 0")
    made.patch({"commit": {"bandwidth": None}})
    made.wait()


def a_quarantine(watched: Watched, agent: Agent, domain: DomainFactory) -> None:
    """The image under an overlay is replaced by a copy of it, and put back."""
    guest = domain()
    guest.write("vda", 0x11, length="16M")
    made = agent.apply(guest.name, **{"copy.bandwidth": SLOW})
    made.wait_for_copying()
    base = Path(guest.bases["vda"])
    aside = base.with_name("aside")
    base.rename(aside)
    shutil.copyfile(aside, base)
    watched.wait_for("vmbackup_quarantined == 1")
    aside.rename(base)
    wait_until(lambda: not watched.prometheus.query("vmbackup_quarantined"), "no quarantine", SECONDS)
    made.wait()


def a_restart(agent: Agent, good: str, late: str) -> None:
    """A new agent reads from the VMBackups what the old one knew."""
    samples = [
        f'vmbackup_last_success_timestamp_seconds{{domain="{good}"}}',
        f'vmbackup_last_failure_timestamp_seconds{{domain="{late}"}}',
    ]
    before = [agent.metric(sample) for sample in samples]
    agent.stop()
    agent.start()
    wait_until(lambda: None not in [agent.metric(sample) for sample in samples], "all is known again", SECONDS)
    after = [agent.metric(sample) for sample in samples]
    assert all(abs((new or 0) - (old or 0)) <= 1 for new, old in zip(after, before, strict=True))  # whole seconds


def panels() -> list[tuple[str, str]]:
    """Title and query of each, variables replaced as Grafana would."""
    found = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
    for variable, value in VARIABLES.items():
        found = [(title, query.replace(variable, value)) for title, query in found]
    return found


def alerts() -> list[dict[str, Any]]:
    return [rule for group in RULES["groups"] for rule in group["rules"]]
