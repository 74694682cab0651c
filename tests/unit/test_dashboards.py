"""The Grafana dashboard and the Prometheus rules speak of series that exist, in expressions that Prometheus accepts;
and each alert fires where it should, and not where it should not. docs/guard.md says what they watch."""

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
from typing import Any, get_args

import pytest
import yaml
from prometheus_client import CollectorRegistry

from cluster.guard_metrics import ACTIONS
from configs.guard import Above, Below, GuardSection, Thresholds
from configs.run import RunConfig
from configs.section import Section
from tests.metrics_support import all_registries
from tests.prometheus_tools import ROOT, RULES, dashboard_expressions, promtool

PROMETHEUS = ROOT / "deploy" / "prometheus"
GRAFANA = ROOT / "deploy" / "grafana"
RULE_TESTS = sorted((PROMETHEUS / "tests").glob("*.rules.test.yml"))
OF_THE_RUN = {
    "keel_kl_nats_per_sequence": "kl_nats_per_sequence",
    "keel_entropy_nats_per_token": "entropy_nats_per_token",
    "keel_reward_z": "proxy_z",
    "keel_evaluation_win_rate_high": "win_rate",
    "keel_evaluation_win_rate_length_controlled": "win_rate_length_controlled",
    "keel_rm_judge_agreement": "rm_judge_agreement",
    "keel_anchor_perplexity_ratio": "anchor_perplexity_ratio",
    "keel_canary_ks": "canary_ks",
    "keel_canary_z": "canary_z",
}
"""Series → the signal whose value it has. Others are keel_guard_signal."""
NAME = re.compile(r"(?<![\w:])((?:keel|vllm|ray|process)[_:][a-zA-Z0-9_:]+)")


def load_dashboard() -> dict[str, Any]:
    dashboard: dict[str, Any] = json.loads((GRAFANA / "keel.json").read_text())
    return dashboard


def load_rules() -> list[dict[str, Any]]:
    files = [yaml.safe_load(path.read_text()) for path in RULES]
    return [rule for file in files for group in file["groups"] for rule in group["rules"]]


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
    for script in GRAFANA.glob("*.py"):
        shutil.copy(script, tmp_path)
    subprocess.run([sys.executable, tmp_path / "make_dashboard.py"], check=True, timeout=60)
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
        "Overview", "Rollout", "Queues", "Reward service", "Learner", "Guard", "Weights", "Cluster",
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
    for annotation in dashboard["annotations"]["list"]:
        expr = annotation["target"]["expr"]
        assert expr.count('run=~"$run"') == len(NAME.findall(expr)) > 0, expr
        assert annotation["datasource"]["uid"] == "${datasource}"


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
    found = re.findall(r"(\d+) rules found", promtool("check", "rules", *RULES))
    assert sum(map(int, found)) == len(load_rules())


def test_every_alert_says_whose_it_is_and_what_to_do() -> None:
    alerts = [rule for rule in load_rules() if "alert" in rule]
    assert len(alerts) >= 15
    for alert in alerts:
        assert alert["labels"]["severity"] in {"warning", "critical"}, alert["alert"]
        assert "{{ $labels.run }}" in alert["annotations"]["summary"], alert["alert"]
        assert alert["annotations"]["description"], alert["alert"]


def test_the_rule_tests_pass_and_show_every_alert_firing_and_quiet() -> None:
    promtool("test", "rules", *RULE_TESTS)
    fires: dict[str, int] = {}
    for case in itertools.chain.from_iterable(yaml.safe_load(path.read_text())["tests"] for path in RULE_TESTS):
        for check in case["promql_expr_test"]:
            if "ALERTS" in check["expr"]:
                for sample in check["exp_samples"]:
                    fires.update(dict.fromkeys(re.findall(r'alertname="(\w+)"', sample["labels"]), 1))
        runs = {run for series in case["input_series"] for run in re.findall(r'run="(\w+)"', series["series"])}
        assert len(runs) > 1, f"{case['name']}: another run that stays quiet"
    assert set(fires) == {rule["alert"] for rule in load_rules() if "alert" in rule}


def test_every_pair_of_alert_and_severity_has_a_case() -> None:
    """The cases of guard.rules.test.yml list the alerts of one severity each."""
    [cases] = [yaml.safe_load(path.read_text())["tests"] for path in RULE_TESTS if path.name.startswith("guard")]
    [rules] = [
        yaml.safe_load(path.read_text())["groups"][0]["rules"] for path in RULES if path.name.startswith("guard")
    ]
    assert [case["name"] for case in cases] == [f"{rule['alert']}, {rule['labels']['severity']}" for rule in rules]


# ---------------------------------------------------------------- the guard's signals


def test_the_signals_rules_are_what_their_script_writes(tmp_path: Path) -> None:
    place = tmp_path / "deploy" / "prometheus"
    for folder in ("rules", "tests"):
        (place / folder).mkdir(parents=True)
    script = shutil.copy(PROMETHEUS / "make_guard_rules.py", place)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    subprocess.run([sys.executable, script], check=True, timeout=60)
    for name in ("rules/guard.rules.yml", "tests/guard.rules.test.yml"):
        assert (PROMETHEUS / name).read_text() == (place / name).read_text(), name


def limits_in_rules() -> Iterator[tuple[str, str, str, float]]:
    """Signal, comparison, level, number: of each alert on a signal's value."""
    first = re.compile(r'(?:max|min) by \(run\) \((?:abs\()?(\w+)(?:\{signal="(\w+)"\})?\)?\) ([<>]) ([0-9.]+)')
    for rule in load_rules():
        found = first.match(rule["expr"])
        if found is None or "alert" not in rule:
            continue
        series, signal, comparison, number = found.groups()
        signal = signal or OF_THE_RUN.get(series)
        if signal is None:
            continue
        own = re.findall(r'keel_guard_threshold\{signal="(\w+)", level="(\w+)"\}', rule["expr"])
        assert [name for name, _ in own] == [signal], rule["alert"]
        yield signal, comparison, own[0][1], float(number)


def test_the_alerts_have_the_guards_thresholds() -> None:
    """Each default of configs.guard has its alert, on the side that is bad, and no alert another number."""
    expected: set[tuple[str, str, str, float]] = set()
    for signal in Thresholds.model_fields:
        limits: Above | Below = getattr(Thresholds(), signal)
        side = ">" if isinstance(limits, Above) else "<"
        numbers = {"warn": limits.warn, "act": limits.act}
        expected |= {(signal, side, level, limit) for level, limit in numbers.items() if limit is not None}
    found = list(limits_in_rules())
    assert len(found) == len(set(found)) >= 50
    assert set(found) == expected


def test_every_signal_and_action_is_on_the_dashboard() -> None:
    shown = " ".join(dashboard_expressions(run="demo"))
    named = {name for group in re.findall(r'signal=~"([\w|]+)"', shown) for name in group.split("|")}
    named |= {signal for series, signal in OF_THE_RUN.items() if series in shown}
    assert named == set(Thresholds.model_fields)
    assert set(re.findall(r'action!?[=~]+"([\w|]+)"', shown)) <= set(ACTIONS)


def test_what_the_alerts_tell_one_to_set_exists() -> None:
    """Dotted settings in the descriptions, such as learner.entropy_bonus."""
    texts = [rule["annotations"]["description"] for rule in load_rules() if "alert" in rule]
    named = {name for text in texts for name in re.findall(r"\b[a-z_]+(?:\.[a-z_]+)+\b", text)}
    keys = {name for name in named if name.split(".")[0] in RunConfig.model_fields and not name.endswith(".jsonl")}
    assert len(keys) >= 10
    assert {key for key in keys if not exists(key)} == set()


def exists(key: str) -> bool:
    """Whether a configuration has the setting, in any form that its sections may take."""
    sections: list[Any] = [RunConfig]
    for part in key.split("."):
        fields = [section.model_fields[part] for section in sections if part in section.model_fields]
        if not fields:
            return False
        sections = [form for field in fields for form in forms(field.annotation)]
    return True


def forms(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, Section) else []
    return [form for part in get_args(annotation) for form in forms(part)]


# ---------------------------------------------------------------- docs/guard.md


def documented() -> dict[str, tuple[str, str]]:
    """Signal → its thresholds as the table has them."""
    text = (ROOT / "docs" / "guard.md").read_text()
    rows = [line.strip("|\n ").split(" | ") for line in text.splitlines() if re.match(r"\| `[a-z_]+` \| .* \|", line)]
    return {row[0].strip("`"): (row[3], row[4]) for row in rows if len(row) == 7}


def test_every_signal_is_documented_with_its_thresholds() -> None:
    def shown(value: float | None, *, side: str) -> str:
        return "–" if value is None else f"{side} {value:g}"

    expected = {}
    for signal in Thresholds.model_fields:
        limits: Above | Below = getattr(Thresholds(), signal)
        side = ">" if isinstance(limits, Above) else "<"
        expected[signal] = shown(limits.warn, side=side), shown(limits.act, side=side)
    assert documented() == expected


def test_every_action_alert_and_setting_of_the_guide_exists() -> None:
    text = (ROOT / "docs" / "guard.md").read_text()
    assert {action for action in ACTIONS if f"| `{action}` | " not in text} == set()
    assert set(re.findall(r"`(Keel\w+)`", text)) <= {rule["alert"] for rule in load_rules() if "alert" in rule}
    named = {name for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:=\w+)?`", text) if not name.endswith("jsonl")}
    keys = {name for name in named if name.split(".")[0] in RunConfig.model_fields}
    assert len(keys) >= 15
    assert {key for key in keys if key != "guard.words" and not exists(key)} == set()
    [example] = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    assert GuardSection.model_validate(yaml.safe_load(example)["guard"]).webhook
