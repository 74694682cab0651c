"""Writes keel.json beside it: the Grafana dashboard of Keel's runs (import it, or provision it as a file).

`python deploy/grafana/make_dashboard.py` after a change here; a test says when the two differ. Every expression is
limited to the runs chosen in the variable `run`; names that begin with `keel:` are the recording rules of
deploy/prometheus/rules. Needs nothing but Python.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from dashboard_parts import Annotation, Panel, dashboard, gauge, mean, rate, spread, stat

OUTPUT: Final = Path(__file__).with_name("keel.json")

OVERVIEW: Final = [
    stat("Step", gauge("keel_step")),
    stat("Samples trained /s", "keel:samples_trained:rate5m{RUN}", unit="ops"),
    stat("Reward, z", gauge("keel_reward_z"), help="Against the starting policy's scores, in standard deviations"),
    stat("KL, nats per answer", gauge("keel_kl_nats_per_sequence")),
    stat("Learner idle", "keel:learner_idle:ratio5m{RUN}", unit="percentunit", help="Share of time without samples"),
    stat("Targets down", "count by (run) (up{RUN} == 0) or 0 * count by (run) (up{RUN})"),
    Panel("Samples per second, by stage", [
        ("keel:rollout_samples:rate5m{RUN}", "{{run}} generated"),
        ("keel:reward_samples:rate5m{RUN}", "{{run}} scored"),
        ("keel:samples_trained:rate5m{RUN}", "{{run}} trained"),
    ], unit="ops", width=12),
    Panel("Alerts firing", [('sum by (run, alertname) (ALERTS{RUN, alertstate="firing"})', "{{run}} {{alertname}}")],
          width=12),
]  # fmt: skip

ROLLOUT: Final = [
    Panel("Tokens per second", [(rate("keel_rollout_tokens_total", by="run, instance"), "{{run}} {{instance}}")]),
    Panel("Requests in the engine", [
        (gauge("keel_rollout_running_requests", by="run, instance"), "{{run}} {{instance}}"),
    ]),
    Panel("From claim to answer", spread("keel_rollout_generate_seconds"), unit="s"),
    Panel("Answer length, tokens", spread("keel_rollout_response_tokens")),
    Panel("Answers cut at their limit", [
        (f"{rate('keel_rollout_truncated_total')} / {rate('keel_rollout_samples_total')}", "{{run}}"),
    ], unit="percentunit", fraction=True),
    Panel("vLLM: tokens per second", [
        (rate("vllm:generation_tokens_total"), "{{run}} generated"),
        (rate("vllm:prompt_tokens_total"), "{{run}} prompt"),
    ]),
    Panel("vLLM: running and waiting requests", [
        ("sum by (run) (vllm:num_requests_running{RUN})", "{{run}} running"),
        ("sum by (run) (vllm:num_requests_waiting{RUN})", "{{run}} waiting"),
    ]),
    Panel("vLLM: KV cache in use", [(gauge("vllm:kv_cache_usage_perc", by="run, instance"), "{{run}} {{instance}}")],
          unit="percentunit", fraction=True),
    Panel("vLLM: prefix cache hits", [
        (f"{rate('vllm:prefix_cache_hits_total')} / {rate('vllm:prefix_cache_queries_total')}", "{{run}}"),
    ], unit="percentunit", fraction=True),
    Panel("vLLM: time to first token", spread("vllm:time_to_first_token_seconds"), unit="s"),
    Panel("vLLM: time between tokens", spread("vllm:inter_token_latency_seconds"), unit="s"),
    Panel("vLLM: preemptions per second", [(rate("vllm:num_preemptions_total"), "{{run}}")]),
]  # fmt: skip

QUEUES: Final = [
    Panel("Not claimed", [(gauge("keel_queue_depth", by="run, stream"), "{{run}} {{stream}}")]),
    Panel("Claimed, not finished", [(gauge("keel_queue_in_flight", by="run, stream"), "{{run}} {{stream}}")]),
    Panel("Oldest entry", [
        (gauge("keel_queue_oldest_seconds", by="run, stream", where=', stream!="dead"'), "{{run}} {{stream}}"),
    ], unit="s", limit=300),
    Panel("Handed out again", [(rate("keel_redeliveries_total", by="run, stage"), "{{run}} {{stage}}")], unit="ops"),
    Panel("Given up, lost leases", [
        (rate("keel_dead_letters_total", by="run, stage"), "{{run}} {{stage}} given up"),
        (rate("keel_lost_leases_total", by="run, stage"), "{{run}} {{stage}} lost lease"),
    ], unit="ops"),
    Panel("Issued, issued again, dropped", [
        (rate("keel_samples_issued_total"), "{{run}} issued"),
        (rate("keel_task_reissues_total"), "{{run}} issued again"),
        (rate("keel_stale_dropped_total"), "{{run}} too old"),
        (rate("keel_samples_dead_total"), "{{run}} given up"),
        (rate("keel_duplicates_dropped_total"), "{{run}} second result"),
    ], unit="ops"),
]  # fmt: skip

REWARD: Final = [
    Panel("Scored per second", [(rate("keel_reward_samples_total", by="run, instance"), "{{run}} {{instance}}")],
          unit="ops"),
    Panel("Tokens scored per second", [(rate("keel_reward_tokens_total"), "{{run}}")]),
    Panel("Forward passes of a batch", spread("keel_reward_score_seconds"), unit="s"),
    Panel("Rollouts in a batch", [(mean("keel_reward_batch_size"), "{{run}} mean")]),
    Panel("Found in a cache", [
        (f"{rate('keel_reward_cache_hits_total', by='run, layer')} / on (run) group_left () "
         f"({rate('keel_reward_cache_hits_total')} + {rate('keel_reward_cache_misses_total')})", "{{run}} {{layer}}"),
    ], unit="percentunit", fraction=True),
    Panel("Not to be scored", [
        (rate("keel_reward_failures_total"), "{{run}} failed"),
        (rate("keel_reward_paused_total"), "{{run}} put off"),
    ], unit="ops", help="Put off: a reward source is away, and the answer is tried again"),
    Panel("Uncertain answers", [
        (rate("keel_reward_rejected_total"), "{{run}} rejected"),
        (rate("keel_reward_down_weighted_total"), "{{run}} down-weighted"),
    ], unit="ops", help="Members of the ensemble disagree more than on the calibration set"),
    Panel("Refreshes of the reward model", [
        (gauge("keel_rm_refreshes_total", by="run, outcome"), "{{run}} {{outcome}}"),
        ("sum by (run) (keel_reward_model_swaps_total{RUN})", "{{run}} swaps in workers"),
        ("sum by (run) (keel_reward_model_swap_failures_total{RUN})", "{{run}} failed swaps"),
    ]),
    Panel("Pairs judged", [(gauge("keel_rm_pairs_judged_total"), "{{run}}")]),
]  # fmt: skip

LEARNER: Final = [
    Panel("Reward", [
        (gauge("keel_reward_mean"), "{{run}} reward model"),
        (gauge("keel_gold_mean"), "{{run}} gold"),
        (gauge("keel_reward_normalised_mean"), "{{run}} as trained on"),
    ]),
    Panel("Reward, z against the start", [(gauge("keel_reward_z"), "{{run}}")], limit=3),
    Panel("Spread of the reward", [
        (gauge("keel_reward_std"), "{{run}} over the batch"),
        (gauge("keel_reward_uncertainty_mean"), "{{run}} over the ensemble"),
    ]),
    Panel("KL to the reference, nats per answer", [
        (gauge("keel_kl_nats_per_sequence"), "{{run}}"),
        (gauge("keel_kl_target_nats_per_sequence"), "{{run}} target"),
    ], limit=10),
    Panel("β", [(gauge("keel_beta"), "{{run}}")]),
    Panel("Movement of the policy, nats", [
        (gauge("keel_step_kl_nats_per_token"), "{{run}} of a step, per token"),
        (gauge("keel_kl_cumulative_nats_per_sequence"), "{{run}} in all, per answer"),
    ]),
    Panel("Entropy, nats per token", [(gauge("keel_entropy_nats_per_token"), "{{run}}")], limit=0.1),
    Panel("Tokens clipped", [(gauge("keel_clip_fraction"), "{{run}}")], unit="percentunit", fraction=True),
    Panel("Gradient norm before clipping", [(gauge("keel_grad_norm", by="run, model"), "{{run}} {{model}}")]),
    Panel("Answer length", [(gauge("keel_response_tokens_mean"), "{{run}} tokens")]),
    Panel("Answers cut at their limit", [(gauge("keel_truncated_fraction"), "{{run}}")], unit="percentunit",
          fraction=True),
    Panel("Engine against learner, nats", [(gauge("keel_behaviour_gap_max_nats"), "{{run}}")],
          help="Largest difference of a token's log-probability; staleness and arithmetic together"),
    Panel("Where a step's time goes", [
        (mean("keel_step_seconds"), "{{run}} step"),
        (mean("keel_update_seconds"), "{{run}} update"),
        (mean("keel_weight_publish_seconds"), "{{run}} publish"),
    ], unit="s"),
    Panel("Idle, by phase", [(rate("keel_idle_seconds_total", by="run, phase"), "{{run}} {{phase}}")],
          unit="percentunit", fraction=True),
    Panel("Tokens trained per second", [("keel:tokens_trained:rate5m{RUN}", "{{run}}")]),
]  # fmt: skip


def signals(title: str, *names: str, unit: str = "short", help: str = "", fraction: bool = False) -> Panel:
    """Of the guard. By their names in configs.guard.Thresholds."""
    where = f', signal=~"{"|".join(names)}"'
    series = [(gauge("keel_guard_signal", by="run, signal", where=where), "{{run}} {{signal}}")]
    return Panel(title, series, unit=unit, help=help, fraction=fraction)


GUARD: Final = [
    Panel("Verdict", [(gauge("keel_guard_level"), "{{run}}")], stat=True, levels=True, width=4, height=4),
    stat("Rollbacks", "sum by (run) (keel_guard_rollbacks_total{RUN})", help="Since the learner's start"),
    stat("Win rate", gauge("keel_evaluation_win_rate"), unit="percentunit", help="Of the last evaluation"),
    stat("Gold, of the last evaluation", gauge("keel_evaluation_gold")),
    stat("Version evaluated", gauge("keel_evaluation_version")),
    stat("The guard's share of a step", "keel:guard_seconds:ratio15m{RUN}", unit="percentunit"),
    Panel("Signals that warn or act", [
        (gauge("keel_guard_signal_level", by="run, signal") + " > 0", "{{run}} {{signal}}"),
    ], help="Patience and hysteresis applied. None is shown while all is well", levels=True, width=16, height=9),
    Panel("Actions", [
        ("sum by (run, action) (increase(keel_guard_actions_total{RUN}[$__rate_interval]))", "{{run}} {{action}}"),
        ("sum by (run) (increase(keel_samples_abandoned_total{RUN}[$__rate_interval]))", "{{run}} samples abandoned"),
    ], height=9),
    signals("Reward, in standard deviations", "proxy_z", "reward_jump"),
    signals("Reward against the calibration's and the reference's", "reward_std_ratio", "score_ceiling_fraction",
            "reward_ks", "uncertainty_ratio"),
    signals("Movement of the policy, nats", "kl_nats_per_sequence", "kl_slope_nats_per_step", "entropy_nats_per_token",
            "behaviour_gap_max_nats"),
    signals("KL budget spent", "kl_budget_share", unit="percentunit",
            help="Of learner.kl_budget.cumulative_nats_per_sequence, where that is set: past 100 % the run ends"),
    signals("Length", "response_tokens_ratio", "length_reward_correlation", "length_reward_correlation_within_prompt",
            "truncated_fraction"),
    signals("Repetition", "distinct_bigrams_ratio", "longest_repeat_fraction", "compression_ratio",
            "repetition_reward_correlation"),
    signals("Words", "overused_words_share", "rare_token_fraction", "copied_fraction", unit="percentunit",
            fraction=True, help="metrics.jsonl names the over-used ones"),
    signals("Over-used words: excess, summed up", "overused_words_cusum",
            help="Share · steps, since the excess was last within 5 %"),
    signals("Health of the update, shares", "clip_fraction", "ratio_tail_fraction", unit="percentunit", fraction=True),
    signals("Health of the update, ratios", "value_error_ratio", "grad_norm_ratio",
            help="Critic's error over the returns' variance; gradient norm over its median"),
    Panel("Alerts to the webhook", [
        ("sum by (run) (keel_guard_webhook_posts_total{RUN})", "{{run}} taken"),
        ("sum by (run) (keel_guard_webhook_failures_total{RUN})", "{{run}} lost"),
    ]),
    Panel("Win rate against the reference", [
        (gauge("keel_evaluation_win_rate_low"), "{{run}} 95 % low"),
        (gauge("keel_evaluation_win_rate"), "{{run}}"),
        (gauge("keel_evaluation_win_rate_high"), "{{run}} 95 % high"),
        (gauge("keel_evaluation_win_rate_length_controlled"), "{{run}} at equal length"),
        (gauge("keel_evaluation_win_rate_people"), "{{run}} by people"),
    ], unit="percentunit", fraction=True, limit=0.5, help="Alert: the whole interval lies under the line"),
    Panel("Reward model and judge agree", [(gauge("keel_rm_judge_agreement"), "{{run}}")], unit="percentunit",
          fraction=True, limit=0.6),
    Panel("Gold of the evaluation", [
        (gauge("keel_evaluation_gold"), "{{run}} policy"),
        (gauge("keel_evaluation_gold_reference"), "{{run}} reference"),
    ]),
    Panel("Perplexity of held-out SFT text, over the start's", [(gauge("keel_anchor_perplexity_ratio"), "{{run}}")],
          limit=1.5, help="What the policy forgets"),
    Panel("Canary: shift of the mean, standard deviations", [(gauge("keel_canary_z"), "{{run}}")], limit=3),
    Panel("Canary: Kolmogorov–Smirnov", [(gauge("keel_canary_ks"), "{{run}}")], fraction=True, limit=0.9),
    Panel("Evaluations", [
        (gauge("keel_evaluation_seconds"), "{{run}} seconds"),
        ("sum by (run) (keel_evaluation_failures_total{RUN})", "{{run}} failed"),
    ]),
]  # fmt: skip

WEIGHTS: Final = [
    Panel("From notice to use", spread("keel_weight_sync_seconds", "{{run}} {{transport}}", by="run, transport"),
          unit="s"),
    Panel("Loaded by engines", [("keel:weight_sync_bytes:rate5m{RUN}", "{{run}} {{transport}}")], unit="Bps"),
    Panel("Handed over by the learner", [
        (rate("keel_weight_publish_bytes_total", by="run, transport"), "{{run}} {{transport}}"),
    ], unit="Bps"),
    Panel("Failures per second", [
        (rate("keel_weight_sync_failures_total", by="run, transport"), "{{run}} {{transport}} load"),
        (rate("keel_weight_publish_failures_total", by="run, transport"), "{{run}} {{transport}} publish"),
    ], unit="ops"),
    Panel("Versions in use", [
        (gauge("keel_policy_version", by="run, role, instance", where=', role="learner"'), "{{run}} learner"),
        (gauge("keel_policy_version", by="run, role, instance", where=', role="rollout"'), "{{run}} {{instance}}"),
    ]),
    Panel("Age of trained samples, versions", [("keel:staleness_versions:mean5m{RUN}", "{{run}} mean")]),
]  # fmt: skip

CLUSTER: Final = [
    Panel("Workers running and wanted", [
        (gauge("keel_workers", by="run, worker", where=', state="running"'), "{{run}} {{worker}} running"),
        (gauge("keel_workers_wanted", by="run, worker"), "{{run}} {{worker}} wanted"),
    ]),
    Panel("Workers in other states", [
        (gauge("keel_workers", by="run, worker, state", where=', state!="running"') + " > 0",
         "{{run}} {{worker}} {{state}}"),
    ]),
    Panel("Restarts", [
        ("sum by (run, worker) (increase(keel_worker_restarts_total{RUN}[$__rate_interval]))", "{{run}} {{worker}}"),
    ]),
    Panel("Autoscaler's decisions", [
        ("sum by (run, decision) (increase(keel_autoscale_decisions_total{RUN}[$__rate_interval]))",
         "{{run}} {{decision}}"),
    ]),
    Panel("Nodes, learner's ranks", [
        (gauge("keel_nodes_alive"), "{{run}} nodes"),
        (gauge("keel_learner_ranks"), "{{run}} ranks"),
    ]),
    Panel("Scrape targets up", [("sum by (run, role) (up{RUN})", "{{run}} {{role}}")]),
    Panel("CPU per trained sample, by role", [
        ("keel:cpu_seconds_per_sample:ratio5m{RUN}", "{{run}} {{role}}"),
    ], unit="s"),
    Panel("Memory of each process", [
        (gauge("process_resident_memory_bytes", by="run, role, instance"), "{{run}} {{role}} {{instance}}"),
    ], unit="bytes"),
    Panel("Errors of the queue server, seen by the driver", [(rate("keel_stream_errors_total"), "{{run}}")],
          unit="ops"),
    Panel("Ray: CPU of each node", [(gauge("ray_node_cpu_utilization", by="run, node"), "{{run}} {{node}}")],
          unit="percent"),
    Panel("Ray: memory of each node", [
        (f"{gauge('ray_node_mem_used', by='run, node')} / {gauge('ray_node_mem_total', by='run, node')}",
         "{{run}} {{node}}"),
    ], unit="percentunit", fraction=True),
    Panel("Ray: object store of each node", [
        ("sum by (run, node) (ray_object_store_used_memory{RUN})", "{{run}} {{node}}"),
    ], unit="bytes"),
    Panel("Ray: GPUs of each node", [
        ("avg by (run, node, GpuIndex) (ray_node_gpus_utilization{RUN})", "{{run}} {{node}} {{GpuIndex}}"),
    ], unit="percent"),
]  # fmt: skip

ROWS: Final = {
    "Overview": OVERVIEW,
    "Rollout": ROLLOUT,
    "Queues": QUEUES,
    "Reward service": REWARD,
    "Learner": LEARNER,
    "Guard": GUARD,
    "Weights": WEIGHTS,
    "Cluster": CLUSTER,
}


ANNOTATIONS: Final = [
    Annotation(
        "Guard",
        'sum by (run, action) (increase(keel_guard_actions_total{RUN, action!="alert"}[1m])) > 0',
        title="guard: {{action}}",
    ),
]


def rendered() -> str:
    return json.dumps(dashboard(ROWS, annotations=ANNOTATIONS), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(rendered(), encoding="utf-8")
