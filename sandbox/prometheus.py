"""A Prometheus on loopback that scrapes agents each second, and asks it what it knows.

with Prometheus(directory, {"node-a": "127.0.0.1:9777"}) as prometheus:
    prometheus.query("up")
"""

from __future__ import annotations

import json
import shutil
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from sandbox.processes import Program, SandboxError

_LOOPBACK = "127.0.0.1"


class Prometheus:
    """A context manager. `agents` maps the name of a node to address and port of its agent's /metrics.

    `others` is the same for what is scraped with its own labels (kube-state-metrics), by job; `rules` is a rule file's
    content, as the spec of a PrometheusRule has it.
    """

    def __init__(
        self,
        directory: Path,
        agents: Mapping[str, str],
        *,
        others: Mapping[str, str] | None = None,
        rules: Mapping[str, Any] | None = None,
    ) -> None:
        self._program = Program("prometheus", directory)
        self._directory = directory
        with socket.socket() as one:
            one.bind((_LOOPBACK, 0))
            self._address = f"{_LOOPBACK}:{one.getsockname()[1]}"
        nodes = [{"targets": [address], "labels": {"node": node}} for node, address in agents.items()]
        self._config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [
                {"job_name": "vmbackup", "static_configs": nodes},
                *(
                    {"job_name": job, "honor_labels": True, "static_configs": [{"targets": [address]}]}
                    for job, address in (others or {}).items()
                ),
            ],
        }
        self._rules = rules or {"groups": []}

    def __enter__(self) -> Prometheus:
        program = shutil.which("prometheus")
        if program is None:
            raise SandboxError("prometheus is not installed: `make install` installs what the sandbox needs")
        self._directory.mkdir(parents=True, exist_ok=True)
        config = self._directory / "prometheus.yaml"
        config.write_text(yaml.safe_dump(self._config))
        (self._directory / "rules.yaml").write_text(yaml.safe_dump(dict(self._rules)))
        self._program.start(
            [
                program,
                f"--config.file={config}",
                f"--storage.tsdb.path={self._directory / 'tsdb'}",
                f"--web.listen-address={self._address}",
                "--log.level=warn",
            ]
        )
        try:
            self._program.wait_until(self._ready, seconds=30)
        except SandboxError:
            self._program.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._program.stop()

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The current result of a query. Raises ValueError with its message if the query is invalid."""
        return self._ask("query", query=expression)["result"]

    def query_range(self, expression: str, start: float, end: float) -> list[dict[str, Any]]:
        """As `query`, for each second of a period, given in seconds since the epoch."""
        return self._ask("query_range", query=expression, start=start, end=end, step=1)["result"]

    def series(self, selector: str) -> list[dict[str, str]]:
        """The labels of every series, past ones included."""
        return self._ask("series", **{"match[]": selector})

    def rules(self) -> list[dict[str, Any]]:
        """All rules, each with its health and last error."""
        return [rule for group in self._ask("rules")["groups"] for rule in group["rules"]]

    def _ask(self, what: str, **parameters: object) -> Any:
        url = f"http://{self._address}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        try:
            with _direct().open(url, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise ValueError(f"{parameters}: {json.load(error).get('error', error)}") from error

    def _ready(self) -> bool:
        try:
            with _direct().open(f"http://{self._address}/-/ready", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False


def _direct() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))
