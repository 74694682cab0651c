"""A real Prometheus finds the processes of a running job by service discovery, and its sums are the job's own."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from prometheus_client import CollectorRegistry

from cluster.guard_metrics import GuardMetrics, WatchMetrics
from cluster.metrics import LearnerMetrics, MetricsServer
from configs.guard import Thresholds
from tests.integration.runs import Run, adopt, settings, start
from tests.prometheus_tools import (
    Prometheus,
    Target,
    check_metrics,
    dashboard_expressions,
    fetch,
    require,
    scrape_config,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ROLES = {"driver": 1, "learner": 1, "reward": 1, "rollout": 2, "ray": 1}
NAME = "watched"
TRAINED = "sum(keel_samples_trained_total)"
QUIET_S = 60.0
"""How long the tasks that are under way may take to come to rest."""
GONE_S = 15.0


@dataclass(frozen=True)
class Watched:
    """A running job and the Prometheus that scrapes it."""

    run: Run
    prometheus: Prometheus

    def discovery_url(self) -> str:
        return discovery_url(self.run)

    def rollouts(self) -> dict[str, Target]:
        """Instance → target."""
        targets = self.prometheus.targets()
        return {target.labels["instance"]: target for target in targets if target.labels["role"] == "rollout"}

    def process(self, target: Target) -> psutil.Process:
        """Who listens at the target's port."""
        port = urlsplit(target.url).port
        [listener] = {
            process
            for process in self.run.descendants()
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        }
        return listener


def discovery_url(run: Run) -> str:
    path = run.path / "progress.jsonl"
    found = re.findall(r"http://[0-9.:]+/targets", path.read_text() if path.exists() else "")
    return found[-1] if found else ""


@pytest.fixture(scope="module")
def watched(prepared_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A long run with two scripted actors, all its targets up."""
    require("prometheus")
    base = tmp_path_factory.mktemp("prometheus")
    adopt(prepared_run, base, name=NAME)
    changes = ["rollout.actors=2", "rollout.engine=scripted", "rollout.probe_tolerance=1000", "learner.steps=5000"]
    changes += ["guard.enabled=false"]  # Answers at random would alarm it.
    with ExitStack() as stack:
        run = start(base, "--resume", *settings(changes), name=NAME)
        stack.callback(end, run)
        run.wait_for(lambda: bool(discovery_url(run)), what="service discovery")
        # Both ways at once, as a user may have it: a process that both name is one target.
        config = scrape_config(http_sd=[discovery_url(run)], file_sd=[run.path / "prometheus_targets.json"])
        prometheus = stack.enter_context(Prometheus(config, directory=base / "server"))
        prometheus.wait_all_up(ROLES, timeout_s=60)
        run.wait_for_step(2)
        yield Watched(run, prometheus)


def test_the_guards_alarm_reaches_prometheus(tmp_path: Path) -> None:
    """Without a run: what the learner and the driver export, scraped; the dashboard's diagrams of it, the alerts."""
    registry = CollectorRegistry()
    learner, guard = LearnerMetrics(registry), GuardMetrics(registry, thresholds=Thresholds())
    watch = WatchMetrics(registry)
    calm = {"signals": dict.fromkeys(Thresholds.model_fields, 0.6), "branch": 0, "guard_seconds": 0.01}
    guard.set_step(calm | {"guard": {"level": "ok", "warn": [], "act": [], "actions": []}})
    learner.step_seconds.observe(1.0)
    with ExitStack() as stack:
        server = stack.enter_context(MetricsServer(registry, host="127.0.0.1"))
        labels = {"run": NAME, "role": "learner", "instance": "0.0", "node": "here"}
        targets = tmp_path / "targets.json"
        targets.write_text(json.dumps([{"targets": [server.address], "labels": labels}]))
        prometheus = stack.enter_context(Prometheus(scrape_config(file_sd=[targets]), directory=tmp_path / "server"))

        def alerts() -> dict[str, str]:
            return {
                rule["name"]: rule["state"]
                for rule in prometheus.rules()
                if rule.get("state", "inactive") != "inactive"
            }

        # Twice, so that a counter's increase can be told.
        prometheus.wait_for(
            lambda: prometheus.value("count_over_time(keel_guard_level[1m])") >= 2, what="two scrapes", timeout_s=30
        )
        assert not {name for name in alerts() if name.startswith("KeelGuard")}
        act = {"level": "act", "warn": [], "act": ["compression_ratio"], "actions": ["alert", "roll_back"]}
        guard.set_step({"signals": {"compression_ratio": 2.5}, "guard": act, "branch": 0, "guard_seconds": 0.01})
        watch.set_measurement({"win_rate": 0.2, "win_rate_low": 0.1, "win_rate_high": 0.35, "canary_z": -4.0})
        learner.step_seconds.observe(1.0)
        expected = {
            "KeelGuardActs": "firing", "KeelGuardActed": "firing", "KeelSignalCompressionRatio": "pending",
            "KeelSignalWinRate": "pending", "KeelSignalCanaryZ": "pending",
        }  # fmt: skip
        prometheus.wait_for(lambda: expected.items() <= alerts().items(), what=f"alerts {expected}", timeout_s=30)
        exprs = [expr for expr in dashboard_expressions(run=NAME) if re.search("guard_|evaluation_|canary_", expr)]
        assert len(exprs) > 25
        prometheus.wait_for(lambda: all(map(prometheus.query, exprs)), what="data in each diagram", timeout_s=30)


def end(run: Run) -> None:
    if run.process.poll() is None:
        run.interrupt()
        run.finish(timeout_s=90)


def test_every_target_says_whose_it_is(watched: Watched) -> None:
    targets = watched.prometheus.targets()
    assert all(target.labels["run"] == NAME and target.labels["node"] for target in targets)
    instances = [(target.labels["role"], target.labels["instance"]) for target in targets]
    assert len(set(instances)) == len(instances)
    assert {instance for role, instance in instances if role == "rollout"} == {"0.0", "1.0"}


def test_every_exposition_is_valid_and_measures_its_process(watched: Watched) -> None:
    for target in watched.prometheus.targets():
        text = fetch(target.url)
        if target.labels["role"] != "ray":
            assert check_metrics(text) == []
    cpu = watched.prometheus.query(f'process_cpu_seconds_total{{run="{NAME}", role!="ray"}} > 0')
    assert {sample.labels["role"] for sample in cpu} == set(ROLES) - {"ray"}
    assert watched.prometheus.value(f'count(ray_node_mem_total{{run="{NAME}"}})') >= 1
    assert watched.prometheus.value("keel_nodes_alive") == 1
    wanted = watched.prometheus.query("keel_workers_wanted == on (worker) keel_workers{state='running'}")
    assert {sample.labels["worker"]: sample.value for sample in wanted} == {"rollout": 2, "reward": 1, "learner": 1}


def test_every_value_scraped_was_the_jobs_own(watched: Watched) -> None:
    """A step's line in metrics.jsonl and its counter are two accounts of one thing."""
    prometheus, before = watched.prometheus, len(watched.run.metrics())
    prometheus.wait_for(lambda: prometheus.value("keel_step") > before, what="a step scraped", timeout_s=30)
    [values] = prometheus.history("keel_samples_trained_total")
    totals = {float(record["samples_trained"]) for record in watched.run.metrics()}
    assert set(values) <= totals | {0.0}
    assert len(set(values)) > 1


def test_the_sums_agree_when_all_is_at_rest(watched: Watched) -> None:
    """With the reward worker halted, what is under way comes to rest, and then each account must be exact."""
    prometheus, run = watched.prometheus, watched.run
    [target] = [target for target in prometheus.targets() if target.labels["role"] == "reward"]
    reward = watched.process(target)
    reward.suspend()
    try:
        seen: list[tuple[float, float]] = []

        def at_rest() -> bool:
            seen.append((prometheus.value(TRAINED), prometheus.value("sum(keel_rollout_samples_total)")))
            return len(seen) > 25 and len(set(seen[-25:])) == 1  # 5 s, five scrapes.

        prometheus.wait_for(at_rest, what="rest", timeout_s=QUIET_S)
        last, (trained, generated) = run.metrics()[-1], seen[-1]
        assert trained == last["samples_trained"]
        assert prometheus.value("sum(keel_samples_issued_total)") == last["samples_issued"]
        assert prometheus.value("sum(keel_tokens_trained_total)") == sum(record["tokens"] for record in run.metrics())
        scored_or_waiting = prometheus.value('sum(keel_queue_depth{stream=~"rollouts|scored"})')
        scored_or_waiting += prometheus.value('sum(keel_queue_in_flight{stream=~"rollouts|scored"})')
        assert generated >= trained + scored_or_waiting - last["samples_stale_dropped"] > trained
        assert prometheus.value("keel_reward_z") == pytest.approx(last["proxy_z"])
    finally:
        reward.resume()
    step = len(run.metrics())
    run.wait_for_step(step + 1)


def test_the_rules_load_and_nothing_is_wrong(watched: Watched) -> None:
    prometheus = watched.prometheus
    prometheus.wait_for(
        lambda: all(rule["health"] == "ok" for rule in prometheus.rules()), what="rules evaluated", timeout_s=30
    )
    rules = prometheus.rules()
    expected = {"KeelNoProgress", "KeelKlHigh", "KeelTargetDown", "KeelGuardActs", "KeelSignalProxyZ"}
    assert expected <= {rule["name"] for rule in rules}
    assert [rule["name"] for rule in rules if rule.get("state") == "firing"] == []
    prometheus.wait_for(
        lambda: prometheus.value("keel:samples_trained:rate5m") > 0, what="a recorded rate", timeout_s=30
    )
    assert not math.isnan(prometheus.value('keel:cpu_seconds_per_sample:ratio5m{role="driver"}'))


def test_the_guards_thresholds_are_told_by_the_learner_and_its_measurements_by_the_driver(watched: Watched) -> None:
    limits = watched.prometheus.query(f'keel_guard_threshold{{run="{NAME}", role="learner"}}')
    assert len(limits) == 2 * len(Thresholds.model_fields)
    assert len(watched.prometheus.query(f'keel_evaluation_win_rate{{run="{NAME}", role="driver"}}')) == 1


def test_the_dashboard_shows_the_run(watched: Watched) -> None:
    """Every diagram has data, but for those of what this run has not: vLLM, GPUs, alarms, workers in trouble, a guard
    that has something to say."""
    empty = [expr for expr in dashboard_expressions(run=NAME) if not watched.prometheus.query(expr)]
    absent = ("vllm:", "_gpus_", "ALERTS", 'state!="', "keel_guard_signal_level", 'action!="alert"')
    unexpected = [expr for expr in empty if not any(word in expr for word in absent)]
    assert unexpected == []


def test_a_killed_actor_is_down_at_once_and_its_successor_up(watched: Watched) -> None:
    prometheus = watched.prometheus
    before = watched.rollouts()
    dead = "1.0"
    watched.process(before[dead]).kill()
    seconds = prometheus.wait_for(
        lambda: dead not in (now := watched.rollouts()) or now[dead].health == "down",
        what="the dead actor's target down",
        timeout_s=GONE_S,
    )
    print(f"the target of the killed actor was down after {seconds:.1f} s")
    prometheus.wait_for(
        lambda: set(watched.rollouts()) == {"0.0", "1.1"}, what="the successor in its place", timeout_s=90
    )
    prometheus.wait_all_up(ROLES, timeout_s=30)
    prometheus.wait_for(
        lambda: prometheus.value('sum(keel_worker_restarts_total{worker="rollout"})') == 1,
        what="a restart counted",
        timeout_s=30,
    )


def test_an_ended_run_has_no_targets_in_its_file(watched: Watched) -> None:
    """Last: it ends the run."""
    watched.run.interrupt()
    output = watched.run.finish(timeout_s=90)
    assert watched.run.process.returncode == 130, output
    assert (watched.run.path / "prometheus_targets.json").read_text().strip() == "[]"
