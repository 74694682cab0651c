"""The Grafana dashboard and the Prometheus rules speak of series that exist, in expressions that Prometheus accepts;
and each alert fires where it should, and not where it should not."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from tests.prometheus_tools import ROOT, RULES, dashboard_expressions, promtool
from tests.unit.test_metrics import all_registries

PROMETHEUS = ROOT / "deploy" / "prometheus"
GRAFANA = ROOT / "deploy" / "grafana"
RULE_TESTS = PROMETHEUS / "tests" / "keel.rules.test.yml"
NAME = re.compile(r"(?<![\w:])((?:keel|vllm|ray|process)[_:][a-zA-Z0-9_:]+)")


def load_dashboard() -> dict[str, Any]:
    dashboard: dict[str, Any] = json.loads((GRAFANA / "keel.json").read_text())
    return dashboard


def load_rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def expressions() -> list[str]:
    """Of the dashboard, with Grafana's variables filled in, and of the rules."""
    return [*dashboard_expressions(run="demo"), *(rule["expr"] for rule in load_rules())]


def names(prefix: str) -> set[str]:
    """Series named in the dashboard and the rules."""
    found = itertools.chain.from_iterable(NAME.findall(expr) for expr in expressions())
    return {name for name in found if name.startswith(prefix)}


def exported(registry: CollectorRegistry) -> Iterator[str]:
    for family in registry.collect():
        if family.type == "histogram":
            yield from (f"{family.name}_{part}" for part in ("bucket", "sum", "count"))
        yield family.name + ("_total" if family.type == "counter" else "")


def test_every_keel_series_that_is_shown_or_watched_exists() -> None:
    there = set(itertools.chain.from_iterable(exported(registry) for registry in all_registries()))
    assert len(names("keel_")) > 40
    assert names("keel_") - there == set()


def test_every_recorded_series_that_is_shown_is_recorded() -> None:
    recorded = {rule["record"] for rule in load_rules() if "record" in rule}
    assert names("keel:") - recorded == set()


def test_every_vllm_series_that_is_shown_is_one_of_vllms() -> None:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vllm is not installed")
    source = (Path(spec.origin).parent / "v1" / "metrics" / "loggers.py").read_text()
    declared = {name for found in re.findall(r'"(vllm:[a-z_]+)"', source) for name in exposed(found)}
    assert len(names("vllm:")) >= 8
    assert names("vllm:") - declared == set()


def exposed(name: str) -> list[str]:
    """As which series a metric may appear."""
    return [name, *(f"{name}_{part}" for part in ("total", "bucket", "sum", "count"))]


# ---------------------------------------------------------------- dashboard


def test_the_dashboard_is_what_its_script_writes(tmp_path: Path) -> None:
    script = shutil.copy(GRAFANA / "make_dashboard.py", tmp_path)
    subprocess.run([sys.executable, script], check=True, timeout=60)
    assert (GRAFANA / "keel.json").read_text() == (tmp_path / "keel.json").read_text()


def test_every_panel_has_its_own_place() -> None:
    taken: dict[tuple[int, int], str] = {}
    panels = load_dashboard()["panels"]
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        for cell in itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        ):
            assert taken.setdefault(cell, panel["title"]) == panel["title"], cell
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert [panel["title"] for panel in panels if panel["type"] == "row"] == [
        "Overview", "Rollout", "Queues", "Reward service", "Learner", "Weights", "Cluster",
    ]  # fmt: skip


def test_every_expression_is_limited_to_the_chosen_runs_and_source() -> None:
    dashboard = load_dashboard()
    assert dashboard["schemaVersion"] >= 39
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["run"]["multi"]
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            selectors = NAME.findall(target["expr"]) + re.findall(r"\b(?:up|ALERTS)\b", target["expr"])
            assert target["expr"].count('run=~"$run"') == len(selectors) > 0, target["expr"]
            assert target["datasource"]["uid"] == panel["datasource"]["uid"] == "${datasource}"


def test_prometheus_accepts_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": expr} for number, expr in enumerate(dashboard_expressions(run="demo"))
    ]
    path = tmp_path / "dashboard.rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", path)


# ---------------------------------------------------------------- rules


def test_prometheus_accepts_the_example_configuration_and_the_rules() -> None:
    promtool("check", "config", PROMETHEUS / "prometheus.yml")
    assert f"{len(load_rules())} rules found" in promtool("check", "rules", RULES)


def test_every_alert_says_whose_it_is_and_what_to_do() -> None:
    alerts = [rule for rule in load_rules() if "alert" in rule]
    assert len(alerts) >= 15
    for alert in alerts:
        assert alert["labels"]["severity"] in {"warning", "critical"}, alert["alert"]
        assert "{{ $labels.run }}" in alert["annotations"]["summary"], alert["alert"]
        assert alert["annotations"]["description"], alert["alert"]


def test_the_rule_tests_pass_and_show_every_alert_firing_and_quiet() -> None:
    promtool("test", "rules", RULE_TESTS)
    fires: dict[str, int] = {}
    for case in yaml.safe_load(RULE_TESTS.read_text())["tests"]:
        for check in case["promql_expr_test"]:
            if "ALERTS" in check["expr"]:
                for sample in check["exp_samples"]:
                    fires.update(dict.fromkeys(re.findall(r'alertname="(\w+)"', sample["labels"]), 1))
        runs = {run for series in case["input_series"] for run in re.findall(r'run="(\w+)"', series["series"])}
        assert len(runs) > 1, f"{case['name']}: another run that stays quiet"
    assert set(fires) == {rule["alert"] for rule in load_rules() if "alert" in rule}
