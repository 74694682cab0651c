"""What a step tells: its report, which the guard reads; then a line of metrics.jsonl, the Prometheus series, and the
gold reward.

Gold, where a test world has one, is computed here and nowhere else: after the guard has judged, from text, so that it
feeds back into nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from cluster.data_records import Prompt
from cluster.errors import StreamError
from cluster.files import JsonlWriter, atomic_write_text, read_jsonl
from cluster.guard_metrics import GuardMetrics
from cluster.metrics import LearnerMetrics
from cluster.plugin import resolve
from cluster.process import Process
from cluster.records import ScoredRollout
from cluster.streams import Depth, StreamName
from cluster.text import decode_answer, load_tokenizer
from configs.run import RunConfig
from learner.caught import CaughtAnswers
from learner.experience import ExperienceStats
from learner.ledger import Counts
from learner.update import UpdateStats

if TYPE_CHECKING:
    from learner.state import LearnerState


@dataclass
class StepTimes:
    """When a step's phases ended; monotonic seconds."""

    begun_s: float
    batch_s: float = 0.0
    updated_s: float = 0.0
    published_s: float = 0.0

    @classmethod
    def begin(cls) -> StepTimes:
        return cls(begun_s=time.monotonic())

    def batch_taken(self) -> None:
        self.batch_s = time.monotonic()

    def updated(self) -> None:
        self.updated_s = time.monotonic()

    def published(self) -> None:
        self.published_s = time.monotonic()


@dataclass(frozen=True)
class StepReport:
    """A finished step. Row by row the same answer. `record`: its line of metrics.jsonl, as far as it is known; whoever
    has more to say adds to it."""

    rollouts: Sequence[ScoredRollout]
    prompts: Sequence[Prompt]
    """As they were read."""
    texts: Sequence[str]
    """Of the answers."""
    record: dict[str, Any]
    times: StepTimes


@dataclass
class _Seen:
    """Totals at the last step, for the counters' increments."""

    counts: Counts
    finished_s: float = field(default_factory=time.monotonic)


class Telemetry:
    """One a learner. On resume, metrics.jsonl is cut back to the steps that the checkpoint has."""

    def __init__(self, config: RunConfig, *, run_dir: Path, process: Process, state: LearnerState) -> None:
        self._process = process
        self._metrics = LearnerMetrics(process.registry)
        self._metrics.ranks.set(config.learner.ranks)
        self._guard_metrics = GuardMetrics(process.registry, thresholds=config.guard.thresholds)
        self._tokenizer = load_tokenizer(run_dir / "sft" / "model")
        self._gold: Callable[..., float] | None = (
            resolve(config.evaluation.gold, key="evaluation.gold") if config.evaluation.gold is not None else None
        )
        self._caught = CaughtAnswers(run_dir)
        path = run_dir / "metrics.jsonl"
        _cut_back(path, step=state.step)
        self._writer = JsonlWriter(path)
        self._started_s = time.monotonic()
        self._seen = _Seen(counts=Counts(**vars(state.intake.ledger.counts)))

    def report(
        self,
        state: LearnerState,
        rollouts: Sequence[ScoredRollout],
        stats: ExperienceStats,
        update: UpdateStats,
        times: StepTimes,
    ) -> StepReport:
        """Of the step that the state is just past."""
        tasks = [scored.rollout for scored in rollouts]
        return StepReport(
            rollouts=rollouts,
            prompts=[state.deck.prompt(rollout.task.prompt_id) for rollout in tasks],
            texts=[decode_answer(self._tokenizer, rollout.response_ids.tolist()) for rollout in tasks],
            record=self._record(state, rollouts, stats, update, times),
            times=times,
        )

    async def emit(self, state: LearnerState, report: StepReport) -> None:
        """Write it down."""
        self._process.heartbeat.beat()
        report.record.update(self._from_texts(report))
        depths = await self._depths()
        report.record.update(
            {f"depth_{stream.value}": depth.backlog + depth.in_flight for stream, depth in depths.items()}
        )
        self._writer.write(report.record)
        self._export(report.record, state, report.rollouts, report.times)

    async def _depths(self) -> dict[StreamName, Depth]:
        """Depths are for the eye: a server that is away leaves them out, the intake deals with it."""
        try:
            streams = self._process.redis.streams
            return {name: await streams.depth(name) for name in StreamName if name is not StreamName.DEAD}
        except StreamError:
            return {}

    def _record(
        self,
        state: LearnerState,
        rollouts: Sequence[ScoredRollout],
        stats: ExperienceStats,
        update: UpdateStats,
        times: StepTimes,
    ) -> dict[str, Any]:
        counts, now_s = state.intake.ledger.counts, time.monotonic()
        record = {
            "step": state.step,
            "version": state.version,
            "branch": state.branch,
            "time_s": round(now_s - self._started_s, 3),
            "reward_mean": stats.score_mean,
            "reward_std": stats.score_std,
            "proxy_z": state.scores.proxy_z(rollouts),
            "rm_version": state.scores.version,
            "reward_normalised_mean": stats.score_normalised_mean,
            "reward_uncertainty_mean": fmean(scored.uncertainty for scored in rollouts),
            "kl_target_nats_per_sequence": state.kl_target,
            "beta": state.kl.beta,
            "kl_cumulative_nats_per_sequence": state.kl.cumulative_nats_per_sequence,
            "staleness_mean": fmean(self._ages(state, rollouts)),
            "samples_issued": counts.issued,
            "samples_trained": counts.trained,
            "samples_stale_dropped": counts.stale_dropped,
            "samples_dead": counts.dead,
            "samples_rejected": counts.rejected,
            "samples_abandoned": counts.abandoned,
            "samples_duplicate": counts.duplicates,
            "samples_reissued": counts.reissued,
            "tokens_per_second_rollout": stats.tokens / max(now_s - self._seen.finished_s, 1e-9),
            "step_seconds": now_s - times.begun_s,
            "idle_seconds": times.batch_s - times.begun_s,
            "update_seconds": times.updated_s - times.batch_s,
            "publish_seconds": times.published_s - times.updated_s,
        }
        for name, value in (asdict(stats) | asdict(update)).items():
            record.setdefault(name, value)
        if (spent := state.kl_budget.spent_share(state.kl)) is not None:
            record["kl_budget_share"] = spent
        if any(scored.verdicts for scored in rollouts):
            record["flagged_fraction"] = fmean(bool(scored.verdicts) for scored in rollouts)
        if any(scored.weight != 1.0 for scored in rollouts):
            record["down_weighted_fraction"] = fmean(scored.weight != 1.0 for scored in rollouts)
        self._seen.finished_s = now_s
        return record

    def _from_texts(self, report: StepReport) -> dict[str, Any]:
        """What the guard does not see."""
        found: dict[str, Any] = {}
        if any(scored.verdicts for scored in report.rollouts):
            found["caught"] = self._caught.keep(zip(report.rollouts, report.prompts, report.texts, strict=True))
        if self._gold is not None:
            gold = self._gold
            found["gold_mean"] = fmean(
                float(gold(prompt, text)) for prompt, text in zip(report.prompts, report.texts, strict=True)
            )
        return found

    def _ages(self, state: LearnerState, rollouts: Sequence[ScoredRollout]) -> list[int]:
        """Versions that each sample lagged behind the policy it trained, which is the one before this step's."""
        return [state.version - 1 - scored.rollout.oldest_version for scored in rollouts]

    def _export(
        self, record: dict[str, Any], state: LearnerState, rollouts: Sequence[ScoredRollout], times: StepTimes
    ) -> None:
        metrics, counts, seen = self._metrics, state.intake.ledger.counts, self._seen.counts
        for name in (
            "kl_nats_per_sequence", "step_kl_nats_per_token", "beta", "entropy_nats_per_token", "clip_fraction",
            "reward_mean", "reward_std", "reward_normalised_mean", "response_tokens_mean", "truncated_fraction",
            "kl_target_nats_per_sequence", "kl_cumulative_nats_per_sequence", "behaviour_gap_max_nats",
            "gold_mean", "step",
        ):  # fmt: skip
            if record.get(name) is not None:
                getattr(metrics, name).set(record[name])
        if record["proxy_z"] is not None:
            metrics.reward_z.set(record["proxy_z"])
        metrics.uncertainty_mean.set(record["reward_uncertainty_mean"])
        metrics.policy_version.set(state.version)
        for model in metrics.MODELS:
            if record[f"grad_norm_{model}"] is not None:
                metrics.grad_norm[model].set(record[f"grad_norm_{model}"])
        metrics.samples_trained.inc(len(rollouts))
        metrics.tokens_trained.inc(record["tokens"])
        metrics.samples_issued.inc(counts.issued - seen.issued)
        metrics.samples_dead.inc(counts.dead - seen.dead)
        metrics.samples_rejected.inc(counts.rejected - seen.rejected)
        metrics.samples_abandoned.inc(counts.abandoned - seen.abandoned)
        metrics.duplicates_dropped.inc(counts.duplicates - seen.duplicates)
        metrics.stale_dropped.inc(counts.stale_dropped - seen.stale_dropped)
        metrics.reissues.inc(counts.reissued - seen.reissued)
        metrics.step_seconds.observe(record["step_seconds"])
        metrics.update_seconds.observe(record["update_seconds"])
        metrics.idle_seconds["wait_samples"].inc(record["idle_seconds"])
        metrics.weight_publish_seconds.observe(record["publish_seconds"])
        for transport, (total_bytes, total_failures) in state.published.items():
            metrics.set_published(transport, total_bytes=total_bytes, total_failures=total_failures)
        for age in self._ages(state, rollouts):
            metrics.staleness_versions.observe(age)
        self._guard_metrics.set_step(record)
        self._seen.counts = Counts(**vars(counts))


def _cut_back(path: Path, *, step: int) -> None:
    """Leave out steps that a resumed run is going to do again."""
    if path.exists():
        kept = [record for record in read_jsonl(path) if isinstance(record.get("step"), int) and record["step"] <= step]
        atomic_write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
