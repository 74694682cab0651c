"""The rm stage: reward models trained on the run's preferences, or taken as they are (rm.models), measured, and
published as a version.

Reads `<run_dir>/data/preferences.jsonl`, starts each member from `<run_dir>/sft/model` (or the run's initial model),
and writes `<run_dir>/rm/versions/<version>/`, complete or not at all, with its validation card; what is in it:
cluster/reward_models.py. Held-out pairs are the same for all members and share no prompt with training ones; with
several members, each also leaves out pairs of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from cluster.errors import ModelError
from cluster.hf_training import Emit, FitSettings, silence_progress_bars, torch_threads
from cluster.reward_models import RewardModels, RmManifest, StoredRm
from cluster.text import load_tokenizer, resolve_model_dir
from configs.run import PretrainedModel, RunConfig
from reward_service.rm.measure import (
    Ensemble,
    PrecisionCost,
    manifest_of,
    precision_cost,
    scoring_device,
    trains_on_gpu,
)
from reward_service.rm.pairs import PairSets, load_pairs, own_pairs, rebalanced
from reward_service.rm.validate import with_card


def run_rm(config: RunConfig, run_dir: Path, emit: Emit) -> StoredRm | None:
    """Train or take all members, measure them, publish them as the version that scores.

    `emit` gets {"stage": "rm", "member", "step", "steps", "loss"} every ten steps, at the end the manifest with
    "done": True. None, and nothing is done, where no reward model is among the reward's sources. Raises DataError (no
    or too few pairs), ModelError (no initial model, one of rm.models that does not fit the policy, disk full, a red
    card; the refused model is then in `<run_dir>/rm/refused`), NonFiniteError.
    """
    if not config.reward.needs_model:
        emit({"stage": "rm", "done": True, "note": "no reward model among reward.sources"})
        return None
    silence_progress_bars()
    model_dir, tokenizer_dir = _initial(config, run_dir)
    tokenizer = load_tokenizer(tokenizer_dir)
    sets = load_pairs(config, run_dir, tokenizer=tokenizer)
    models = RewardModels(run_dir / "rm")
    with models.draft() as draft:
        if config.rm.models:
            _take_all(config, model_dir, tokenizer=tokenizer, draft=draft)
        else:
            _train_all(config, model_dir, tokenizer_dir=tokenizer_dir, sets=sets, draft=draft, emit=emit)
        with torch_threads(config.rm.threads):
            manifest, reasons = _measured(
                config, draft, tokenizer=tokenizer, sets=sets, number=models.next_number, emit=emit
            )
        emit({"stage": "rm", "done": True, **msgspec.to_builtins(manifest), "reasons": list(reasons)})
        if manifest.verdict == "red" and not config.rm.accept_red:
            refused = models.refuse(draft, manifest)
            raise _too_weak(manifest, config=config, reasons=reasons, refused=refused)
        return models.publish(draft, manifest)


def _too_weak(manifest: RmManifest, *, config: RunConfig, reasons: Sequence[str], refused: Path) -> ModelError:
    return ModelError(
        "the reward model is too weak to train against",
        got=f"held-out accuracy {manifest.accuracy:.3f} ({manifest.accuracy_low:.3f}–{manifest.accuracy_high:.3f}), "
        f"length alone {manifest.length_only_accuracy:.3f}: {reasons[0]}",
        do=f"give more or clearer pairs, lower rm.min_accuracy ({config.rm.min_accuracy}), or set rm.accept_red to use "
        f"it all the same; its card is in {refused}",
    )


def _initial(config: RunConfig, run_dir: Path) -> tuple[Path, Path]:
    """Directories of the weights and the tokenizer that members start from."""
    sft = run_dir / "sft" / "model"
    if sft.is_dir():
        return sft, sft
    if isinstance(config.model, PretrainedModel):
        return resolve_model_dir(config.model.path), resolve_model_dir(config.model.tokenizer or config.model.path)
    init = run_dir / "init"
    if not init.is_dir():
        raise ModelError("no model to start the reward model from", got=f"neither {sft} nor {init}", do="run sft first")
    return init, init


def _take_all(config: RunConfig, policy_dir: Path, *, tokenizer: Any, draft: Path) -> None:
    from reward_service.rm.take import take_member

    for member, source in enumerate(config.rm.models):
        take_member(
            source,
            target=draft / f"member_{member}",
            policy_dir=policy_dir,
            tokenizer=tokenizer,
            max_sequence_tokens=config.max_sequence_tokens,
        )


def _train_all(
    config: RunConfig, model_dir: Path, *, tokenizer_dir: Path, sets: PairSets, draft: Path, emit: Emit
) -> None:
    """All members, and the discriminator as one more, each with its own seed and share of the pairs."""
    from reward_service.rm.fit import FitJob
    from reward_service.rm.loss import LossSettings
    from reward_service.rm.members import fit_all

    rm = config.rm
    pairs = rebalanced(sets.train, config=config)
    jobs = []
    for number in range(rm.members + rm.discriminator):
        own = own_pairs(pairs, config=config, member=number, members=rm.members, discriminator=rm.discriminator)
        jobs.append(
            FitJob(
                start=model_dir,
                has_head=False,
                target=draft / (f"member_{number}" if number < rm.members else "discriminator"),
                tokenizer_dir=tokenizer_dir,
                pairs=own,
                settings=FitSettings(
                    examples=len(own),
                    epochs=rm.epochs,
                    batch_size=rm.batch_size,
                    learning_rate=rm.learning_rate,
                    seed=config.seed + 1000 * (number + 1),
                ),
                loss=LossSettings(rm.label_smoothing, rm.centering),
                largest_margin=rm.margin,
                on_gpu=trains_on_gpu(config),
                fields={"member": number},
            )
        )
    fit_all(jobs, parallel=rm.parallel, threads=rm.threads, emit=emit)


def _measured(
    config: RunConfig, draft: Path, *, tokenizer: Any, sets: PairSets, number: int, emit: Emit
) -> tuple[RmManifest, tuple[str, ...]]:
    """The manifest, and the reasons for its verdict. Writes the card."""
    rm = config.rm
    ensemble = Ensemble(
        _member_dirs(config, draft),
        discriminator_dir=draft / "discriminator" if rm.discriminator and not rm.models else None,
        reward=config.reward,
        tokenizer=tokenizer,
        device=scoring_device(config),
    )
    ensemble.take_scales(sets.calibration)
    cost = _precision_cost(config, draft, ensemble=ensemble, sets=sets, tokenizer=tokenizer, emit=emit)
    manifest = manifest_of(
        draft,
        dtype=config.reward.dtype,
        float32_accuracy=None if cost is None else cost.float32_accuracy,
        ensemble=ensemble,
        sets=sets,
        number=number,
        data_digest=sets.digest,
        pairs_train=0 if rm.models else len(sets.train),
        taken_from=tuple(map(str, rm.models)),
    )
    return with_card(config, draft, manifest=manifest, ensemble=ensemble, sets=sets, tokenizer=tokenizer)


def _member_dirs(config: RunConfig, draft: Path) -> list[Path]:
    return [draft / f"member_{member}" for member in range(config.rm.ensemble)]


def _precision_cost(
    config: RunConfig, draft: Path, *, ensemble: Ensemble, sets: PairSets, tokenizer: Any, emit: Emit
) -> PrecisionCost | None:
    """What serving in another type than float32 costs, told as well; None in float32, and where a model that is taken
    as it is may not fit a GPU in float32."""
    dtype, device = config.reward.dtype, scoring_device(config)
    if dtype == "float32" or (config.rm.models and device == "cuda"):
        return None
    exact = Ensemble(
        _member_dirs(config, draft), reward=config.reward, tokenizer=tokenizer, device=device, dtype="float32"
    )
    exact.take_scales(sets.calibration)
    cost = precision_cost(ensemble, exact, sets.held_out, dtype=dtype)
    emit({"stage": "rm", "precision": asdict(cost), "note": str(cost)})
    return cost
