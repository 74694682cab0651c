"""What each stage does, in terms of the packages below. Offline stages run in a Ray task, online ones in roles."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from cluster.data import prepare_data
from cluster.text import resolve_model_dir
from configs.run import PretrainedModel, RunConfig, Stage
from keel.collect import collect_preferences
from keel.evaluate import evaluate_policy, write_samples, write_summary
from keel.online import run_online
from keel.report import write_report
from keel.roles import Roles
from keel.rundir import append_progress
from keel.runtime import Runtime


def _offline(stage_path: str, config: RunConfig, run_dir: Path) -> None:
    """Body of a stage's Ray task. Imports there, so that the driver never loads a trainer."""
    from cluster.plugin import resolve

    resolve(stage_path, key="stage")(config, run_dir, functools.partial(append_progress, run_dir))


def data(runtime: Runtime, roles: Roles) -> None:
    """Text and records of the run, and the model it starts from."""
    del roles
    model = runtime.config.model
    if isinstance(model, PretrainedModel):
        resolve_model_dir(model.path)  # Before anything is started: a wrong path is the commonest mistake.
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
    """Preference pairs from the SFT policy; nothing to do where preferences were given."""
    if runtime.config.data.preferences is None:
        collect_preferences(runtime, roles)


def rm(runtime: Runtime, roles: Roles) -> None:
    """The reward model."""
    roles.clear_gpu()
    config = runtime.config
    runtime.call(
        _offline, "reward_service.rm_train:run_rm", config, runtime.run.path, threads=config.rm.threads,
        gpus=config.learner.gpus_per_rank,
    )  # fmt: skip


def ppo(runtime: Runtime, roles: Roles) -> None:
    """Baseline evaluation, then the online loop."""
    run_online(runtime, roles)


def evaluate(runtime: Runtime, roles: Roles) -> None:
    """The final policy on the held-out prompts, beside the SFT policy's answers to the same."""
    evaluate_policy(runtime, roles, tag="final", model_dir=runtime.run.path / "policy" / "final")
    write_samples(runtime)


def report(runtime: Runtime, roles: Roles) -> None:
    """summary.json and report.html."""
    del roles
    write_summary(runtime)
    write_report(runtime.run.path)


STAGE_FUNCTIONS: Final[Mapping[Stage, Callable[[Runtime, Roles], None]]] = {
    "data": data,
    "sft": sft,
    "collect": collect,
    "rm": rm,
    "ppo": ppo,
    "evaluate": evaluate,
    "report": report,
}
