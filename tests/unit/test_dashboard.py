"""The dashboard, and how agents are scraped; tests/cluster/test_monitoring.py asks its queries of a real Prometheus."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

COMPONENT = Path(__file__).parent.parent.parent / "manifests/components/monitoring"
DASHBOARD: dict[str, Any] = json.loads((COMPONENT / "dashboard.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]


def test_it_is_what_its_script_writes(tmp_path: Path) -> None:
    script = tmp_path / "dashboard.py"
    script.write_text((COMPONENT / "dashboard.py").read_text())
    subprocess.run([sys.executable, script], check=True)
    fresh = (tmp_path / "dashboard.json").read_text()
    assert fresh == (COMPONENT / "dashboard.json").read_text(), "run make dashboard"


def test_it_can_be_installed_beside_others_on_whatever_prometheus() -> None:
    assert DASHBOARD["uid"] == "vmbackup"
    source, *variables = DASHBOARD["templating"]["list"]
    assert (source["type"], source["name"]) == ("datasource", "datasource")
    assert [variable["name"] for variable in variables] == ["node", "domain"]
    for part in (*variables, *(panel for panel in PANELS if panel["type"] != "row")):
        assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_each_row_is_a_question_and_each_panel_says_what_it_shows() -> None:
    rows = [panel for panel in PANELS if panel["type"] == "row"]
    assert all(row["title"].endswith("?") for row in rows)
    for panel in PANELS:
        if panel["type"] != "row":
            assert panel["title"]
            assert panel["description"].endswith(".")
            assert panel["targets"]


def test_panels_stand_side_by_side() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    cells = [
        {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        for place in (panel["gridPos"] for panel in PANELS)
    ]
    assert all(x < 24 for cell in cells for x, _ in cell)
    assert not [pair for pair in combinations(cells, 2) if pair[0] & pair[1]]


@pytest.mark.parametrize("name", ["podmonitor.yaml", "scrape-config.yaml"])
def test_agents_are_scraped_with_the_labels_that_alerts_and_dashboard_need(name: str) -> None:
    text = (COMPONENT / name).read_text()
    assert "targetLabel: node" in text or "target_label: node" in text
    assert "jobLabel: app.kubernetes.io/name" in text or "replacement: vmbackup\n" in text


def test_the_scrape_configuration_is_one(tmp_path: Path) -> None:
    config = yaml.safe_load((COMPONENT / "scrape-config.yaml").read_text())
    for job in config["scrape_configs"]:
        job.pop("kubernetes_sd_configs", None)  # Debian's Prometheus is built without it
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(["promtool", "check", "config", tmp_path / "prometheus.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
