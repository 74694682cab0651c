"""A run directory as the offline stages leave it, with untrained models, and rollouts to train on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from cluster.data import fit_data, prepare_data
from cluster.records import PromptTask, Rollout, ScoredRollout, VersionRun, pack_floats, pack_ids
from cluster.reward_models import Calibration, RewardModels, RmManifest
from cluster.text import load_tokenizer
from configs.load import load_config
from configs.run import RunConfig
from learner.model_init import make_model


def prepare_run(runs_dir: Path, *overrides: str) -> RunConfig:
    """Everything that the learner starts from, in runs_dir/demo-ci."""
    config = load_config(
        "demo_ci",
        overrides=[
            f"runs_dir={runs_dir}",
            "data.world.sft_examples=200",
            "learner.batch_size=8",
            "checkpoint.keep_last=3",
            "guard.enabled=false",
            "guard.actions=[alert, raise_beta, roll_back]",  # for tests that have a guard of their own
            *overrides,
        ],
    )
    run_dir = config.run_dir
    prepare_data(config, run_dir)
    initial = make_model(config, run_dir)
    fit_data(config, run_dir, tokenizer=load_tokenizer(initial.tokenizer_dir))
    (run_dir / "sft").mkdir()
    initial.model_dir.rename(run_dir / "sft" / "model")
    write_reward_model(run_dir, version="rm-1")
    return config


def write_reward_model(run_dir: Path, *, version: str) -> None:
    torch.manual_seed(0)
    shape = AutoConfig.from_pretrained(run_dir / "sft" / "model", num_labels=1)
    models = RewardModels(run_dir / "rm")
    with models.draft() as draft:
        AutoModelForSequenceClassification.from_config(shape).save_pretrained(draft / "member_0")
        calibration = Calibration(mean=0.1, std=0.5, count=100)
        models.publish(draft, RmManifest(version=version, members=1, calibration=calibration))


def random_rollouts(*, seed: int, count: int = 8) -> list[ScoredRollout]:
    """Answers of random tokens with random scores, two to a prompt."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        length = int(rng.integers(2, 12))
        task = PromptTask(
            task_id=f"t-{seed}-{number}",
            prompt_id="p",
            group_id=f"g-{seed}-{number // 2}",
            prompt_ids_i32=pack_ids(rng.integers(4, 60, size=4)),
            max_new_tokens=12,
            temperature=1.0,
        )
        rollout = Rollout(
            task=task,
            response_ids_i32=pack_ids(rng.integers(4, 60, size=length)),
            behaviour_logprobs_f32=pack_floats(-rng.random(length) - 4.0),
            version_runs=(VersionRun(0, 0),),
            finish_reason="stop",
            actor="a",
            generate_s=0.1,
        )
        score = float(rng.normal())
        made.append(
            ScoredRollout(
                rollout=rollout,
                member_scores=(score,),
                reward=score,
                uncertainty=0.0,
                ref_logprobs_f32=pack_floats(-rng.random(length) - 4.0),
                rm_version="rm-1",
            )
        )
    return made
