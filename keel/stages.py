"""What each stage does, in terms of the packages below. Offline stages run in a Ray task, online ones in roles."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from cluster.data import prepare_data
from cluster.plugin import resolve
from cluster.text import resolve_model_dir
from configs.checks import named_functions
from configs.run import PretrainedModel, RunConfig, Stage
from keel.collect import collect_preferences
from keel.diagnose.command import write_diagnosis_of
from keel.evaluate import evaluate_run
from keel.online.stage import run_online
from keel.report import write_report
from keel.roles import Roles
from keel.rundir import append_progress
from keel.runtime import Runtime
from keel.summary import write_samples, write_summary


def _offline(stage_path: str, config: RunConfig, run_dir: Path) -> None:
    """Body of a stage's Ray task. Imports there, so that the driver never loads a trainer."""
    resolve(stage_path, key="stage")(config, run_dir, functools.partial(append_progress, run_dir))


def data(runtime: Runtime, roles: Roles) -> None:
    """Text and records of the run, and the model it starts from."""
    del roles
    model = runtime.config.model
    # Before anything is started: a wrong path is the commonest mistake, and a later stage would find it hours from now.
    if isinstance(model, PretrainedModel):
        resolve_model_dir(model.path)
    for key, reference in named_functions(runtime.config).items():
        resolve(reference, key=key)
    prepare_data(runtime.config, runtime.run.path)
    runtime.call(_make_model, runtime.config, runtime.run.path)


def _make_model(config: RunConfig, run_dir: Path) -> None:
    from cluster.data import fit_data
    from cluster.text import load_tokenizer
    from learner.model_init import make_model

    initial = make_model(config, run_dir)
    fit_data(config, run_dir, tokenizer=load_tokenizer(initial.tokenizer_dir))


def sft(runtime: Runtime, roles: Roles) -> None:
    """Supervised fine-tuning."""
    del roles
    config = runtime.config
    runtime.call(
        _offline,
        "learner.sft:run_sft",
        config,
        runtime.run.path,
        threads=config.sft.threads,
        gpus=config.learner.gpus_per_rank if config.sft.epochs else 0.0,  # copying a model needs none
    )


def collect(runtime: Runtime, roles: Roles) -> None:
    """Preference pairs from the SFT policy; nothing to do where preferences were given, or nobody needs any."""
    config = runtime.config
    needs_pairs = config.reward.needs_model or "dpo" in config.stages
    if config.data.preferences is None and needs_pairs:
        collect_preferences(runtime, roles)


def rm(runtime: Runtime, roles: Roles) -> None:
    """The reward model; nothing to do where the reward comes from elsewhere."""
    config = runtime.config
    if not config.reward.needs_model:
        return
    roles.clear_gpu()
    runtime.call(
        _offline, "reward_service.rm.train:run_rm", config, runtime.run.path, threads=config.rm.threads,
        gpus=config.learner.gpus_per_rank,
    )  # fmt: skip


def ppo(runtime: Runtime, roles: Roles) -> None:
    """Baseline evaluation, then the online loop."""
    run_online(runtime, roles)


def dpo(runtime: Runtime, roles: Roles) -> None:
    """Direct preference optimisation. What was evaluated before is evaluated again, beside it."""
    roles.clear_gpu()
    config = runtime.config
    runtime.run.reopen("evaluate")
    runtime.call(
        _offline, "learner.dpo:run_dpo", config, runtime.run.path, threads=config.dpo.threads,
        gpus=config.learner.gpus_per_rank,
    )  # fmt: skip


def evaluate(runtime: Runtime, roles: Roles) -> None:
    """The trained policies on the held-out prompts, beside the SFT policy's answers to the same."""
    evaluate_run(runtime, roles)
    write_samples(runtime)


def report(runtime: Runtime, roles: Roles) -> None:
    """summary.json, diagnosis.md and report.html."""
    del roles
    write_summary(runtime)
    write_diagnosis_of(runtime.run.path)
    write_report(runtime.run.path)


STAGE_FUNCTIONS: Final[Mapping[Stage, Callable[[Runtime, Roles], None]]] = {
    "data": data,
    "sft": sft,
    "collect": collect,
    "rm": rm,
    "ppo": ppo,
    "dpo": dpo,
    "evaluate": evaluate,
    "report": report,
}
