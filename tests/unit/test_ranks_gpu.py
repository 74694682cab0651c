"""The group form on a GPU: NCCL for tensors on it, gloo for those in host memory, bfloat16 passes, offloaded state."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from cluster.checkpoint_tensors import read_whole
from configs.run import RunConfig
from learner.ranks import GroupRanks
from learner.trainer import Trainer
from tests.run_support import prepare_run, random_rollouts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(name="config")
def make_config(tmp_path: Path) -> RunConfig:
    return prepare_run(tmp_path, "learner.gpus_per_rank=1", "learner.dtype=bfloat16")


@pytest.fixture(name="ranks")
def make_ranks() -> Iterator[GroupRanks]:
    ranks = GroupRanks(HashStore(), rank=0, size=1, device=torch.device("cuda", 0), timeout_s=60.0)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("offload", [False, True])
def test_a_sharded_learner_trains_on_a_gpu(config: RunConfig, ranks: GroupRanks, tmp_path: Path, offload: bool) -> None:
    learner = config.learner.model_copy(update={"optimizer_offload": offload})
    config = config.model_copy(update={"learner": learner})
    trainer = Trainer(config, run_dir=config.run_dir, ranks=ranks)
    held = {tensor.device.type for tensor in trainer.checkpoint_tensors()["policy"].values()}
    assert held == {"cpu" if offload else "cuda"}
    before = {name: tensor.float().cpu() for name, tensor in trainer.weights()}
    experience = trainer.make_experience(random_rollouts(seed=1), scores_B=torch.linspace(-1, 1, 8), beta=0.1)
    stats = trainer.update(experience, step=0)
    assert stats.policy_steps > 0
    after = {name: tensor.float().cpu() for name, tensor in trainer.weights()}
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert bool(torch.isfinite(trainer.probe_logprobs(torch.arange(4, 12))).all())
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    trainer.save(directory)
    trainer.load(directory)
    saved = read_whole(directory)["policy"]
    assert all(torch.equal(saved[f"model.{name}"], after[name]) for name in after)
    assert {str(tensor.dtype) for tensor in saved.values()} == {"torch.float32"}
