"""Refreshing the reward model while the policy trains: the current version's members learn on from where they are, on a
mix of old, fresh and caught pairs, and the result takes over if it is better on the fresh and not worse on the old.

Fresh pairs are held out by their prompt's place in the same order as the original ones (rm_pairs.held_out_position), so
what was held out once stays held out, and prompts of the original held-out pairs are always among them. Pairs about the
prompts of the evaluation, which people compare too, are left out.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cluster.data_records import read_training_pairs
from cluster.hf_training import Emit, FitSettings, silence_progress_bars, torch_threads
from cluster.reward_models import RewardModels, RmManifest, StoredRm
from cluster.text import load_tokenizer
from configs.run import RefreshSection, RunConfig
from reward_service.card.card import PolicyAnswer
from reward_service.preferences import accuracy
from reward_service.rm.caught import caught_pairs, read_caught
from reward_service.rm.fit import FitJob
from reward_service.rm.loss import LossSettings
from reward_service.rm.measure import Ensemble, manifest_of, scoring_device, trains_on_gpu
from reward_service.rm.members import fit_all
from reward_service.rm.pairs import (
    EncodedPair,
    PairSets,
    encode_pairs,
    files_digest,
    held_out_position,
    load_pairs,
    own_pairs,
    rebalanced,
    training_labels,
)
from reward_service.rm.validate import with_card

CARD_ANSWERS: Final = 300
"""Of a kind, scored for a refreshed version's card: fewer than at first, since a run waits for it."""
LOSS_GAIN: Final = 0.002
"""By so much, in nats a pair, the loss on fresh pairs must fall to count as better."""


@dataclass(frozen=True)
class RefreshRequest:
    """`number`: counts refreshes from 1. `policy_version`: newest one whose answers are among `fresh`. `fresh`: files
    of PreferencePair lines, of all refreshes so far. `caught`: files of {"prompt", "answer", "reason",
    "policy_version"} lines; one that does not exist is empty."""

    number: int
    reason: str
    policy_version: int
    fresh: tuple[Path, ...]
    caught: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Both models on the same held-out pairs: accuracy, and mean Bradley–Terry loss. Zeros for no pairs."""

    pairs: int = 0
    before: float = 0.0
    after: float = 0.0
    before_loss: float = 0.0
    after_loss: float = 0.0


@dataclass(frozen=True)
class RefreshOutcome:
    """`version`: of the refreshed model, accepted or not; `parent`: of the one that it learned on from. `why`: one
    sentence. `disagreement`: share of the newest fresh pairs, those of later policies than the old model knew, that it
    orders otherwise than the judge; None without any. `counts`: pairs by kind: old, fresh, caught (each in the mix of
    the first member), caught_left_out, old_held_out, fresh_held_out."""

    accepted: bool
    version: str
    parent: str
    why: str
    old: Comparison
    fresh: Comparison
    disagreement: float | None
    counts: dict[str, int]
    seconds: float


@dataclass(frozen=True)
class _Fresh:
    """All fresh pairs so far. `newest`: those of policies that the serving model has learned nothing of."""

    train: list[EncodedPair]
    held_out: list[EncodedPair]
    newest: list[EncodedPair]


@dataclass(frozen=True)
class _Mixes:
    """What each member learns from, and what is in the first one's."""

    pairs: list[list[EncodedPair]]
    counts: dict[str, int]


def refresh_rm(config: RunConfig, run_dir: Path, request: RefreshRequest, emit: Emit) -> RefreshOutcome:
    """Train from the current version, measure both, publish the new one and make it current, or refuse it. Announcing
    it to the reward workers is the caller's.

    `emit` gets {"role": "refresh", "event": "training", "note"}. Raises ModelError (no
    reward model, disk full), DataError (a damaged file), NonFiniteError (the fit diverged); then nothing has changed.
    """
    started_s = time.monotonic()
    silence_progress_bars()
    settings = config.rm.refresh or RefreshSection()
    models = RewardModels(run_dir / "rm")
    parent = models.current()
    tokenizer = load_tokenizer(parent.member_dirs[0])
    sets = load_pairs(config, run_dir, tokenizer=tokenizer)
    known_version = -1 if parent.manifest.policy_version is None else parent.manifest.policy_version
    fresh = _load_fresh(config, run_dir, request.fresh, after_version=known_version, sets=sets, tokenizer=tokenizer)
    mixes = _mix(config, request, settings=settings, sets=sets, fresh=fresh, parent=parent, tokenizer=tokenizer)
    emit({"role": "refresh", "event": "training", "note": _listed(mixes.counts)})
    with models.draft() as draft:
        _train(config, parent, draft=draft, mixes=mixes.pairs, settings=settings, number=request.number)
        with torch_threads(settings.threads):
            before = _ensemble(config, parent.path, manifest=parent.manifest, tokenizer=tokenizer)
            after = _ensemble(config, draft, manifest=parent.manifest, tokenizer=tokenizer)
            after.take_scales(sets.calibration)
            old, new = (_compare(before, after, pairs) for pairs in (sets.held_out, fresh.held_out))
            manifest = manifest_of(
                draft, ensemble=after, sets=sets, number=models.next_number, parent=parent.version,
                reason=request.reason, policy_version=request.policy_version,
                pairs_train=sum(mixes.counts[kind] for kind in ("old", "fresh", "caught")),
                data_digest=files_digest(_data_files(run_dir, request)),
            )  # fmt: skip
            manifest, _ = with_card(
                config, draft, manifest=manifest, ensemble=after, sets=sets, tokenizer=tokenizer,
                policy=_policy_answers(fresh.newest), answers=CARD_ANSWERS,
            )  # fmt: skip
            disagreement = 1 - accuracy(before.margins(fresh.newest)) if fresh.newest else None
        accepted, why = decide(old, new, old_accuracy_margin=settings.old_accuracy_margin)
        if accepted and manifest.verdict == "red" and not config.rm.accept_red:
            accepted, why = False, f"{why}; yet under rm.min_accuracy on old pairs: {old.after:.3f}"
        if accepted:
            models.publish(draft, manifest)
        else:
            models.refuse(draft, manifest)
    counts = mixes.counts | {"old_held_out": len(sets.held_out), "fresh_held_out": len(fresh.held_out)}
    return RefreshOutcome(
        accepted=accepted, version=manifest.version, parent=parent.version, why=why, old=old, fresh=new,
        disagreement=disagreement, counts=counts, seconds=round(time.monotonic() - started_s, 2),
    )  # fmt: skip


def decide(old: Comparison, fresh: Comparison, *, old_accuracy_margin: float) -> tuple[bool, str]:
    """(taken over?, why). Not worse on old pairs by more than the margin, and better on fresh ones.

    Better is a lower loss: it uses how sure the model is of each pair, where the accuracy of a few dozen pairs moves in
    steps of percents. The accuracy counts beyond its own noise, one standard error of n fair coins: more above decides
    for the new model whatever the loss, more below against it. Without fresh held-out pairs nothing shows that it is
    better: refused.
    """
    if old.after < old.before - old_accuracy_margin:
        return False, f"worse on old pairs: {old.before:.3f} → {old.after:.3f}, margin {old_accuracy_margin}"
    if not fresh.pairs:
        return False, "no fresh pairs are held out, so nothing shows that it is better"
    noise, change = math.sqrt(0.25 / fresh.pairs), fresh.after - fresh.before
    shown = (
        f"loss {fresh.before_loss:.3f} → {fresh.after_loss:.3f}, accuracy {fresh.before:.3f} → {fresh.after:.3f} on "
        f"{fresh.pairs} fresh pairs; on old {old.before:.3f} → {old.after:.3f}"
    )
    if change < -noise:
        return False, f"worse on fresh pairs: {shown}"
    if fresh.after_loss < fresh.before_loss - LOSS_GAIN or change > noise:
        return True, f"better on fresh pairs: {shown}"
    return False, f"not better on fresh pairs: {shown}"


# ---------------------------------------------------------------- data


def _load_fresh(
    config: RunConfig, run_dir: Path, files: Sequence[Path], *, after_version: int, sets: PairSets, tokenizer: Any
) -> _Fresh:
    settings = config.rm.refresh or RefreshSection()
    original = {pair.prompt_id for pair in sets.held_out}
    fresh = _Fresh([], [], [])
    for path in files:
        judged = read_training_pairs(path, run_dir=run_dir)
        labelled = training_labels(judged, held_out=sets.held_out_annotators)
        for pair in encode_pairs(labelled, data=config.data, tokenizer=tokenizer, judged=judged):
            position = held_out_position(pair.prompt_id, seed=config.seed)
            kept_out = pair.prompt_id in original or position < settings.held_out_fraction
            (fresh.held_out if kept_out else fresh.train).append(pair)
    fresh.newest.extend(_by_age([*fresh.train, *fresh.held_out], after_version=after_version)[0])
    return fresh


def _by_age(pairs: Sequence[EncodedPair], *, after_version: int) -> tuple[list[EncodedPair], list[EncodedPair]]:
    """(with an answer of a later policy than `after_version`, the others)."""
    newest: list[EncodedPair] = []
    earlier: list[EncodedPair] = []
    for one in pairs:
        version = max(one.pair.policy_version or 0, one.pair.rejected_version or 0)
        (newest if version > after_version else earlier).append(one)
    return newest, earlier


def _mix(
    config: RunConfig,
    request: RefreshRequest,
    *,
    settings: RefreshSection,
    sets: PairSets,
    fresh: _Fresh,
    parent: StoredRm,
    tokenizer: Any,
) -> _Mixes:
    """Of each member: old pairs drawn anew from its own share, its own share of the fresh ones, and caught answers."""
    members, discriminator = parent.manifest.members, parent.manifest.discriminator
    balanced = rebalanced(sets.train, config=config)
    held_out = {pair.prompt_id for pair in (*sets.held_out, *fresh.held_out)}
    answers = read_caught(request.caught)
    mixes = []
    counts: dict[str, int] = {}
    for member in range(members + discriminator):
        old, new = (
            own_pairs(pairs, config=config, member=member, members=members, discriminator=discriminator)
            for pairs in (balanced, fresh.train)
        )
        rng = random.Random(f"refresh {config.seed} {request.number} {member}")
        old = rng.sample(old, min(settings.old_pairs, len(old)))
        newest, earlier = _by_age(new, after_version=parent.manifest.policy_version or 0)
        if settings.earlier_fresh_pairs is not None:
            earlier = rng.sample(earlier, min(settings.earlier_fresh_pairs, len(earlier)))
        new = [*newest, *earlier]
        most = math.floor(settings.caught_fraction / (1 - settings.caught_fraction) * (len(old) + len(new)))
        caught = caught_pairs(answers, examples=[*sets.train, *fresh.train], held_out=held_out, most=most,
                              data=config.data, tokenizer=tokenizer)  # fmt: skip
        mixes.append([*old, *new, *caught])
        counts = counts or {
            "old": len(old), "fresh": len(new), "caught": len(caught), "caught_left_out": len(answers) - len(caught)
        }  # fmt: skip
    return _Mixes(mixes, counts)


def _policy_answers(pairs: Sequence[EncodedPair]) -> list[PolicyAnswer]:
    return [PolicyAnswer(one.pair.prompt, answer) for one in pairs for answer in (one.pair.chosen, one.pair.rejected)]


def _data_files(run_dir: Path, request: RefreshRequest) -> list[Path]:
    original = run_dir / "data" / "preferences.jsonl"
    return [path for path in (original, *request.fresh, *request.caught) if path.is_file()]


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in counts.items() if count)


# ---------------------------------------------------------------- models


def _train(
    config: RunConfig,
    parent: StoredRm,
    *,
    draft: Path,
    mixes: Sequence[list[EncodedPair]],
    settings: RefreshSection,
    number: int,
) -> None:
    starts = [*parent.member_dirs, *([parent.discriminator_dir] if parent.discriminator_dir else [])]
    jobs = [
        FitJob(
            start=start,
            has_head=True,
            target=draft / start.name,
            tokenizer_dir=start,
            pairs=mix,
            settings=FitSettings(
                examples=len(mix),
                epochs=settings.epochs,
                batch_size=config.rm.batch_size,
                learning_rate=settings.learning_rate,
                seed=config.seed + 1000 * (member + 1) + number,
                warmup_fraction=settings.warmup_fraction,
            ),
            loss=LossSettings(config.rm.label_smoothing, config.rm.centering),
            largest_margin=config.rm.margin,
            on_gpu=settings.gpus > 0 and trains_on_gpu(config),
            fields={"member": member},
        )
        for member, (start, mix) in enumerate(zip(starts, mixes, strict=True))
    ]
    fit_all(jobs, parallel=1, threads=settings.threads, emit=_silent)


def _silent(_event: dict[str, Any]) -> None:
    """The rm stage's progress is not a refresh's."""


def _ensemble(config: RunConfig, directory: Path, *, manifest: RmManifest, tokenizer: Any) -> Ensemble:
    stored = StoredRm(directory, manifest)
    settings = config.rm.refresh or RefreshSection()
    device = scoring_device(config) if settings.gpus > 0 else "cpu"
    return Ensemble.of(stored, reward=config.reward, tokenizer=tokenizer, device=device)


def _compare(before: Ensemble, after: Ensemble, pairs: Sequence[EncodedPair]) -> Comparison:
    if not pairs:
        return Comparison()
    first, second = before.margins(pairs), after.margins(pairs)
    return Comparison(len(pairs), accuracy(first), accuracy(second), _mean_loss(first), _mean_loss(second))


def _mean_loss(margins: Sequence[float]) -> float:
    """Mean −log σ(margin), without overflow."""
    return sum(max(0.0, -margin) + math.log1p(math.exp(-abs(margin))) for margin in margins) / len(margins)
