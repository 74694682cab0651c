"""What each process of a run measures, and the exporter that serves it to Prometheus.

Consumes: observations from any thread. Produces: /metrics and /healthz over HTTP. Waits for: nothing. Always holds:
names start with keel_, units are base units, label values come from small fixed sets, and no label is named as one that
service discovery gives the target (run, role, instance, node): Prometheus would rename it. A process exports its own
registry, which starts empty, and may serve others beside it, such as the default one into which vLLM records. One
process holds at most one set of each class, and not both RolloutMetrics and RewardMetrics in one registry.

/healthz answers 503 once the process's Heartbeat has been silent for longer than its limit: it says whether work goes
on, not whether the process exists.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from typing import Final, Self

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, Metric, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from cluster.http_serve import HttpServer, Page
from cluster.stores import Clock
from cluster.streams import Depth, StreamName
from cluster.weights import Transport

_LOG = logging.getLogger(__name__)

# The client's defaults end at 10 s and would hide a long generation or step.
_SHORT_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_LONG_S: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
_COUNTS: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
_VERSIONS: Final = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 32.0)
TRANSPORTS: Final[tuple[Transport, ...]] = ("object_store", "collective", "ipc")
_TOKENS: Final = (4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0)


class Heartbeat:
    """Progress, as a process reports it. `beat` wherever work is done, or found not to be there. Before the first beat
    it loads models or waits for others, within deadlines that its supervisor has for that: no lack of progress."""

    def __init__(self, *, silence_limit_s: float, clock: Clock = time.monotonic) -> None:
        self.silence_limit_s: Final = silence_limit_s
        self._clock = clock
        self._last_s: float | None = None

    def beat(self) -> None:
        self._last_s = self._clock()

    @property
    def silent_s(self) -> float:
        """Since the last beat; 0 before the first."""
        return 0.0 if self._last_s is None else self._clock() - self._last_s

    @property
    def healthy(self) -> bool:
        return self.silent_s <= self.silence_limit_s


class MetricsServer:
    """The process's exporter on `host`, from construction to `close`. `address` is "host:port"; port 0 takes a free
    one. `extra` registries are served after the process's own. Raises ConfigError where the address cannot be bound."""

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        host: str,
        port: int = 0,
        heartbeat: Heartbeat | None = None,
        extra: tuple[CollectorRegistry, ...] = (),
    ) -> None:
        self._collector = _Merged(registry, extra=extra)
        self._heartbeat = heartbeat
        self._http = HttpServer({"/metrics": self._metrics, "/healthz": self._healthz}, host=host, port=port)
        self.address: Final = self._http.address

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _metrics(self) -> Page:
        return Page(generate_latest(self._collector), content_type=CONTENT_TYPE_PLAIN_0_0_4)

    def _healthz(self) -> Page:
        beat = self._heartbeat
        if beat is None or beat.healthy:
            return Page(b"ok\n")
        text = f"no progress for {beat.silent_s:.1f} s; the limit is {beat.silence_limit_s:g} s\n"
        return Page(text.encode(), status=503)


class _Merged(Collector):
    """Several registries as one valid scrape: a family is there once, the first registry's. One of `extra` that fails
    is left out, as what others record must not cost Keel's own series."""

    def __init__(self, own: CollectorRegistry, *, extra: tuple[CollectorRegistry, ...]) -> None:
        self._own = own
        self._extra = extra

    def collect(self) -> Iterator[Metric]:
        seen: set[str] = set()
        for registry in (self._own, *self._extra):
            try:
                families = list(registry.collect())
            except Exception:
                if registry is self._own:
                    raise
                _LOG.exception("another library's metrics cannot be collected")
                continue
            for family in families:
                if family.name not in seen:
                    seen.add(family.name)
                    yield family


class RolloutMetrics:
    """A rollout actor."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.samples = Counter("keel_rollout_samples", "Answers generated", registry=registry)
        self.tokens = Counter("keel_rollout_tokens", "Response tokens generated", registry=registry)
        self.generate_seconds = Histogram(
            "keel_rollout_generate_seconds", "From claim to finished answer", registry=registry, buckets=_LONG_S
        )
        self.response_tokens = Histogram(
            "keel_rollout_response_tokens", "Tokens of an answer", registry=registry, buckets=_TOKENS
        )
        self.truncated = Counter("keel_rollout_truncated", "Answers cut at their token limit", registry=registry)
        self.running = Gauge("keel_rollout_running_requests", "Answers being generated", registry=registry)
        self._sync_metrics(registry)
        self.policy_version = _policy_version(registry)
        self.redeliveries = _redeliveries(registry, stage="rollout")
        self.dead_letters = _dead_letters(registry, stage="rollout")
        self.lost_leases = _lost_leases(registry, stage="rollout")

    def _sync_metrics(self, registry: CollectorRegistry) -> None:
        seconds = Histogram(
            "keel_weight_sync_seconds",
            "From a version's notice to its use",
            ["transport"],
            registry=registry,
            buckets=_LONG_S,
        )
        received = Counter("keel_weight_sync_bytes", "Weights loaded into the engine", ["transport"], registry=registry)
        failures = Counter(
            "keel_weight_sync_failures", "Weight updates that failed or were partial", ["transport"], registry=registry
        )
        self.syncs_by_transport: Mapping[Transport, Histogram] = {name: seconds.labels(name) for name in TRANSPORTS}
        self.bytes_by_transport: Mapping[Transport, Counter] = {name: received.labels(name) for name in TRANSPORTS}
        self.failures_by_transport: Mapping[Transport, Counter] = {name: failures.labels(name) for name in TRANSPORTS}


class RewardMetrics:
    """A reward worker."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.samples = Counter("keel_reward_samples", "Rollouts scored", registry=registry)
        self.tokens = Counter("keel_reward_tokens", "Tokens scored, without padding", registry=registry)
        self.batch_size = Histogram(
            "keel_reward_batch_size", "Rollouts in a forward pass", registry=registry, buckets=_COUNTS
        )
        self.score_seconds = Histogram(
            "keel_reward_score_seconds", "One batch's forward passes", registry=registry, buckets=_SHORT_S
        )
        self.failures = Counter("keel_reward_failures", "Rollouts that could not be scored", registry=registry)
        self.paused = Counter("keel_reward_paused", "Tries put off because a reward source was away", registry=registry)
        self.stream_errors = Counter(
            "keel_reward_stream_errors", "Calls to Redis that failed and were made again", registry=registry
        )
        self._cache_hits = Counter("keel_reward_cache_hits", "Scores found in a cache", ["layer"], registry=registry)
        self.memory_cache_hits = self._cache_hits.labels("memory")
        self.redis_cache_hits = self._cache_hits.labels("redis")
        self.cache_misses = Counter("keel_reward_cache_misses", "Scores found in no cache", registry=registry)
        self.rejected = Counter("keel_reward_rejected", "Answers refused as too uncertain", registry=registry)
        self.down_weighted = Counter(
            "keel_reward_down_weighted", "Answers that count less, as members disagree", registry=registry
        )
        self.swaps = Counter("keel_reward_model_swaps", "Reward models taken over while running", registry=registry)
        self.swap_failures = Counter(
            "keel_reward_model_swap_failures", "Announced reward models that did not load", registry=registry
        )
        self.model = Info("keel_reward_model", "The reward model that scores", registry=registry)
        self.review_taken = Counter("keel_review_items", "Answers put before people", registry=registry)
        self.review_left_out = Counter(
            "keel_review_left_out", "Answers for which the review queue had no room", registry=registry
        )
        self.redeliveries = _redeliveries(registry, stage="reward")
        self.dead_letters = _dead_letters(registry, stage="reward")
        self.lost_leases = _lost_leases(registry, stage="reward")


class LearnerMetrics:
    """The learner. Gauges hold the last step's value, and NaN before the first: an entropy of 0 is an alarm, one that
    was not measured is not. KL and entropy in nats."""

    PHASES: Final = ("wait_samples", "wait_weights", "checkpoint")
    MODELS: Final = ("policy", "critic")

    def __init__(self, registry: CollectorRegistry) -> None:
        self._count_metrics(registry)
        self._step_metrics(registry)
        self._quality_metrics(registry)
        self._published = dict.fromkeys(TRANSPORTS, (0.0, 0))

    def set_published(self, transport: Transport, *, total_bytes: float, total_failures: int) -> None:
        """Totals of one way of handing weights over, since this process's start."""
        seen_bytes, seen_failures = self._published[transport]
        self.published_bytes_by_transport[transport].inc(max(0.0, total_bytes - seen_bytes))
        self.publish_failures_by_transport[transport].inc(max(0, total_failures - seen_failures))
        self._published[transport] = total_bytes, total_failures

    def _count_metrics(self, registry: CollectorRegistry) -> None:
        self.samples_trained = Counter("keel_samples_trained", "Samples in finished steps", registry=registry)
        self.tokens_trained = Counter("keel_tokens_trained", "Response tokens in finished steps", registry=registry)
        self.duplicates_dropped = Counter(
            "keel_duplicates_dropped", "Second results for a task, not used", registry=registry
        )
        self.stale_dropped = Counter(
            "keel_stale_dropped", "Samples over the staleness limit, not used", registry=registry
        )
        self.samples_dead = Counter("keel_samples_dead", "Tasks that were given up and replaced", registry=registry)
        self.samples_rejected = Counter(
            "keel_samples_rejected", "Answers refused as too uncertain, and replaced", registry=registry
        )
        self.samples_issued = Counter("keel_samples_issued", "Tasks put into the prompt stream", registry=registry)
        self.reissues = Counter("keel_task_reissues", "Tasks issued again after their deadline", registry=registry)
        self.samples_abandoned = Counter(
            "keel_samples_abandoned", "Tasks under way when the policy was rolled back, and replaced", registry=registry
        )

    def _step_metrics(self, registry: CollectorRegistry) -> None:
        self.step = Gauge("keel_step", "Steps finished", registry=registry)
        self.step_seconds = Histogram("keel_step_seconds", "One PPO step", registry=registry, buckets=_LONG_S)
        self.update_seconds = Histogram(
            "keel_update_seconds", "From a full batch to new weights", registry=registry, buckets=_LONG_S
        )
        self._idle_seconds = Counter(
            "keel_idle_seconds", "Time in which the learner computed nothing", ["phase"], registry=registry
        )
        self.idle_seconds: Mapping[str, Counter] = {phase: self._idle_seconds.labels(phase) for phase in self.PHASES}
        self.staleness_versions = Histogram(
            "keel_staleness_versions", "Versions by which a trained sample lagged", registry=registry, buckets=_VERSIONS
        )
        self.weight_publish_seconds = Histogram(
            "keel_weight_publish_seconds", "Handing one version's weights over", registry=registry, buckets=_LONG_S
        )
        published = Counter("keel_weight_publish_bytes", "Weights handed over", ["transport"], registry=registry)
        failures = Counter(
            "keel_weight_publish_failures", "Versions that did not reach every engine", ["transport"], registry=registry
        )
        self.published_bytes_by_transport: Mapping[Transport, Counter] = {
            name: published.labels(name) for name in TRANSPORTS
        }
        self.publish_failures_by_transport: Mapping[Transport, Counter] = {
            name: failures.labels(name) for name in TRANSPORTS
        }
        self.checkpoint_seconds = Histogram(
            "keel_checkpoint_seconds", "Writing one checkpoint", registry=registry, buckets=_LONG_S
        )
        self.policy_version = _policy_version(registry)
        self.ranks = Gauge("keel_learner_ranks", "Processes that the learner is sharded over", registry=registry)

    def _quality_metrics(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str) -> Gauge:
            made = Gauge(f"keel_{name}", text, registry=registry)
            made.set(math.nan)
            return made

        self.kl_nats_per_sequence = gauge("kl_nats_per_sequence", "Policy against reference, summed over an answer")
        self.step_kl_nats_per_token = gauge("step_kl_nats_per_token", "Movement of the policy in the step")
        self.kl_target_nats_per_sequence = gauge("kl_target_nats_per_sequence", "What the KL controller aims at")
        self.kl_cumulative_nats_per_sequence = gauge(
            "kl_cumulative_nats_per_sequence", "Movement of the policy, summed over steps"
        )
        self.behaviour_gap_max_nats = gauge(
            "behaviour_gap_max_nats", "Largest difference of a token's log-probability between engine and learner"
        )
        self.beta = gauge("beta", "KL coefficient")
        self.entropy_nats_per_token = gauge("entropy_nats_per_token", "Entropy of the policy")
        self.clip_fraction = gauge("clip_fraction", "Share of tokens whose ratio was clipped")
        self.reward_mean = gauge("reward_mean", "Raw reward-model score")
        self.reward_std = gauge("reward_std", "Spread of the raw score over the batch")
        self.reward_z = gauge(
            "reward_z", "Mean raw score against the starting policy's scores, in their standard deviations"
        )
        self.reward_normalised_mean = gauge("reward_normalised_mean", "Score as it was trained on")
        self.gold_mean = gauge("gold_mean", "Gold reward of the last evaluation; never trained on")
        self.uncertainty_mean = gauge("reward_uncertainty_mean", "Standard deviation over the reward ensemble")
        self.response_tokens_mean = gauge("response_tokens_mean", "Length of an answer")
        self.truncated_fraction = gauge("truncated_fraction", "Share of answers cut at their token limit")
        self._grad_norm = Gauge("keel_grad_norm", "Gradient norm before clipping", ["model"], registry=registry)
        self.grad_norm: Mapping[str, Gauge] = {model: self._grad_norm.labels(model) for model in self.MODELS}
        for norm in self.grad_norm.values():
            norm.set(math.nan)


class RunMetrics:
    """The run as its driver sees it: queues, workers, nodes. May share a registry with LearnerMetrics."""

    ROLES: Final = ("rollout", "reward", "learner")
    STATES: Final = ("pending", "starting", "running", "draining", "restarting", "dead")
    DECISIONS: Final = ("add", "remove")
    REFRESHES: Final = ("accepted", "refused", "failed")

    def __init__(self, registry: CollectorRegistry) -> None:
        self.queue_depth = Gauge("keel_queue_depth", "Entries nobody has claimed", ["stream"], registry=registry)
        self.queue_in_flight = Gauge(
            "keel_queue_in_flight", "Entries claimed and not finished", ["stream"], registry=registry
        )
        self.queue_oldest_seconds = Gauge(
            "keel_queue_oldest_seconds", "Age of the oldest entry", ["stream"], registry=registry
        )
        self.workers = Gauge("keel_workers", "Workers by state", ["worker", "state"], registry=registry)
        self.worker_restarts = Counter("keel_worker_restarts", "Workers started again", ["worker"], registry=registry)
        self.workers_wanted = Gauge("keel_workers_wanted", "Workers there should be", ["worker"], registry=registry)
        self.nodes_alive = Gauge("keel_nodes_alive", "Living nodes of the Ray cluster", registry=registry)
        self._autoscale = Counter(
            "keel_autoscale_decisions",
            "Changes of the wanted number",
            ["decision"],
            registry=registry,
        )
        self.autoscale_decisions: Mapping[str, Counter] = {
            decision: self._autoscale.labels(decision) for decision in self.DECISIONS
        }
        self.stream_errors = Counter(
            "keel_stream_errors", "Calls to Redis that failed in the driver", registry=registry
        )
        self._refreshes = Counter(
            "keel_rm_refreshes", "Refreshes of the reward model by outcome", ["outcome"], registry=registry
        )
        self.rm_pairs_judged = Counter("keel_rm_pairs_judged", "Fresh pairs that were judged", registry=registry)
        self._refreshes_seen: dict[str, int] = {}
        for outcome in self.REFRESHES:
            self._refreshes.labels(outcome)
        self._restarts_seen = dict.fromkeys(self.ROLES, 0)
        for role in self.ROLES:
            self.worker_restarts.labels(role)
            self.set_workers(role, counts={})
            self.workers_wanted.labels(role).set(0)

    def set_depth(self, stream: StreamName, *, depth: Depth) -> None:
        self.queue_depth.labels(stream.value).set(depth.backlog)
        self.queue_in_flight.labels(stream.value).set(depth.in_flight)
        self.queue_oldest_seconds.labels(stream.value).set(depth.oldest_age_s)

    def set_workers(self, role: str, *, counts: Mapping[str, int]) -> None:
        """Every state is set, so that one that empties falls to 0. KeyError-free: an unknown state is a ValueError."""
        if unknown := set(counts) - set(self.STATES):
            raise ValueError(f"worker states {sorted(unknown)} are none of {self.STATES}")
        for state in self.STATES:
            self.workers.labels(role, state).set(counts.get(state, 0))

    def set_refreshes(self, counts: Mapping[str, int]) -> None:
        """`counts`: REFRESHES and pairs_judged, since the driver's start."""
        for outcome in self.REFRESHES:
            self._refreshes.labels(outcome).inc(counts.get(outcome, 0) - self._refreshes_seen.get(outcome, 0))
        self.rm_pairs_judged.inc(counts.get("pairs_judged", 0) - self._refreshes_seen.get("pairs_judged", 0))
        self._refreshes_seen = dict(counts)

    def set_restarts(self, role: str, *, total: int) -> None:
        """`total`: restarts of the role since the driver's start."""
        self.worker_restarts.labels(role).inc(max(0, total - self._restarts_seen.get(role, 0)))
        self._restarts_seen[role] = total


def _policy_version(registry: CollectorRegistry) -> Gauge:
    return Gauge("keel_policy_version", "Policy version in use", registry=registry)


def _redeliveries(registry: CollectorRegistry, *, stage: str) -> Counter:
    family = Counter("keel_redeliveries", "Entries that had been handed out before", ["stage"], registry=registry)
    return family.labels(stage)


def _dead_letters(registry: CollectorRegistry, *, stage: str) -> Counter:
    family = Counter("keel_dead_letters", "Tasks given up", ["stage"], registry=registry)
    return family.labels(stage)


def _lost_leases(registry: CollectorRegistry, *, stage: str) -> Counter:
    family = Counter("keel_lost_leases", "Finished work that another had finished first", ["stage"], registry=registry)
    return family.labels(stage)
