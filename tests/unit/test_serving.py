"""What leaves the reward service: aggregation, disagreement, and other sources, without models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from cluster.errors import ScoringError
from cluster.records import DeadLetter, RuleVerdict, ScoredRollout
from cluster.reward_models import NO_MODEL, Calibration
from cluster.stores import MemoryScores
from configs.reward import RewardSection
from reward_service.rewards.compose import Composed, Composer
from reward_service.rewards.sources import TextSample
from reward_service.scorer import Scores, ScriptedScorer
from reward_service.serving import Measured, Outcome, Rewarding, Serving
from reward_service.worker import WorkerSettings
from tests.reward_support import Watch, World, rollout
from tests.serving_support import batch_scoring, running

CALIBRATION = Calibration(mean=1.0, std=2.0, count=100)
PERCENTILES = tuple(number / 100 for number in range(101))
"""Of the spread: 95 % of the calibration set at or under 0.95."""


def measured(name: str, *members: float) -> Measured:
    scores = Scores(members, np.full(3, -1.0, dtype=np.float32))
    return Measured(rollout(name), scores, (f"prompt {name}", f"answer {name}"))


def serving(*, scorer: ScriptedScorer | None = None) -> Serving:
    return Serving(scorer or ScriptedScorer(), CALIBRATION, PERCENTILES, 2)


class FakeComposer:
    """Doubles the model's reward; "bad" fails; keeps what it was asked."""

    tag = "ab12"

    def __init__(self) -> None:
        self.asked: list[tuple[list[TextSample], Any, Calibration | None]] = []

    async def compose(
        self, samples: Sequence[TextSample], *, model_rewards: Sequence[float] | None, calibration: Calibration | None
    ) -> list[Composed | ScoringError]:
        self.asked.append((list(samples), model_rewards, calibration))
        models = model_rewards or [0.5] * len(samples)
        return [
            ScoringError("the source has no number for it", got=sample.task_id)
            if sample.task_id == "bad"
            else Composed(2 * model, {"s": 7.0}, (RuleVerdict("r", "flag"),))
            for sample, model in zip(samples, models, strict=True)
        ]

    async def aclose(self) -> None:
        pass


def with_fake(composer: FakeComposer, settings: RewardSection | None = None) -> Rewarding:
    return Rewarding(settings, composer=cast(Composer, composer))


async def one(rewarding: Rewarding, *members: float) -> Outcome:
    (outcome,) = await rewarding.outcomes([measured("a", *members)], serving=serving())
    return outcome


# ---------------------------------------------------------------- members


async def test_the_configured_aggregation_makes_the_reward() -> None:
    settings = RewardSection(aggregation="mean_minus_std", std_coefficient=2.0)
    scored = await one(Rewarding(settings), 1.0, 1.5)
    assert isinstance(scored, ScoredRollout)
    assert (scored.reward, scored.uncertainty, scored.weight) == (1.25 - 2 * 0.25, 0.25, 1.0)
    assert scored.member_scores == (1.0, 1.5)


async def test_members_are_put_on_one_scale_first() -> None:
    settings = RewardSection(aggregation="mean_minus_std")
    scaled = Serving(ScriptedScorer(), CALIBRATION, PERCENTILES, 2, ((0.0, 1.0), (10.0, 3.0)))
    rewarding = Rewarding(settings)
    (scored,) = await rewarding.outcomes([measured("a", 1.0, 13.0)], serving=scaled)
    assert isinstance(scored, ScoredRollout)
    assert (scored.reward, scored.uncertainty) == (2.0, 0.0)
    assert scored.member_scores == (1.0, 13.0), "the record keeps what the members said"
    assert rewarding.model_reward((1.0, 13.0), serving=scaled) == 2.0


async def test_members_that_disagree_over_the_limit_cost_weight() -> None:
    settings = RewardSection(uncertain="down_weight", uncertain_weight=0.25)
    far, near = await one(Rewarding(settings), 0.0, 2.0), await one(Rewarding(settings), 0.0, 1.0)  # 1.0, 0.5
    assert isinstance(far, ScoredRollout)
    assert isinstance(near, ScoredRollout)
    assert (far.reward, far.weight, near.weight) == (1.0, 0.25, 1.0)


async def test_members_that_disagree_over_the_limit_have_the_answer_refused_with_the_numbers() -> None:
    rewarding = Rewarding(RewardSection(uncertain="reject"))
    outcomes = await rewarding.outcomes([measured("a", 0.0, 1.0), measured("b", 0.0, 6.2)], serving=serving())
    assert isinstance(outcomes[0], ScoredRollout)
    letter = outcomes[1]
    assert isinstance(letter, DeadLetter)
    assert (letter.task.task_id, letter.stage, letter.rejected) == ("b", "reward", True)
    assert letter.reason == "members disagree: spread 3.1 over 0.95"


async def test_without_percentiles_nothing_is_uncertain() -> None:
    rewarding = Rewarding(RewardSection(uncertain="reject"))
    (outcome,) = await rewarding.outcomes([measured("a", 0.0, 99.0)], serving=Serving(ScriptedScorer()))
    assert isinstance(outcome, ScoredRollout)


# ---------------------------------------------------------------- other sources


async def test_a_composed_reward_is_on_a_scale_of_its_own_name() -> None:
    composer = FakeComposer()
    (outcome,) = await with_fake(composer).outcomes([measured("a", 1.0, 3.0)], serving=serving())
    assert isinstance(outcome, ScoredRollout)
    assert (outcome.reward, outcome.parts, outcome.verdicts) == (4.0, {"s": 7.0}, (RuleVerdict("r", "flag"),))
    assert outcome.rm_version == "rm-scripted~ab12"
    assert (outcome.member_scores, outcome.uncertainty) == ((1.0, 3.0), 1.0)
    sample = TextSample(task_id="a", prompt="prompt a", answer="answer a", finish_reason="stop", response_tokens=3)
    assert composer.asked == [([sample], [2.0], CALIBRATION)]


async def test_rules_alone_leave_the_scale_the_models() -> None:
    composer = FakeComposer()
    composer.tag = ""
    (outcome,) = await with_fake(composer).outcomes([measured("a", 1.0)], serving=serving())
    assert isinstance(outcome, ScoredRollout)
    assert outcome.rm_version == "rm-scripted"


async def test_one_sample_that_a_source_cannot_value_leaves_the_others_alone() -> None:
    outcomes = await with_fake(FakeComposer()).outcomes(
        [measured(name, 1.0) for name in ("a", "bad", "c")], serving=serving()
    )
    assert [type(outcome) for outcome in outcomes] == [ScoredRollout, ScoringError, ScoredRollout]
    assert [o.rollout.task.task_id for o in outcomes if isinstance(o, ScoredRollout)] == ["a", "c"]


async def test_a_refused_answer_costs_no_source_anything() -> None:
    composer = FakeComposer()
    outcomes = await with_fake(composer, RewardSection(uncertain="reject")).outcomes(
        [measured("a", 0.0, 9.0), measured("b", 1.0, 1.0)], serving=serving()
    )
    assert [type(outcome) for outcome in outcomes] == [DeadLetter, ScoredRollout]
    assert [sample.task_id for sample in composer.asked[0][0]] == ["b"]


# ---------------------------------------------------------------- no reward model


class ReferenceOnly(ScriptedScorer):
    def __init__(self) -> None:
        super().__init__(version=NO_MODEL, members=lambda _: ())


async def test_without_a_reward_model_the_sources_make_the_reward_and_the_cache_keeps_the_reference() -> None:
    scorer, composer = ReferenceOnly(), FakeComposer()
    scoring = batch_scoring(scorer, rewarding=with_fake(composer))
    for name in ("a", "b"):
        (outcome,), learned = await scoring.score([rollout(name)])
        await scoring.remember(learned)
        assert isinstance(outcome, ScoredRollout)
        assert (outcome.reward, outcome.member_scores, outcome.rm_version) == (1.0, (), "none~ab12")
    assert scorer.scored == [["a"]]  # the same text and tokens: the cache had b
    assert [asked[1] for asked in composer.asked] == [None, None]


async def test_another_worker_finds_reference_log_probs_in_the_store() -> None:
    store, scorers = MemoryScores(), [ReferenceOnly(), ReferenceOnly()]
    for scorer in scorers:
        scoring = batch_scoring(scorer, rewarding=with_fake(FakeComposer()), store=store)
        await scoring.remember((await scoring.score([rollout("a")]))[1])
    assert [scorer.scored for scorer in scorers] == [[["a"]], []]


async def test_nothing_at_all_to_make_a_reward_of_is_an_error() -> None:
    (outcome,), _ = await batch_scoring(ReferenceOnly()).score([rollout("a")])
    assert isinstance(outcome, ScoringError)
    assert "no other source" in str(outcome)


# ---------------------------------------------------------------- through the worker


async def test_refused_answers_reach_the_dead_stream_and_are_counted() -> None:
    world = World()
    scorer = ScriptedScorer(members=lambda item: (0.0, 9.0 if item.task.task_id == "far" else 1.0))
    scoring = batch_scoring(scorer, rewarding=Rewarding(RewardSection(uncertain="reject")))
    scoring.install(serving(scorer=scorer))
    world.scorer = scorer
    async with running(world, scoring) as worker:
        await world.publish(rollout("near"), rollout("far"))
        (scored,), (letter,) = await world.scored(1), await world.dead(1)
    assert scored.rollout.task.task_id == "near"
    assert (letter.task.task_id, letter.rejected, letter.deliveries) == ("far", True, 1)
    assert worker.counts == {"scored": 1, "rejected": 1}
    assert await world.left() == 0


async def test_down_weighted_answers_are_counted() -> None:
    watch = Watch()
    scorer = ScriptedScorer(members=lambda _: (0.0, 9.0))
    scoring = batch_scoring(scorer, rewarding=Rewarding(RewardSection(uncertain="down_weight")), metrics=watch)
    scoring.install(serving(scorer=scorer))
    await scoring.score([rollout("a"), rollout("b")])
    assert scoring.counts == {"down_weighted": 2}
    assert watch.counts == {"down_weighted": 2}


async def test_a_source_that_fails_for_one_sample_costs_one_forward_pass_for_all() -> None:
    world = World()
    scorer = ScriptedScorer()
    scoring = batch_scoring(scorer, rewarding=with_fake(FakeComposer()))
    async with running(world, scoring) as worker:
        await world.publish(rollout("a"), rollout("bad"), rollout("c"))
        assert [item.rollout.task.task_id for item in await world.scored(2)] == ["a", "c"]
    assert worker.counts == {"scored": 2, "failures": 1}
    assert scorer.scored == [["a", "bad", "c"]]
    assert await world.left() == 1  # bad waits for its lease to end


async def test_a_sample_that_comes_again_because_of_a_source_needs_no_model_again() -> None:
    scorer = ScriptedScorer()
    scoring = batch_scoring(scorer, rewarding=with_fake(FakeComposer()))
    for _ in range(3):
        (outcome,), _ = await scoring.score([rollout("bad")])
        assert isinstance(outcome, ScoringError)
    assert scorer.scored == [["bad"]]


class Fails:
    """A source that has no number for every second task."""

    tag = "t"

    async def compose(
        self, samples: Sequence[TextSample], *, model_rewards: Sequence[float] | None, calibration: Calibration | None
    ) -> list[Composed | ScoringError]:
        return [ScoringError("no number") if int(sample.task_id) % 2 else Composed(1.0, {}, ()) for sample in samples]


async def test_a_source_that_fails_for_many_of_a_batch_does_not_end_the_worker() -> None:
    world = World()
    world.settings = WorkerSettings(consumer="w", batch_size=64, batch_wait_s=0.0, claim_wait_s=0.02)
    scoring = batch_scoring(ScriptedScorer(), rewarding=Rewarding(composer=cast(Composer, Fails())))
    await world.publish(*(rollout(str(number)) for number in range(64)))
    async with running(world, scoring) as worker:
        assert len(await world.scored(32)) == 32
        await world.watch.reached("failures", 32)
        for tries in (2, 3):  # now each comes alone, with nothing that is scored between
            world.clock.now_s += 31.0
            await world.watch.reached("failures", tries * 32)
        assert len(await world.dead(32)) == 32
    assert worker.counts == {"scored": 32, "failures": 96, "redelivered": 64, "dead": 32}
