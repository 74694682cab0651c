"""The whole job with real Ray, vLLM and Valkey, in small."""

from __future__ import annotations

import json
import re
import signal
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.integration.runs import Run, adopt, assert_all_gone, settings, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 8
TARGET_NATS, HORIZON_SAMPLES, BETA_INIT, BATCH = 1.0, 400, 0.15, 32

ScrapedRun = tuple[Run, dict[str, dict[str, float]]]
"""A finished run, and role → series → value as scraped while it went on."""


def http(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:
        return str(response.read().decode())


def discovery_url(run: Run) -> str:
    path = run.path / "progress.jsonl"
    found = re.findall(r"http://[0-9.:]+/targets", path.read_text() if path.exists() else "")
    return found[-1] if found else ""


@pytest.fixture(scope="module")
def scraped_run(prepared_run: Path, tmp_path_factory: pytest.TempPathFactory) -> ScrapedRun:
    """A finished synchronous run, and the samples scraped from each role while it went on."""
    runs_dir = tmp_path_factory.mktemp("online")
    adopt(prepared_run, runs_dir, name="scraped")
    run = start(runs_dir, "--resume", *settings(["learner.max_staleness=0"]), name="scraped")
    run.wait_for(lambda: bool(discovery_url(run)), what="service discovery")
    run.wait_for(lambda: len(json.loads(http(discovery_url(run)))) >= 5, what="five Prometheus targets")
    run.wait_for_step(2)
    samples: dict[str, dict[str, float]] = {}
    for group in json.loads(http(discovery_url(run))):
        families = text_string_to_metric_families(http(f"http://{group['targets'][0]}/metrics"))
        of_role = samples.setdefault(group["labels"]["role"], {})
        for sample in (sample for family in families for sample in family.samples):
            of_role[sample.name] = of_role.get(sample.name, 0.0) + sample.value
    output = run.finish()
    assert run.process.returncode == 0, output
    return run, samples


def test_versions_advance_one_a_step(scraped_run: ScrapedRun) -> None:
    metrics = scraped_run[0].metrics()
    assert [record["step"] for record in metrics] == list(range(1, STEPS + 1))
    assert [record["version"] for record in metrics] == list(range(1, STEPS + 1))


def test_the_engine_samples_from_the_learners_weights_at_every_version(
    scraped_run: ScrapedRun,
) -> None:
    """On-policy, the behaviour log-probs of vLLM and the learner's own must be the same numbers, token by token."""
    for record in scraped_run[0].metrics():
        assert record["staleness_mean"] == 0.0
        assert record["behaviour_gap_max_nats"] < 1e-4


def test_every_sample_is_accounted_for(scraped_run: ScrapedRun) -> None:
    last = scraped_run[0].metrics()[-1]
    assert last["samples_trained"] == STEPS * BATCH
    assert last["samples_issued"] == last["samples_trained"] + last["samples_stale_dropped"] + last["samples_dead"]


def test_beta_follows_the_controllers_formula(scraped_run: ScrapedRun) -> None:
    beta = BETA_INIT
    for record in scraped_run[0].metrics():
        error = max(-0.2, min(0.2, record["kl_nats_per_sequence"] / TARGET_NATS - 1.0))
        beta *= 1.0 + error * BATCH / HORIZON_SAMPLES
        assert record["beta"] == pytest.approx(beta, rel=1e-9)
    assert beta != BETA_INIT


def test_every_role_serves_its_series(scraped_run: ScrapedRun) -> None:
    samples = scraped_run[1]
    assert set(samples) == {"learner", "rollout", "reward", "driver", "ray"}
    assert samples["learner"]["keel_samples_trained_total"] >= BATCH
    assert {
        "keel_kl_nats_per_sequence", "keel_beta", "keel_entropy_nats_per_token", "keel_clip_fraction",
        "keel_grad_norm", "keel_staleness_versions_sum", "keel_step_seconds_count",
    } <= set(samples["learner"])  # fmt: skip
    assert samples["rollout"]["keel_rollout_samples_total"] >= BATCH
    assert samples["rollout"]["keel_weight_sync_seconds_count"] >= 1
    assert samples["reward"]["keel_reward_samples_total"] >= BATCH
    assert {"keel_queue_depth", "keel_queue_in_flight", "keel_workers"} <= set(samples["driver"])


def test_the_result_is_complete(scraped_run: ScrapedRun) -> None:
    run = scraped_run[0]
    summary = json.loads((run.path / "summary.json").read_text())
    for key in (
        "seed", "gold_sft", "gold_final", "proxy_final", "kl_nats_per_sequence", "beta_final", "versions",
        "samples_trained", "samples_stale_dropped", "stage_seconds", "tokens_per_second_rollout", "peak_rss_bytes",
        "seconds_to_first_rollout",
    ):  # fmt: skip
        assert summary[key] is not None, key
    assert summary["seconds_to_first_rollout"] < 60
    assert summary["peak_rss_bytes"] > 100 << 20
    shown = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    assert shown
    assert {"prompt", "before", "after", "gold_before", "gold_after"} <= set(shown[0])
    assert "data:image/svg+xml" in (run.path / "report.html").read_text()


def test_the_final_policy_is_an_ordinary_model_directory(scraped_run: ScrapedRun) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("final", "best"):
        directory = scraped_run[0].path / "policy" / name
        model = AutoModelForCausalLM.from_pretrained(directory)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        assert model.config.vocab_size >= len(tokenizer)


def test_a_stop_signal_saves_and_resume_goes_on_from_there(prepared_run: Path, tmp_path: Path) -> None:
    adopt(prepared_run, tmp_path, name="stopped")
    run = start(tmp_path, "--resume", *settings(["learner.steps=400"]), name="stopped")
    run.wait_for_step(3)
    started = run.descendants()
    run.interrupt(signal.SIGTERM)  # What a cluster sends; Ctrl-C's SIGINT is in the next test.
    output = run.finish(timeout_s=90)
    assert run.process.returncode == 130, output
    assert "--resume" in output
    assert_all_gone(started)
    stopped = run.metrics()
    last = stopped[-1]["step"]
    assert (run.path / "checkpoints" / f"step-{last:08d}").is_dir()

    again = start(tmp_path, "--resume", *settings([f"learner.steps={last + 2}"]), name="stopped")
    output = again.finish()
    assert again.process.returncode == 0, output
    metrics = again.metrics()
    assert [record["step"] for record in metrics] == list(range(1, last + 3))
    assert metrics[:last] == stopped
    follow_up = metrics[last]
    error = max(-0.2, min(0.2, follow_up["kl_nats_per_sequence"] / TARGET_NATS - 1.0))
    assert follow_up["beta"] == pytest.approx(stopped[-1]["beta"] * (1.0 + error * BATCH / HORIZON_SAMPLES), rel=1e-9)
    assert follow_up["version"] == last + 1
    final = metrics[-1]
    assert final["samples_issued"] == final["samples_trained"] + final["samples_stale_dropped"] + final["samples_dead"]


def test_a_second_ctrl_c_stops_at_once_and_leaves_nothing_behind(prepared_run: Path, tmp_path: Path) -> None:
    adopt(prepared_run, tmp_path, name="twice")
    run = start(tmp_path, "--resume", *settings(["learner.steps=400"]), name="twice")
    run.wait_for_step(1)
    started = run.descendants()
    run.interrupt()
    run.interrupt()
    output = run.finish(timeout_s=30)
    assert run.process.returncode == 130, output
    assert_all_gone(started)
