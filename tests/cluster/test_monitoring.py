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
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from sandbox.guest import Guest as WritingGuest
from sandbox.kube import KubeApi
from sandbox.libvirtd import Libvirtd
from sandbox.prometheus import Prometheus
from tests.support.agents import SECONDS, SLOW, Agent, CatchBackup, VMBackup
from tests.support.domains import DomainFactory, wait_until
from tests.support.manifests import backup

COMPONENT = Path(__file__).parent.parent.parent / "manifests/components/monitoring"
DASHBOARD: dict[str, Any] = json.loads((COMPONENT / "dashboard.json").read_text())
RULES: dict[str, Any] = yaml.safe_load((COMPONENT / "prometheusrule.yaml").read_text())["spec"]
VARIABLES = {"$__rate_interval": "10s", "$__range": "5m", "$node": ".*", "$domain": ".*"}
NAMES = re.compile(r"\b(?:kube_)?(?:vmbackup|process)_[a-z_]+\b")


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
def watched(own_agent: Agent, state_metrics: str, tmp_path: Path) -> Iterator[Watched]:
    """A running agent that is scraped from its start on, and kube-state-metrics."""
    agents = {own_agent.node: own_agent.url.removeprefix("http://")}
    others = {"kube-state-metrics": state_metrics}
    with Prometheus(tmp_path / "prometheus", agents, others=others, rules=RULES) as prometheus:
        since = time.time()
        own_agent.start()
        watched = Watched(prometheus, since)
        watched.wait_for("vmbackup_backups_total")
        yield watched


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_every_query_of_the_dashboard_and_of_the_alerts_returns_data(
    watched: Watched, own_agent: Agent, domain: DomainFactory, libvirtd: Libvirtd, writer: WritingGuest
) -> None:
    """It begins as the demo does: a guest that writes and has a guest agent is backed up. That alone goes well, though,
    and leaves half of the dashboard empty, so the rest of the guests here have what no demo would show."""
    own_agent.apply(writer.name).wait()
    watched.wait_for("vmbackup_freeze_duration_seconds_count > 0")
    a_backup_of_two_days_ago(watched, own_agent, domain)
    nobodys = a_backup_that_nobody_takes(watched, own_agent.kube)
    a_commit_that_does_not_converge(watched, own_agent, domain, libvirtd)
    a_quarantine(watched, own_agent, domain)
    late = domain()
    late.write("vda", 0x11, length="16M")
    own_agent.apply(late.name, **{"copy.bandwidth": SLOW, "copy.deadlineSeconds": 1}).wait(ready="False")
    watched.wait_for('ALERTS{alertname="VMBackupFailed", alertstate="firing"}')

    assert {title for title, query in panels() if not watched.values(query)} == set()
    asked = [query for _, query in panels()] + [rule["expr"] for rule in alerts()]
    names = {name for query in asked for name in NAMES.findall(query)}
    assert {name for name in names if not watched.prometheus.series(name)} == set()
    for variable in DASHBOARD["templating"]["list"][1:]:
        selector, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]
        assert any(label in series for series in watched.prometheus.series(selector))

    assert {(rule["health"], rule.get("lastError", "")) for rule in watched.prometheus.rules()} == {("ok", "")}
    firing = {rule["name"] for rule in watched.prometheus.rules() if rule["state"] == "firing"}
    assert firing == {"VMBackupFailed"}
    a_restart(own_agent, writer.name, late.name)
    own_agent.apply(late.name).wait()
    wait_until(lambda: not watched.prometheus.query("vmbackup_last_failure_timestamp_seconds"), "no failure", SECONDS)
    nobodys.strip_finalizers()


@pytest.mark.chaos
def test_a_guest_on_its_overlay_is_told_of_while_its_agent_is_dead(
    watched: Watched, own_agent: Agent, domain: DomainFactory
) -> None:
    guest = domain()
    guest.write("vda", 0x11, length="48M")
    made = own_agent.apply(guest.name, **{"copy.bandwidth": SLOW})
    watched.wait_for("max_over_time(timestamp(vmbackup_overlay_age_seconds)[1d:30s])")  # as the alert sees it
    own_agent.kill()
    alert = f'ALERTS{{alertname="VMBackupGuestUnattended", domain="{guest.name}", node="{own_agent.node}"}}'
    watched.wait_for(alert)
    own_agent.start()
    wait_until(lambda: not watched.prometheus.query(alert), "no alert", SECONDS)
    made.patch({"copy": {"bandwidth": None}})
    made.wait()


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


def a_backup_of_two_days_ago(watched: Watched, agent: Agent, domain: DomainFactory) -> None:
    """A good backup, which a new agent finds to be that old."""
    made = agent.apply(domain().name)
    made.wait()
    agent.stop()
    long_ago = (datetime.now(UTC) - timedelta(days=2)).isoformat(timespec="seconds")
    status = json.dumps({"status": {"snapshotTime": long_ago, "completionTime": long_ago}})
    agent.kube.kubectl("patch", "vmbackup", made.name, "--subresource=status", "--type=merge", "-p", status)
    agent.start()
    watched.wait_for("time() - vmbackup_last_success_timestamp_seconds > 36 * 3600")


def a_backup_that_nobody_takes(watched: Watched, kube: KubeApi) -> VMBackup:
    """Its node has no agent; it is deleted, and somebody else's finalizer keeps it."""
    made = VMBackup(kube, "nobodys")
    kept = backup(made.name, nodeName="no-such-node")
    kept["metadata"]["finalizers"] = ["a.test/hold"]
    kube.apply(kept)
    made.delete("--wait=false")
    watched.wait_for("kube_vmbackup_deletion_timestamp")
    return made


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
    """Title and query of each, variables replaced as Grafana would; without the 0 that some show for no data."""
    targets = [(panel["title"], target) for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
    found = [(title, target["expr"].removesuffix(" or vector(0)")) for title, target in targets]
    for variable, value in VARIABLES.items():
        found = [(title, query.replace(variable, value)) for title, query in found]
    return found


def alerts() -> list[dict[str, Any]]:
    return [rule for group in RULES["groups"] for rule in group["rules"]]
