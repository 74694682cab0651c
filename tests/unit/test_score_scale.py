"""One scale of scores for each version of the reward model, warm from its calibration; answers that rules caught."""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import pytest

from cluster.errors import CheckpointError
from cluster.records import RuleVerdict, ScoredRollout
from cluster.reward_models import Calibration, RewardModels, RmManifest
from learner.batch import train_batch
from learner.caught import CaughtAnswers
from learner.score_scale import ScoreScale
from tests.learner_support import experience_of, new_critic, new_policy, rollouts


@pytest.fixture(name="models")
def make_models(tmp_path: Path) -> RewardModels:
    models = RewardModels(tmp_path / "rm")
    for number, (version, mean, std) in enumerate([("rm-a", 0.0, 1.0), ("rm-b", 100.0, 10.0)], start=1):
        with models.draft() as draft:
            (draft / "member_0").mkdir()
            calibration = Calibration(mean=mean, std=std, count=1000)
            models.publish(draft, RmManifest(version=version, members=1, number=number, calibration=calibration))
    return models


def scored(version: str, rewards: list[float]) -> list[ScoredRollout]:
    made = rollouts(len(rewards))
    return [
        msgspec.structs.replace(one, rm_version=version, reward=reward)
        for one, reward in zip(made, rewards, strict=True)
    ]


def test_a_new_version_does_not_make_the_reward_jump(models: RewardModels) -> None:
    """Two versions, one on ten times the scale and far away: the same standing gives the same normalised score."""
    scale = ScoreScale(models)
    first = scale.normalised(train_batch(scored("rm-a", [0.0, 1.0])), score_clip=5.0)
    second = scale.normalised(train_batch(scored("rm-b", [100.0, 110.0])), score_clip=5.0)
    assert second.tolist() == pytest.approx(first.tolist(), abs=1e-5)
    assert first.tolist() == pytest.approx([0.0, 1.0], abs=0.01)
    assert scale.version == "rm-b"


def test_beside_other_sources_a_new_version_goes_on_from_the_statistics_of_the_one_before(models: RewardModels) -> None:
    scale = ScoreScale(models)
    scale.normalised(train_batch(scored("rm-a~mix", [0.0, 1.0, 2.0, 3.0])), score_clip=5.0)
    at_the_swap = [3.0, 3.0]
    stayed = scale.normalised(train_batch(scored("rm-a~mix", at_the_swap)), score_clip=5.0)
    swapped = scale.normalised(train_batch(scored("rm-b~mix", at_the_swap)), score_clip=5.0)
    assert stayed.tolist()[0] > 0.5
    assert swapped.tolist()[0] > 0.5, "an answer that was good stays good"
    other = scale.normalised(train_batch(scored("rm-b~other-weights", at_the_swap)), score_clip=5.0)
    assert other.tolist() == pytest.approx([0.0, 0.0]), "another scale starts from its own first scores"


def test_versions_never_share_statistics(models: RewardModels) -> None:
    mixed = scored("rm-a", [1.0, -1.0]) + scored("rm-b", [90.0, 120.0])
    together = ScoreScale(models)
    together.normalised(train_batch(mixed), score_clip=5.0)
    apart = ScoreScale(models)
    apart.normalised(train_batch(mixed[:2]), score_clip=5.0)
    apart.normalised(train_batch(mixed[2:]), score_clip=5.0)
    assert together.normaliser == apart.normaliser
    assert together.normaliser.moments["rm-a"].count == 1002
    assert together.normaliser.moments["rm-a"].mean == pytest.approx(0.0)


def test_proxy_z_is_by_each_versions_calibration(models: RewardModels) -> None:
    scale = ScoreScale(models)
    assert scale.proxy_z(scored("rm-a", [1.0]) + scored("rm-b", [130.0])) == pytest.approx((1.0 + 3.0) / 2)
    assert scale.proxy_z(scored("rm-a~0f3c", [1.0])) is None, "a scale of other sources has no calibration"


def test_a_scale_of_other_sources_starts_from_its_own_batch(models: RewardModels) -> None:
    scale = ScoreScale(models)
    scores_B = scale.normalised(train_batch(scored("rm-a~0f3c", [7.0, 9.0])), score_clip=5.0)
    assert scores_B.tolist() == pytest.approx([-1.0, 1.0])


def test_state_comes_back_and_needs_its_version(models: RewardModels) -> None:
    scale = ScoreScale(models)
    scale.normalised(train_batch(scored("rm-b", [100.0, 130.0])), score_clip=5.0)
    state = json.loads(json.dumps(scale.to_state()))
    again = ScoreScale(models)
    again.load_state(state)
    assert again.to_state() == scale.to_state()
    models.make_current("rm-a")
    (models.path / "versions" / "rm-b").rename(models.path / "versions" / "gone")
    with pytest.raises(CheckpointError, match="another reward model"):
        ScoreScale(models).load_state(state)


def test_a_weight_scales_an_answers_advantages_and_no_others() -> None:
    made = rollouts()
    halved = [msgspec.structs.replace(made[0], weight=0.5), *made[1:]]
    policy, critic = new_policy(), new_critic()
    plain = experience_of(train_batch(made), policy, critic)
    weighted = experience_of(train_batch(halved), policy, critic)
    assert weighted.advantages_BT[0].tolist() == pytest.approx((0.5 * plain.advantages_BT[0]).tolist())
    assert weighted.advantages_BT[1:].tolist() == plain.advantages_BT[1:].tolist()
    assert plain.returns_BT is not None
    assert weighted.returns_BT is not None
    assert weighted.returns_BT.tolist() == plain.returns_BT.tolist(), "the critic learns from it as from any other"


def test_caught_answers_are_kept_once_and_a_few_a_step(tmp_path: Path) -> None:
    (one,) = rollouts(1)
    penalised = msgspec.structs.replace(one, verdicts=(RuleVerdict("no-flattery", "penalise"),))
    flagged = msgspec.structs.replace(one, verdicts=(RuleVerdict("too-long", "flag"),))
    caught = CaughtAnswers(tmp_path)
    assert caught.keep([(penalised, "p", "i love you"), (penalised, "p", "i love you"), (flagged, "p", "long")]) == 2
    assert caught.keep((penalised, "p", f"answer {number}") for number in range(20)) == 20
    lines = [json.loads(line) for line in (tmp_path / "caught_by_rules.jsonl").read_text().splitlines()]
    assert lines[0] == {"prompt": "p", "answer": "i love you", "reason": "no-flattery", "policy_version": 0}
    assert len(lines) == 1 + 8
    assert all(math.isfinite(line["policy_version"]) for line in lines)
    again = CaughtAnswers(tmp_path)
    assert again.keep([(penalised, "p", "i love you")]) == 1
    after = (tmp_path / "caught_by_rules.jsonl").read_text().splitlines()
    assert len(after) == len(lines), "a resumed learner knows what is there"
