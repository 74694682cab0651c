"""The reward service beside the bare pieces that it is made of, measured small: ratios only, as machines differ.

By CPU rather than by the clock: on a busy machine, the clock says who was given a core. Slack: 85 % of the bare
forward's throughput by CPU, half of it by the clock. `python -m benchmarks.reward_service` is to show 90 % by clock.
"""

from __future__ import annotations

import statistics

import pytest

from benchmarks.reward_service import QUICK, model_passes, transport

pytestmark = pytest.mark.timeout(240)


async def test_a_worker_adds_little_cpu_to_the_bare_hop() -> None:
    """Decoding, batching, scoring by nothing and encoding, against claims and hops alone. By CPU, not by the clock."""
    bare = await transport(500, workers=0, samples=2_000)
    served = await transport(500, workers=1, samples=2_000)
    assert served.worker_cpu_us < 5 * bare.worker_cpu_us  # about 2


async def test_with_real_models_the_service_keeps_the_scorers_throughput_and_hits_are_cheap() -> None:
    passes = await model_passes(batches=QUICK.model_batches, repeats=QUICK.repeats, members=1)
    assert statistics.median(one.cpu_share for one in passes) > 0.85  # about 0.97
    assert (
        statistics.median(one.share for one in passes) > 0.5
    )  # about 0.97: batches do not wait for anything in between
    assert statistics.median(one.process_hit_us / one.miss_us for one in passes) < 0.05  # about 0.01
    assert statistics.median(one.store_hit_us / one.miss_us for one in passes) < 0.05  # about 0.01
