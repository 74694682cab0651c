"""The reader: names, state, resets, and the reference from a run's files."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from cluster.data_records import PreferencePair, PromptRecord, SftExample, data_dir, write_rows
from cluster.errors import DataError
from cluster.reward_models import Calibration, RmManifest
from configs.guard import GuardSection, Thresholds
from examples.support_desk.world import make, mediocre_answer
from learner.guard.reading import SignalReader, StepView
from learner.guard.reference import Reference, RewardScale, RewardScales, load_reference

SCALE = RewardScale(0.0, 1.0, 0.1)
MEASURED = {"win_rate", "win_rate_length_controlled", "rm_judge_agreement", "anchor_perplexity_ratio"} | {
    "canary_ks", "canary_z"
}  # fmt: skip
"""Beside training."""


def encode(text: str) -> list[int]:
    """A word a token, by a hash that is the same in every process."""
    return [sum(map(ord, word)) % 997 + 1 for word in text.split()] + [0]


def answer(rng: random.Random) -> str:
    return mediocre_answer("noisy fan", rng)


def reference(rng: random.Random, count: int = 600) -> Reference:
    texts = tuple(answer(rng) for _ in range(count))
    return Reference(
        answers=texts,
        prompts=tuple(map(str, range(count))),
        token_ids=tuple(np.array(encode(text), dtype=np.int32) for text in texts),
        rewards=np.array([rng.gauss(0, 1) for _ in range(count)]),
        rewards_version="rm",
        sft_ids=tuple(np.array(encode(answer(rng)), dtype=np.int32) for _ in range(100)),
    )


def reader(known: Reference) -> SignalReader:
    return SignalReader(known, scales={"rm": SCALE}.get, ceiling=0.8)


def view(step: int, rng: random.Random, *, count: int = 64, each: int = 2) -> StepView:
    texts = tuple(answer(rng) for _ in range(count))
    return StepView(
        step=step,
        prompts=("why?",) * count,
        texts=texts,
        response_ids=tuple(np.array(encode(text), dtype=np.int32) for text in texts),
        prompt_ids=tuple(str(place // each) for place in range(count)),
        rewards=tuple(rng.gauss(0, 1) for _ in range(count)),
        spreads=(0.1,) * count,
        rm_versions=("rm",) * count,
        truncated=(False,) * count,
        record={
            "proxy_z": 0.1,
            "kl_nats_per_sequence": 0.2 * step,
            "kl_budget_share": 0.01 * step,
            "entropy_nats_per_token": 0.5,
            "clip_fraction": 0.1,
            "ratio_tail_fraction": 0.0,
            "behaviour_gap_max_nats": 0.1,
            "value_error_ratio": 0.9,
            "grad_norm_policy": 1.0 + step % 2,
            "reward_mean": 0.0,
        },
    )


def test_every_signal_of_the_settings_is_read_and_no_other() -> None:
    rng = random.Random(0)
    one = reader(reference(rng))
    for step in range(1, 7):
        reading = one.read(view(step, rng))
    assert set(reading.values) == set(Thresholds.model_fields) - MEASURED
    assert reading.words == ()
    assert reading.values["kl_slope_nats_per_step"] == pytest.approx(0.2)
    assert reading.values["kl_budget_share"] == 0.06
    assert reading.values["uncertainty_ratio"] == pytest.approx(1.0)
    assert all(math.isfinite(value) for value in reading.values.values())


def test_the_policy_before_training_is_under_every_threshold() -> None:
    rng = random.Random(0)
    one, thresholds = reader(reference(rng)), GuardSection().thresholds
    for step in range(1, 13):
        for name, value in one.read(view(step, rng, count=128)).values.items():
            limits = getattr(thresholds, name)
            if limits.warn is not None and name != "kl_nats_per_sequence":
                assert value < limits.warn if type(limits).__name__ == "Above" else value > limits.warn, name


def test_with_nothing_to_compare_with_the_rest_is_still_told() -> None:
    rng = random.Random(0)
    one = SignalReader(Reference(), scales=lambda _: None, ceiling=0.8)
    values = one.read(replace(view(40, rng), rm_versions=("none",) * 64)).values
    needs_reference = {"response_tokens_ratio", "distinct_bigrams_ratio", "compression_ratio", "rare_token_fraction"}
    needs_reference |= {"overused_words_share", "overused_words_cusum", "copied_fraction", "reward_ks"}
    needs_reference |= {"reward_std_ratio"}
    assert not needs_reference & values.keys()
    assert {"longest_repeat_fraction", "length_reward_correlation", "truncated_fraction", "proxy_z"} <= values.keys()


def test_the_state_goes_through_json_and_changes_nothing() -> None:
    rng = random.Random(0)
    known = reference(rng)
    one = reader(known)
    for step in range(1, 20):
        other = reader(known)
        other.from_state(json.loads(json.dumps(one.to_state())))
        seen = view(step, rng)
        assert other.read(seen) == one.read(seen)


def test_after_a_reset_windows_start_anew_and_the_start_stays() -> None:
    rng = random.Random(0)
    one = reader(reference(rng))
    for step in range(1, 7):
        one.read(view(step, rng))
    one.reset()
    values = one.read(view(7, rng)).values
    assert not {"kl_slope_nats_per_step", "grad_norm_ratio", "reward_jump"} & values.keys()
    assert "reward_ks" in values


def test_an_empty_batch_tells_its_record_alone() -> None:
    empty = StepView.of([], prompts=[], texts=[], step=1, record=view(1, random.Random(0), count=2).record)
    assert set(reader(reference(random.Random(0))).read(empty).values) == {
        "proxy_z", "kl_nats_per_sequence", "kl_budget_share", "entropy_nats_per_token", "clip_fraction",
        "ratio_tail_fraction", "behaviour_gap_max_nats", "value_error_ratio",
    }  # fmt: skip


def test_a_share_of_no_budget_is_absent() -> None:
    rng = random.Random(0)
    seen = view(1, rng)
    record = {name: value for name, value in seen.record.items() if name != "kl_budget_share"}
    values = reader(reference(rng)).read(replace(seen, record=record)).values
    assert "kl_budget_share" not in values
    assert "kl_nats_per_sequence" in values


def test_odd_answers_raise_nothing() -> None:
    rng = random.Random(0)
    texts = ("", "\ud800 lone surrogate", "🙂" * 500, "a" * 100_000, "\x00", "'’", "数据 数据 数据")
    odd = replace(
        view(1, rng, count=len(texts)),
        texts=texts,
        response_ids=tuple(np.array(encode(text), dtype=np.int32) for text in texts),
        rewards=(1.0,) * len(texts),
        record={"kl_nats_per_sequence": math.nan, "grad_norm_policy": math.inf},
    )
    values = reader(reference(rng)).read(odd).values
    assert values["reward_std_ratio"] == 0.0
    assert "kl_nats_per_sequence" not in values
    assert "length_reward_correlation" not in values
    single = replace(view(1, rng, count=1), texts=("one",))
    assert "length_reward_correlation" not in reader(reference(rng)).read(single).values


# ------------------------------------------------------------ from files


def test_a_reference_is_made_of_what_the_first_policy_wrote(tmp_path: Path) -> None:
    make(data_dir(tmp_path), seed=0, sft_examples=50, prompts=10, eval_prompts=4)
    pairs = [
        PreferencePair(
            pair_id="0", prompt="p", chosen="mine a", rejected="mine b", policy_version=0, source="collected"
        ),
        PreferencePair(
            pair_id="1", prompt="p", chosen="later a", rejected="mine c", policy_version=9, rejected_version=0
        ),
        PreferencePair(pair_id="2", prompt="p", chosen="people's", rejected="people's too"),
    ]
    write_rows(data_dir(tmp_path) / "preferences.jsonl", pairs)
    rows = [{"prompt": "q", "answer": "held out", "truncated": False, "reward": 0.5, "gold": 1.0}]
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "sft.rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_reference(tmp_path, encode=encode)
    assert found.answers == ("held out", "mine a", "mine b")
    assert len(set(found.prompts)) == 2
    assert found.prompts[1] == found.prompts[2]
    assert [ids.tolist() for ids in found.token_ids] == [encode(text) for text in found.answers]
    assert len(found.sft_ids) == 50
    assert len(found.rewards) == 0, "their scale is not known"
    (tmp_path / "eval" / "sft.json").write_text('{"rm_version": "rm-1"}')
    found = load_reference(tmp_path, encode=encode)
    assert (found.rewards.tolist(), found.rewards_version) == ([0.5], "rm-1")


def test_a_run_without_files_has_an_empty_reference_and_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    assert load_reference(tmp_path, encode=encode).answers == ()
    write_rows(data_dir(tmp_path) / "sft.jsonl", [PromptRecord(prompt_id="x", prompt="y")])
    with pytest.raises(DataError, match=r"sft\.jsonl:1"):
        load_reference(tmp_path, encode=encode)
    write_rows(data_dir(tmp_path) / "sft.jsonl", [SftExample(prompt="p", answer="a")])
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "sft.rows.jsonl").write_text('{"prompt": "p"}\n')
    with pytest.raises(DataError, match=r"sft\.rows\.jsonl"):
        load_reference(tmp_path, encode=encode)


def test_scales_are_the_manifests(tmp_path: Path) -> None:
    version = tmp_path / "versions" / "rm-1"
    (version / "member_0").mkdir(parents=True)
    calibration = Calibration(mean=1.0, std=2.0, count=100)
    manifest = RmManifest(version="rm-1", members=1, calibration=calibration, spread_percentiles=(0.0, 0.5, 1.0))
    (version / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    scales = RewardScales(tmp_path)
    assert scales("rm-1") == RewardScale(1.0, 2.0, 0.5)
    assert scales("rm-1~rules") is None
    assert scales("none") is None
    assert scales("rm-2") is None
