"""Writes dashboard.json, the Grafana dashboard. Run it after each change: `make dashboard`.

One row for each question that an operator asks. Made for Grafana 10 and later.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TARGET = Path(__file__).with_name("dashboard.json")
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
GUEST, NODE = '{node=~"$node", domain=~"$domain"}', '{node=~"$node"}'
GUEST_LEGEND, DISK_LEGEND = "{{node}} {{domain}}", "{{node}} {{domain}} {{target}}"
VARIABLES = {"node": 'up{job="vmbackup"}', "domain": '{__name__=~"vmbackup_.+"}'}
WIDTH, HEIGHT = 24, 7  # of the grid, and of each panel
GOOD, WARNING, BAD = "green", "orange", "red"


@dataclass(frozen=True)
class Panel:
    """One panel. `queries` are pairs of PromQL and legend; `steps` are bounds from which on a colour is shown."""

    title: str
    about: str
    queries: tuple[tuple[str, str], ...]
    kind: str = "timeseries"  # or stat, bargauge, table
    unit: str = "short"
    width: int = 8
    steps: dict[float, str] = field(default_factory=dict[float, str])


def increase(metric: str, by: str) -> str:
    """How much a counter rose within an hour, so that what happens once a night can be seen."""
    return f"sum by ({by}) (increase({metric}{NODE}[1h]))"


def quantile(share: float, histogram: str) -> str:
    """This share of what a histogram counted in the range shown is below the value."""
    return f"histogram_quantile({share}, sum by (le) (increase({histogram}_bucket{NODE}[$__range])))"


ROWS: dict[str, tuple[Panel, ...]] = {
    "Is every guest protected?": (
        Panel(
            "Last backup failed", "Guests whose last backup failed.",
            ((f"count(vmbackup_last_failure_timestamp_seconds{GUEST}) or vector(0)", ""),),
            kind="stat", width=4, steps={1: BAD},
        ),
        Panel(
            "No backup for a day and a half",
            "Guests whose last good backup is older. Guests that never had one are not counted.",
            ((f"count(time() - max by (node, domain) (vmbackup_last_success_timestamp_seconds{GUEST}) > 36 * 3600) "
              "or vector(0)", ""),),
            kind="stat", width=4, steps={1: WARNING},
        ),
        Panel(
            "Age of the last good backup", "Time since the snapshot of each guest's last good backup.",
            ((f"time() - max by (node, domain) (vmbackup_last_success_timestamp_seconds{GUEST})", GUEST_LEGEND),),
            kind="bargauge", unit="s", steps={26 * 3600: WARNING, 36 * 3600: BAD},
        ),
        Panel(
            "Backups that ended", "By result, within the hour before.",
            ((increase("vmbackup_backups_total", "result"), "{{result}}"),),
        ),
    ),
    "Is anything stuck?": (
        Panel(
            "Not picked up by any agent", "VMBackups that no agent has looked at; needs kube-state-metrics.",
            (("count(kube_vmbackup_status_observed_generation == -1) or vector(0)", ""),),
            kind="stat", width=4, steps={1: WARNING},
        ),
        Panel(
            "Running now", "Running backups, each with its phase and what it does or waits for.",
            ((f"vmbackup_backup_state{GUEST}", "{{node}} {{domain}}: {{phase}}, {{reason}}"),),
            kind="table", width=8,
        ),
        Panel(
            "Since it last made progress", "Time since a running backup last copied or merged anything.",
            ((f"time() - vmbackup_backup_last_progress_timestamp_seconds{GUEST}", GUEST_LEGEND),),
            unit="s", width=6, steps={1800: WARNING},
        ),
        Panel(
            "Commits tried again", "By reason, within the hour before.",
            ((increase("vmbackup_commit_retries_total", "reason"), "{{reason}}"),),
            width=6,
        ),
    ),
    "Is a guest at risk now?": (
        Panel(
            "Alerts", "Each has a runbook.",
            (('ALERTS{alertname=~"VMBackup.*", alertstate="firing"}', "{{alertname}} {{node}} {{domain}}"),),
            kind="table",
        ),
        Panel(
            "Quarantined, and orphans",
            "Guests whose disks the agent does not touch, and overlays that belong to no VMBackup.",
            ((f"sum(vmbackup_quarantined{GUEST}) or vector(0)", "quarantined"),
             (f"sum(vmbackup_orphan_overlays{NODE})", "orphans")),
            kind="stat", width=4, steps={1: BAD},
        ),
        Panel(
            "Suspended by vmbackup", "About 50 ms at each switch of images; longer only with stallPolicy: Pause.",
            ((f"vmbackup_guest_suspended_seconds{GUEST}", GUEST_LEGEND),),
            unit="s", width=4, steps={20: BAD},
        ),
        Panel(
            "On an overlay since", "How long each disk has been on its overlay.",
            ((f"vmbackup_overlay_age_seconds{GUEST}", DISK_LEGEND),), unit="s",
        ),
    ),
    "How long do commits take, how much is merged?": (
        Panel(
            "Commits", "Time from the start of a commit until the guest uses its base again, in the range shown.",
            tuple((quantile(share, "vmbackup_commit_duration_seconds"), f"{share:.0%}") for share in (0.5, 0.95)),
            kind="stat", unit="s", width=4,
        ),
        Panel(
            "Freezes", "How long file systems of guests were frozen, in the range shown.",
            ((quantile(0.95, "vmbackup_freeze_duration_seconds"), "95%"),),
            kind="stat", unit="s", width=4,
        ),
        Panel(
            "Time spent in each phase", "Mean of the backups that left the phase in the range shown.",
            ((f"sum by (phase) (increase(vmbackup_phase_duration_seconds_sum{NODE}[$__range])) / "
              f"(sum by (phase) (increase(vmbackup_phase_duration_seconds_count{NODE}[$__range])) > 0)", "{{phase}}"),),
            kind="bargauge", unit="s",
        ),
        Panel(
            "Copied and merged", "Bytes per second. \"merged\" counts finished commits, \"merging\" running ones.",
            ((f"sum(rate(vmbackup_copied_bytes_total{NODE}[$__rate_interval]))", "copied"),
             (f"sum(rate(vmbackup_commit_merged_bytes_total{NODE}[$__rate_interval]))", "merged"),
             (f"deriv(vmbackup_backup_merged_bytes{GUEST}[$__rate_interval])", "merging " + GUEST_LEGEND)),
            unit="Bps",
        ),
        Panel(
            "Commits past their deadline", "1 while a guest writes as fast as its commit merges.",
            ((f"vmbackup_commit_stalled{GUEST}", DISK_LEGEND),), width=8, steps={1: WARNING},
        ),
        Panel(
            "How far the copies are", "Share of the bytes that the running backups have to copy.",
            ((f"vmbackup_backup_copied_bytes{GUEST} / (vmbackup_backup_total_bytes{GUEST} > 0)", GUEST_LEGEND),),
            unit="percentunit",
        ),
    ),
    "Is there room?": (
        Panel(
            "Overlays", "Disk space that each overlay occupies.",
            ((f"vmbackup_overlay_bytes{GUEST}", DISK_LEGEND),), unit="bytes",
        ),
        Panel(
            "Free for overlays", "Space left on the file system of each overlay.",
            ((f"vmbackup_overlay_free_bytes{GUEST}", DISK_LEGEND),), unit="bytes",
        ),
        Panel(
            "Full in", "If the file system keeps filling as in the last ten minutes, from all writers.",
            ((f"vmbackup_overlay_free_bytes{GUEST} / (-deriv(vmbackup_overlay_free_bytes{GUEST}[10m]) > 0)",
              DISK_LEGEND),),
            unit="s",
        ),
    ),
    "Are agents healthy?": (
        Panel(
            "Answer", "1 where the agent answers.", (('up{job="vmbackup", node=~"$node"}', "{{node}}"),),
            kind="stat", width=6, steps={0: BAD, 1: GOOD},
        ),
        Panel(
            "Versions", "Number of agents for each version.",
            ((f"count by (version) (vmbackup_build_info{NODE})", "{{version}}"),),
            kind="stat", width=4,
        ),
        Panel(
            "Waiting status", "Time for which the API server has not accepted a status.",
            ((f"vmbackup_report_lag_seconds{NODE}", "{{node}}"),), unit="s", width=4, steps={300: WARNING},
        ),
        Panel(
            "Memory", "Resident.", (('process_resident_memory_bytes{job="vmbackup", node=~"$node"}', "{{node}}"),),
            unit="bytes", width=5,
        ),
        Panel(
            "CPU", "Of one core.",
            (('rate(process_cpu_seconds_total{job="vmbackup", node=~"$node"}[$__rate_interval])', "{{node}}"),),
            unit="percentunit", width=5,
        ),
    ),
}  # fmt: skip


def dashboard() -> dict[str, Any]:
    """The whole dashboard."""
    panels: list[dict[str, Any]] = []
    y = 0
    for question, row in ROWS.items():
        panels.append(_placed({"type": "row", "title": question, "collapsed": False, "panels": []}, 0, y, WIDTH, 1))
        x, y = 0, y + 1
        for panel in row:
            if x + panel.width > WIDTH:
                x, y = 0, y + HEIGHT
            panels.append(_placed(_panel(panel), x, y, panel.width, HEIGHT))
            x += panel.width
        y += HEIGHT
    return {
        "uid": "vmbackup",
        "title": "vmbackup",
        "description": "Live backup of libvirt/QEMU guests: who is protected, what is stuck, what is at risk.",
        "tags": ["vmbackup", "backup", "libvirt"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-24h", "to": "now"},
        "timezone": "",
        "templating": {
            "list": [
                _source(),
                _variable("node", 'up{job="vmbackup"}'),
                _variable("domain", '{__name__=~"vmbackup_.+"}'),
            ]
        },
        "annotations": {"list": []},
        "panels": [{"id": number, **panel} for number, panel in enumerate(panels, 1)],
    }


def _placed(panel: dict[str, Any], x: int, y: int, width: int, height: int) -> dict[str, Any]:
    return {**panel, "gridPos": {"x": x, "y": y, "w": width, "h": height}}


def _panel(panel: Panel) -> dict[str, Any]:
    table = panel.kind == "table"
    targets = [
        {
            "refId": chr(ord("A") + number),
            "datasource": SOURCE,
            "expr": query,
            "legendFormat": legend,
            "instant": panel.kind != "timeseries",
            "range": panel.kind == "timeseries",
            "format": "table" if table else "time_series",
        }
        for number, (query, legend) in enumerate(panel.queries)
    ]
    steps = {-1.0: GOOD, **panel.steps}
    bounds = [{"color": color, "value": None if bound < 0 else bound} for bound, color in steps.items()]
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0, "thresholds": {"mode": "absolute", "steps": bounds}}
    options: dict[str, Any] = {}
    if panel.kind == "timeseries":
        defaults["custom"] = {"fillOpacity": 10, "thresholdsStyle": {"mode": "line" if panel.steps else "off"}}
        options = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
    elif not table:
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "orientation": "horizontal"}
    made: dict[str, Any] = {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": SOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
    }
    if table:
        hidden = {"Time": True, "Value": True, "__name__": True, "instance": True, "job": True, "pod": True}
        made["transformations"] = [{"id": "organize", "options": {"excludeByName": hidden}}]
    return made


def _source() -> dict[str, Any]:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "refresh": 1}


def _variable(name: str, selector: str) -> dict[str, Any]:
    query = f"label_values({selector}, {name})"
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


if __name__ == "__main__":
    TARGET.write_text(json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n")
