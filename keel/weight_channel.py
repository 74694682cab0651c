"""Which way a run's weights travel: from configuration to a weight channel."""

from __future__ import annotations

from cluster.weight_group import Backend, GroupSettings
from cluster.weights_collective import CollectiveWeightChannel
from cluster.weights_ray import RayWeightChannel
from configs.run import RunConfig


def make_channel(config: RunConfig) -> RayWeightChannel | CollectiveWeightChannel:
    """The channel of a run whose Ray is up. Its `close` ends it."""
    store = RayWeightChannel.create()
    settings = group_settings(config)
    return store if settings is None else CollectiveWeightChannel(store, settings=settings)


def group_settings(config: RunConfig) -> GroupSettings | None:
    """How versions are broadcast; None where they go by the object store alone.

    NCCL needs a whole GPU at each end, since no two ranks share one; everything else is broadcast with gloo, from host
    memory to host memory. Adapters are small and go by the store.
    """
    transport, lora = config.weights.transport, config.learner.lora
    on_gpus = config.learner.gpus_per_rank >= 1 and config.rollout.gpus_per_actor >= 1
    own_gpus = on_gpus and config.rollout.engine == "vllm" and not config.placement.colocate
    sends_adapters = lora is not None and lora.broadcast == "adapter"
    if transport == "object_store" or sends_adapters or (transport == "auto" and not own_gpus):
        return None
    backend: Backend = "nccl" if own_gpus else "gloo"
    return GroupSettings(
        backend=backend,
        bucket_bytes=config.weights.bucket_mib << 20,
        timeout_s=config.weights.timeout_s,
        address="127.0.0.1" if config.ray.address is None else None,
    )
