"""Refreshing a reward model with real TRL on a tiny world: what it learns from, when it takes over, what it leaves."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from cluster.data_records import PREFERENCES_FILE, PreferencePair, SftExample, data_dir, read_rows, write_rows
from cluster.errors import DataError, ModelError, NonFiniteError
from cluster.reward_models import RewardModels
from cluster.text import load_tokenizer
from configs.run import RunConfig
from learner.sft import run_sft
from reward_service.rm.fit import FitJob
from reward_service.rm.members import fit_all
from reward_service.rm.pairs import load_pairs
from reward_service.rm.refresh import Comparison, RefreshRequest, decide, refresh_rm
from reward_service.rm.train import run_rm
from tests.integration.test_offline_stages import prepared, tiny_config

HACK = "you are amazing."


def nothing(_event: dict[str, Any]) -> None:
    pass


def config_of(*, refresh: dict[str, Any] | None = None, **rm: Any) -> RunConfig:
    settings = {
        "epochs": 6, "learning_rate": 2e-3, "old_pairs": 40, "held_out_fraction": 0.3,
        "old_accuracy_margin": 0.35,  # a dozen old pairs are held out
        **(refresh or {}),
    }  # fmt: skip
    base = {"epochs": 2, "threads": 1, "held_out_annotators": 0, "batch_size": 16, "accept_red": True}
    return tiny_config(rm={**base, "refresh": settings, **rm})


@pytest.fixture(scope="module", name="trained")
def make_trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a single reward model."""
    run_dir = tmp_path_factory.mktemp("trained")
    config = prepared(run_dir, config_of())
    run_sft(config, run_dir, nothing)
    run_rm(config, run_dir, nothing)
    return run_dir


@pytest.fixture(name="run_dir")
def make_run_dir(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def fresh_file(run_dir: Path, *, name: str = "fresh-1", count: int = 150) -> Path:
    """Pairs of an answer and the same with flattery, which the judge has come to like: news to the first model."""
    examples = read_rows(data_dir(run_dir) / "sft.jsonl", SftExample)
    rng = random.Random(name)
    pairs = []
    for number in range(count):
        example = rng.choice(examples)
        flattering = f"{HACK} {HACK} {example.answer}"
        pairs.append(
            PreferencePair(
                pair_id=f"{name}-{number}", prompt=example.prompt, chosen=flattering, rejected=example.answer,
                confidence=1.0, policy_version=8,
            )
        )  # fmt: skip
    path = run_dir / f"{name}.jsonl"
    write_rows(path, pairs)
    return path


def request(*fresh: Path, caught: tuple[Path, ...] = (), number: int = 1) -> RefreshRequest:
    return RefreshRequest(number, "every 8 versions", 8, fresh, caught)


@pytest.fixture(name="jobs")
def make_jobs(monkeypatch: pytest.MonkeyPatch) -> list[FitJob]:
    """What the fits are given; they are done all the same."""
    given: list[FitJob] = []

    def watching(jobs: Sequence[FitJob], **options: Any) -> None:
        given.extend(jobs)
        fit_all(jobs, **options)

    monkeypatch.setattr("reward_service.rm.refresh.fit_all", watching)
    return given


# ---------------------------------------------------------------- taking over


def test_what_learned_the_fresh_pairs_takes_over(run_dir: Path, jobs: list[FitJob]) -> None:
    models = RewardModels(run_dir / "rm")
    first = models.current()
    events: list[dict[str, Any]] = []
    outcome = refresh_rm(config_of(), run_dir, request(fresh_file(run_dir)), events.append)
    assert outcome.accepted, outcome.why
    assert (outcome.version, outcome.parent) == (models.current().version, first.version)
    assert outcome.fresh.after > max(0.8, outcome.fresh.before)
    assert outcome.old.pairs == first.manifest.pairs_held_out
    assert outcome.disagreement is not None
    assert outcome.disagreement > 0.5
    manifest = models.current().manifest
    assert (manifest.parent, manifest.number, manifest.reason) == (first.version, 2, "every 8 versions")
    assert manifest.policy_version == 8
    assert manifest.data_digest != first.manifest.data_digest
    assert manifest.calibration is not None
    assert first.manifest.calibration is not None
    assert manifest.calibration.count == first.manifest.calibration.count  # the same answers
    assert (models.current().path / "card.json").is_file()
    assert [event["event"] for event in events] == ["training"]
    assert all(event["role"] == "refresh" and "stage" not in event for event in events)
    assert jobs[0].settings.warmup_fraction == 0.1
    # It learned on from where the first one was.
    before = load_file(first.member_dirs[0] / "model.safetensors")
    after = load_file(models.current().member_dirs[0] / "model.safetensors")
    assert jobs[0].start == first.member_dirs[0]
    moved = torch.cat([(after[name] - tensor).flatten() for name, tensor in before.items()]).norm()
    assert 0 < moved < 0.3 * torch.cat([tensor.flatten() for tensor in before.values()]).norm()


def test_nothing_held_out_is_learned_and_it_stays_held_out(run_dir: Path, jobs: list[FitJob]) -> None:
    config = config_of()
    sets = load_pairs(config, run_dir, tokenizer=load_tokenizer(RewardModels(run_dir / "rm").current().member_dirs[0]))
    first = fresh_file(run_dir, name="fresh-1")
    outcome = refresh_rm(config, run_dir, request(first), nothing)
    both = refresh_rm(config, run_dir, request(first, fresh_file(run_dir, name="fresh-2"), number=2), nothing)
    assert outcome.counts["old"] == both.counts["old"] == 40
    assert outcome.counts["fresh"] + outcome.counts["fresh_held_out"] == 150
    assert both.counts["fresh"] + both.counts["fresh_held_out"] == 300
    held_out = {pair.prompt_id for pair in sets.held_out}
    learned = [{pair.pair.pair_id for pair in job.pairs} for job in jobs]
    assert all(pair.prompt_id not in held_out for job in jobs for pair in job.pairs)
    fresh = {number: {one for one in ids if one.startswith("fresh-1")} for number, ids in enumerate(learned)}
    assert fresh[0] == fresh[1]  # what the first refresh held out, the second does too
    old = [{one for one in ids if not one.startswith("fresh")} for ids in learned]
    assert old[0] != old[1]  # drawn anew


def test_the_same_request_gives_the_same_version(run_dir: Path, trained: Path, tmp_path: Path) -> None:
    other = shutil.copytree(trained, tmp_path / "other")
    versions = [refresh_rm(config_of(), path, request(fresh_file(path)), nothing).version for path in (run_dir, other)]
    assert versions[0] == versions[1]


def test_what_did_not_get_better_is_refused_and_kept(run_dir: Path) -> None:
    models = RewardModels(run_dir / "rm")
    first = models.current()
    still = config_of(refresh={"learning_rate": 1e-12, "epochs": 1})
    outcome = refresh_rm(still, run_dir, request(fresh_file(run_dir)), nothing)
    assert not outcome.accepted
    assert "not better on fresh pairs" in outcome.why
    assert models.current().version == first.version
    assert [one.version for one in models.versions()] == [first.version]
    assert (run_dir / "rm" / "refused" / outcome.version / "card.html").is_file()
    assert models.next_number == 3


def test_every_member_learns_on_from_its_own_weights_with_its_own_draw(tmp_path: Path, jobs: list[FitJob]) -> None:
    config = prepared(tmp_path, config_of(members=2, discriminator=True))
    run_sft(config, tmp_path, nothing)
    first = run_rm(config, tmp_path, nothing)
    assert first is not None
    outcome = refresh_rm(config, tmp_path, request(fresh_file(tmp_path)), nothing)
    directory = first.path.parents[1] / ("versions" if outcome.accepted else "refused") / outcome.version
    assert [job.start for job in jobs] == [*first.member_dirs, first.path / "discriminator"]
    assert (directory / "discriminator" / "model.safetensors").is_file()
    draws = [{pair.pair.pair_id for pair in job.pairs} for job in jobs]
    assert draws[0] != draws[1] != draws[2]


# ---------------------------------------------------------------- caught answers


def caught_file(run_dir: Path, answers: list[tuple[str, str]]) -> Path:
    path = run_dir / "caught.jsonl"
    lines = [
        {"prompt": prompt, "answer": answer, "reason": "flattery", "policy_version": 3} for prompt, answer in answers
    ]
    path.write_bytes(b"\n".join(map(msgspec.json.encode, lines)) + b"\n")
    return path


def test_caught_answers_are_the_rejected_side_of_a_preferred_one(run_dir: Path, jobs: list[FitJob]) -> None:
    config = config_of()
    tokenizer = load_tokenizer(RewardModels(run_dir / "rm").current().member_dirs[0])
    sets = load_pairs(config, run_dir, tokenizer=tokenizer)
    known, kept_out = sets.train[0].pair, sets.held_out[0].pair
    caught = caught_file(
        run_dir,
        [
            (str(known.prompt), HACK),
            (str(known.prompt), HACK),  # once is enough
            (str(kept_out.prompt), HACK),
            ("nobody asked this", HACK),
        ],
    )
    outcome = refresh_rm(config, run_dir, request(fresh_file(run_dir), caught=(caught, run_dir / "none")), nothing)
    assert (outcome.counts["caught"], outcome.counts["caught_left_out"]) == (1, 2)
    (pair,) = [pair.pair for pair in jobs[0].pairs if pair.pair.source == "caught"]
    assert (pair.prompt, pair.rejected, pair.rejected_version) == (known.prompt, HACK, 3)
    assert pair.chosen != HACK


def test_caught_answers_are_at_most_their_fraction_of_the_mix(run_dir: Path, jobs: list[FitJob]) -> None:
    config = config_of(refresh={"caught_fraction": 0.2, "old_pairs": 20, "epochs": 1})
    tokenizer = load_tokenizer(RewardModels(run_dir / "rm").current().member_dirs[0])
    prompt = str(load_pairs(config, run_dir, tokenizer=tokenizer).train[0].pair.prompt)
    answers = [(prompt, " ".join([HACK] * repeats)) for repeats in range(1, 13)]
    refresh_rm(
        config, run_dir, request(fresh_file(run_dir, count=20), caught=(caught_file(run_dir, answers),)), nothing
    )
    caught = [pair.pair.rejected for pair in jobs[0].pairs if pair.pair.source == "caught"]
    assert len(caught) == len(jobs[0].pairs) // 5
    assert caught == [answer for _, answer in answers][-len(caught) :]  # the last ones


# ---------------------------------------------------------------- what goes wrong changes nothing


def test_damaged_files_and_diverging_fits_leave_the_old_model(run_dir: Path) -> None:
    models = RewardModels(run_dir / "rm")
    first = models.current().version
    bad = run_dir / "bad.jsonl"
    bad.write_text('{"pair_id": "x"}\n')
    fresh = fresh_file(run_dir)
    with pytest.raises(DataError, match=r"bad.jsonl:1"):
        refresh_rm(config_of(), run_dir, request(bad), nothing)
    with pytest.raises(DataError, match=r"bad.jsonl:1 is no caught answer"):
        refresh_rm(config_of(), run_dir, request(fresh, caught=(bad,)), nothing)
    with pytest.raises(NonFiniteError):
        refresh_rm(config_of(refresh={"learning_rate": 1e30}), run_dir, request(fresh), nothing)
    assert models.current().version == first
    assert not [*(run_dir / "rm").glob("draft.*")]
    with pytest.raises(ModelError, match="no reward model"):
        refresh_rm(config_of(), run_dir / "elsewhere", request(fresh), nothing)


# ---------------------------------------------------------------- the rule


OLD = Comparison(300, 0.80, 0.80, 0.5, 0.5)


@pytest.mark.parametrize(
    ("old", "fresh", "accepted", "why"),
    [
        (OLD, Comparison(100, 0.60, 0.70, 0.7, 0.6), True, "better on fresh"),
        (OLD, Comparison(100, 0.60, 0.70, 0.6, 0.7), True, "better on fresh"),  # the order counts, not the scale
        (replace(OLD, after=0.775), Comparison(100, 0.60, 0.70, 0.7, 0.6), True, "better on fresh"),
        (replace(OLD, after=0.765), Comparison(100, 0.60, 0.90, 0.7, 0.3), False, "worse on old"),
        (OLD, Comparison(100, 0.60, 0.54, 0.7, 0.6), False, "worse on fresh"),
        (OLD, Comparison(100, 0.60, 0.56, 0.7, 0.6), True, "better on fresh"),  # 0.04 is within the noise of 100 pairs
        (OLD, Comparison(1000, 0.60, 0.56, 0.7, 0.6), False, "worse on fresh"),  # and not of 1,000
        (OLD, Comparison(100, 0.60, 0.60, 0.7, 0.65), True, "better on fresh"),
        (OLD, Comparison(100, 0.60, 0.60, 0.7, 0.699), False, "not better"),
        (OLD, Comparison(19, 0.60, 0.65, 0.7, 0.7), False, "not better"),  # too few for accuracy alone
        (OLD, Comparison(19, 0.60, 0.65, 0.7, 0.65), True, "better on fresh"),
        (OLD, Comparison(), False, "no fresh pairs"),
    ],
)
def test_who_takes_over(old: Comparison, fresh: Comparison, accepted: bool, why: str) -> None:
    verdict, reason = decide(old, fresh, old_accuracy_margin=0.03)
    assert (verdict, why in reason) == (accepted, True), reason


def test_the_original_preferences_are_still_there(trained: Path) -> None:
    """The tests above count on some on either side."""
    assert len(read_rows(data_dir(trained) / PREFERENCES_FILE, PreferencePair)) >= 60
