"""When a refresh of the reward model is due."""

from __future__ import annotations

from typing import Any

import pytest

from configs.run import RefreshSection
from reward_service.rm.triggers import RefreshProgress, probe_due, refresh_reason


def section(**fields: Any) -> RefreshSection:
    return RefreshSection(**({"every_versions": None} | fields))


def run(steps: list[tuple[int, float, float | None]], *, gain: float = 0.1) -> RefreshProgress:
    """(version, KL, z) of each step."""
    progress = RefreshProgress()
    for version, kl, z in steps:
        progress = progress.observe(version=version, kl=kl, z=z, gain=gain)
    return progress


def test_no_key_no_refresh() -> None:
    assert refresh_reason(run([(version, 9.0, 0.0) for version in range(1, 99)]), section()) is None


def test_every_so_many_versions_counted_from_the_last_beginning() -> None:
    every = section(every_versions=8)
    assert refresh_reason(run([(7, 0.1, 0.0)]), every) is None
    progress = run([(8, 0.1, 0.0)])
    assert "8 policy versions" in (refresh_reason(progress, every) or "")
    progress = progress.begun().observe(version=15, kl=0.1, z=0.0, gain=0.1)
    assert refresh_reason(progress, every) is None
    assert refresh_reason(progress.observe(version=16, kl=0.1, z=0.0, gain=0.1), every) is not None


def test_kl_counts_from_the_last_refresh() -> None:
    grown = section(kl_over_nats_per_sequence=1.0)
    assert refresh_reason(run([(3, 1.0, None)]), grown) is None
    progress = run([(3, 1.2, None)])
    assert "1.20 nats" in (refresh_reason(progress, grown) or "")
    progress = progress.begun().observe(version=4, kl=2.1, z=None, gain=0.1)
    assert refresh_reason(progress, grown) is None


def test_a_plateau_is_no_rise_worth_its_gain_for_so_long() -> None:
    still = section(plateau_versions=3)
    rising = run([(1, 0.0, 0.0), (2, 0.0, 0.2), (3, 0.0, 0.4), (4, 0.0, 0.6)])
    assert refresh_reason(rising, still) is None
    creeping = run([(1, 0.0, 0.0), (2, 0.0, 0.05), (3, 0.0, 0.08), (4, 0.0, 0.09)])
    assert "has not risen" in (refresh_reason(creeping, still) or "")


def test_disagreement_is_measured_then_acted_on_then_forgotten() -> None:
    parted = section(disagreement_over=0.3, probe_every_versions=4)
    progress = run([(3, 0.0, None)])
    assert not probe_due(progress, parted)
    progress = progress.observe(version=4, kl=0.0, z=None, gain=0.1)
    assert probe_due(progress, parted)
    progress = progress.probing().judged(32)
    assert not probe_due(progress, parted)
    from dataclasses import replace

    assert refresh_reason(replace(progress, disagreement=0.3), parted) is None
    assert "34% of fresh pairs" in (refresh_reason(replace(progress, disagreement=0.34), parted) or "")
    assert replace(progress, disagreement=0.34).begun().disagreement is None


@pytest.mark.parametrize(
    ("version", "fields"),
    [(9, {"freeze_before_version": 10}), (21, {"freeze_after_version": 20}), (9, {"budget_pairs": 100})],
)
def test_frozen_or_out_of_budget(version: int, fields: dict[str, int]) -> None:
    every = section(every_versions=1, disagreement_over=0.1, probe_every_versions=1, **fields)
    progress = run([(version, 0.0, 0.0)]).judged(100)
    assert refresh_reason(progress, every) is None
    assert not probe_due(progress, every)


def test_a_resumed_run_does_not_wait_for_versions_it_lost() -> None:
    progress = RefreshProgress(version=40, last_version=40, best_version=40, probed_version=40)
    progress = progress.not_ahead_of(33).observe(version=33, kl=0.0, z=0.0, gain=0.1)
    assert refresh_reason(progress.observe(version=41, kl=0.0, z=0.0, gain=0.1), section(every_versions=8)) is not None


def test_steps_that_are_told_again_count_for_nothing_before_the_last_refresh() -> None:
    """A resumed run's driver reads metrics.jsonl from its start."""
    progress = RefreshProgress(version=8, last_version=8, best_version=8, probed_version=8).not_ahead_of(10)
    for version in range(1, 11):
        progress = progress.observe(version=version, kl=0.1 * version, z=9.0 if version < 5 else 0.0, gain=0.1)
    assert (progress.version, progress.last_version, progress.best_z) == (10, 8, 0.0)
    assert refresh_reason(progress, section(every_versions=8)) is None
    assert not probe_due(progress, section(disagreement_over=0.5, probe_every_versions=4))
