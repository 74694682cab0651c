"""A real Prometheus for tests: where its programs are, one started on a configuration, and its answers.

`tests/get_prometheus.sh` gets the programs where they are not installed. A test that needs them and finds none skips.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import pytest
import yaml

ROOT: Final = Path(__file__).parents[1]
RULES: Final = tuple(sorted((ROOT / "deploy" / "prometheus" / "rules").glob("*.rules.yml")))
_READY_TIMEOUT_S: Final = 30.0
_POLL_S: Final = 0.2
_LINT_COMPLAINTS: Final = 3
"""promtool's exit status for a valid exposition that breaks conventions."""
Fetch = Callable[[str], str]
"""URL → body. Another one than `fetch` where the server is in another network namespace."""


def find(name: str) -> Path | None:
    """The program `name` on PATH or in the cache that get_prometheus.sh fills."""
    if (on_path := shutil.which(name)) is not None:
        return Path(on_path)
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(os.environ.get("KEEL_PROMETHEUS_DIR") or Path(caches) / "keel" / "prometheus")
    program = cache / "usr" / "bin" / name
    return program if os.access(program, os.X_OK) else None


def require(name: str) -> Path:
    """The program `name`; skips the test without it."""
    program = find(name)
    if program is None:
        pytest.skip(f"{name} is not installed: tests/get_prometheus.sh gets it")
    return program


def promtool(*arguments: str | Path) -> str:
    """What `promtool ARGUMENTS` printed. Fails the test when it complains."""
    done = _promtool(*arguments)
    assert done.returncode == 0, f"promtool {' '.join(map(str, arguments))}: {done.stdout}"
    return done.stdout


def check_metrics(exposition: str) -> list[str]:
    """What promtool's linter has against a scrape. Fails the test where it is no valid exposition at all. vLLM's names
    have a colon, which the linter wants to see in recording rules only, and other oddities: they are left out."""
    done = _promtool("check", "metrics", stdin=exposition)
    assert done.returncode in (0, _LINT_COMPLAINTS), done.stdout
    return [line for line in done.stdout.strip().splitlines() if not line.startswith("vllm:")]


def _promtool(*arguments: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [require("promtool"), *arguments],
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )


def dashboard_expressions(*, run: str) -> list[str]:
    """Every expression of the Grafana dashboard, its annotations' too, as Grafana sends it for one run."""
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "keel.json").read_text())
    exprs = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    exprs += [annotation["target"]["expr"] for annotation in dashboard["annotations"]["list"]]
    return [expr.replace("$__rate_interval", "1m").replace("$run", run) for expr in exprs]


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as reply:
        return str(reply.read().decode())


def free_port(host: str = "127.0.0.1") -> int:
    """A port that is free now on an address of this machine."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def scrape_config(
    *, http_sd: Sequence[str] = (), file_sd: Sequence[Path] = (), rules: Sequence[Path] = RULES, every_s: float = 1.0
) -> dict[str, Any]:
    """A configuration with one job over all these sources, as deploy/prometheus/prometheus.yml has it, but faster."""
    every = f"{round(every_s * 1000)}ms"
    job: dict[str, Any] = {"job_name": "keel"}
    if http_sd:
        job["http_sd_configs"] = [{"url": url, "refresh_interval": every} for url in http_sd]
    if file_sd:
        job["file_sd_configs"] = [{"files": [str(path) for path in file_sd], "refresh_interval": every}]
    return {
        "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
        "rule_files": [str(path) for path in rules],
        "scrape_configs": [job],
    }


@dataclass(frozen=True)
class Sample:
    """One element of an instant vector."""

    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True)
class Target:
    """One active target."""

    labels: Mapping[str, str]
    health: str
    """up, down or unknown (not scraped yet)."""
    error: str
    url: str


class Prometheus:
    """A server for the time of the `with` block, on a free port of `host`; its data and log in `directory`.

    `prefix` goes before its command line, such as ["ip", "netns", "exec", NAME]; `host` is then an address there, and
    `fetch` must reach it.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        directory: Path,
        host: str = "127.0.0.1",
        port: int | None = None,
        prefix: Sequence[str] = (),
        fetch: Fetch = fetch,
    ) -> None:
        self._program = require("prometheus")
        self._directory = directory
        self._address = f"{host}:{free_port() if port is None else port}"
        self._prefix = prefix
        self._fetch = fetch
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "prometheus.yml").write_text(yaml.safe_dump(dict(config)))

    def __enter__(self) -> Self:
        command = [
            *self._prefix, str(self._program), f"--config.file={self._directory / 'prometheus.yml'}",
            f"--storage.tsdb.path={self._directory / 'data'}", f"--web.listen-address={self._address}",
            "--storage.tsdb.retention.time=1h", "--log.level=warn",
        ]  # fmt: skip
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            self.wait_for(self._ready, what="Prometheus ready", timeout_s=_READY_TIMEOUT_S)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the server. Repeatable."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    @property
    def _log(self) -> Path:
        return self._directory / "prometheus.log"

    def _ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"prometheus ended: {self._log.read_text()}"
        try:
            self._fetch(f"http://{self._address}/-/ready")
        except (OSError, subprocess.SubprocessError):
            return False
        return True

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an API answer: `get("targets")`."""
        query = f"?{urllib.parse.urlencode(parameters)}" if parameters else ""
        try:
            answer = json.loads(self._fetch(f"http://{self._address}/api/v1/{path}{query}"))
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {parameters}: {error.read().decode()}") from error
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expr: str) -> list[Sample]:
        """The instant vector of `expr` now."""
        result = self.get("query", query=expr)["result"]
        return [Sample(labels=entry["metric"], value=float(entry["value"][1])) for entry in result]

    def value(self, expr: str) -> float:
        """The one value of `expr`; NaN while it has none."""
        samples = self.query(expr)
        assert len(samples) <= 1, samples
        return samples[0].value if samples else float("nan")

    def history(self, selector: str, *, window: str = "1h") -> list[list[float]]:
        """Every value scraped of each series of `selector`, oldest first."""
        result = self.get("query", query=f"{selector}[{window}]")["result"]
        return [[float(value) for _, value in series["values"]] for series in result]

    def targets(self) -> list[Target]:
        """What Prometheus scrapes now."""
        return [
            Target(entry["labels"], health=entry["health"], error=entry["lastError"], url=entry["scrapeUrl"])
            for entry in self.get("targets", state="active")["activeTargets"]
        ]

    def rules(self) -> list[dict[str, Any]]:
        """All loaded rules, with `health` and `state`."""
        return [rule for group in self.get("rules")["groups"] for rule in group["rules"]]

    def wait_for(self, condition: Callable[[], bool], *, what: str, timeout_s: float) -> float:
        """Poll until the condition holds; returns the seconds that took."""
        started_s = time.monotonic()
        while not condition():
            assert time.monotonic() - started_s < timeout_s, f"no {what} in {timeout_s:g} s; targets: {self._state()}"
            time.sleep(_POLL_S)
        return time.monotonic() - started_s

    def wait_all_up(self, roles: Mapping[str, int], *, timeout_s: float) -> float:
        """Wait until there are so many targets of each role, no others, and all are up. Returns the seconds."""

        def all_up() -> bool:
            targets = self.targets()
            counts = {role: sum(target.labels["role"] == role for target in targets) for role in roles}
            return (
                counts == dict(roles)
                and len(targets) == sum(roles.values())
                and all(target.health == "up" for target in targets)
            )

        return self.wait_for(all_up, what=f"targets {dict(roles)}, all up", timeout_s=timeout_s)

    def _state(self) -> object:
        try:
            return [(dict(target.labels), target.health, target.error) for target in self.targets()]
        except (OSError, AssertionError, subprocess.SubprocessError) as error:
            return f"{error!r}; log: {self._log.read_text()}"
