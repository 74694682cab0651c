"""Which transport a configuration means."""

from __future__ import annotations

from typing import Any, cast

import pytest

from configs.run import (
    DataSection,
    LearnerSection,
    LoraSection,
    PlacementSection,
    RaySection,
    RolloutSection,
    RunConfig,
    WeightsSection,
)
from keel.weight_channel import group_settings


def config(transport: str, *, learner_gpus: float = 0.0, actor_gpus: float = 0.0, **more: Any) -> RunConfig:
    lora = more.pop("lora", None)
    return RunConfig(
        name="transport",
        data=DataSection(),
        learner=LearnerSection(gpus_per_rank=learner_gpus, lora=lora),
        rollout=RolloutSection(gpus_per_actor=actor_gpus),
        weights=WeightsSection(transport=cast(Any, transport), bucket_mib=2, timeout_s=7.0),
        **more,
    )


@pytest.mark.parametrize(
    ("transport", "learner_gpus", "actor_gpus", "backend"),
    [
        ("auto", 0.0, 0.0, None),
        ("auto", 1.0, 1.0, "nccl"),
        ("auto", 1.0, 0.0, None),
        ("auto", 0.5, 0.5, None),
        ("collective", 0.0, 0.0, "gloo"),
        ("collective", 1.0, 0.0, "gloo"),
        ("collective", 0.5, 0.5, "gloo"),
        ("collective", 1.0, 2.0, "nccl"),
        ("object_store", 1.0, 1.0, None),
    ],
)
def test_the_backend_follows_the_devices(
    transport: str, learner_gpus: float, actor_gpus: float, backend: str | None
) -> None:
    settings = group_settings(config(transport, learner_gpus=learner_gpus, actor_gpus=actor_gpus))
    assert (None if settings is None else settings.backend) == backend


def test_limits_and_address_come_from_the_configuration() -> None:
    local = group_settings(config("collective"))
    assert local is not None
    assert (local.bucket_bytes, local.timeout_s, local.address) == (2 << 20, 7.0, "127.0.0.1")
    on_cluster = group_settings(config("collective", ray=RaySection(address="auto")))
    assert on_cluster is not None
    assert on_cluster.address is None


def test_adapters_and_a_shared_gpu_need_no_group() -> None:
    assert group_settings(config("collective", lora=LoraSection(broadcast="adapter"))) is None
    assert group_settings(config("collective", lora=LoraSection(broadcast="merged"))) is not None
    shared = config("auto", learner_gpus=1.0, actor_gpus=1.0, placement=PlacementSection(colocate=False))
    assert group_settings(shared) is not None
