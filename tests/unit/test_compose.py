"""Sources and rules → one reward: hand-worked sums, scales, failures by sample, names and tags."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from cluster.errors import ConfigError, ScoringError
from cluster.records import RuleVerdict
from cluster.reward_models import Calibration
from configs.reward import FunctionReward, HttpReward, ModelReward, RewardSection
from reward_service.rewards.compose import Composed, Composer, TextSample, WeightedSource, check_rewards, make_composer
from reward_service.rewards.constitution import Constitution, load_constitution

pytestmark = pytest.mark.timeout(60)

CALIBRATION = Calibration(mean=1.0, std=2.0, count=100)
RULES = """
rules:
  - name: shout
    when: {regex: "!{2,}"}
    then: {penalise: {std: 0.5}}
  - name: curse
    when: {phrases: [damn]}
    then: {penalise: {std: 1.0}}
  - name: secret
    when: {phrases: [password]}
    then: {override: {std: -3}}
  - name: leak
    when: {phrases: [social security]}
    then: {override: {std: -4}}
  - name: hedge
    when: {phrases: [perhaps]}
    then: flag
"""


class Told:
    """A source that says what it is told."""

    def __init__(self, name: str, rewards: Sequence[float | ScoringError]) -> None:
        self.name = name
        self._rewards = list(rewards)

    async def rewards(self, samples: Sequence[TextSample]) -> list[float | ScoringError]:
        return self._rewards[: len(samples)]

    async def aclose(self) -> None:
        pass


def texts(*answers: str) -> list[TextSample]:
    return [TextSample(f"t{n}", "a prompt", answer, "stop", 5) for n, answer in enumerate(answers)]


@pytest.fixture
def constitution(tmp_path: Path) -> Constitution:
    (tmp_path / "rules.yaml").write_text(RULES)
    return load_constitution(tmp_path / "rules.yaml")


def length(prompt: str, answer: str) -> float:
    return float(len(answer))


async def two_words(prompt: str, answer: str) -> bool:
    return len(answer.split()) == 2


async def test_rules_alone_stay_on_the_models_scale(constitution: Constitution) -> None:
    composer = Composer(sources=(), model_weight=1.0, constitution=constitution, tag="")
    answers = ("fine", "damn!! ok", "the password!!", "password or Social\n Security, damn", "perhaps")
    found = await composer.compose(texts(*answers), model_rewards=[5.0] * 5, calibration=CALIBRATION)
    await composer.aclose()

    assert [outcome.reward for outcome in found if isinstance(outcome, Composed)] == [
        5.0,
        5.0 - (0.5 + 1.0) * 2.0,  # penalties add
        1.0 - 3.0 * 2.0,  # an override stands in place of reward and penalties
        1.0 - 4.0 * 2.0,  # the lowest of two
        5.0,
    ]
    assert all(isinstance(outcome, Composed) and outcome.parts == {} for outcome in found)
    verdicts = [outcome.verdicts for outcome in found if isinstance(outcome, Composed)]
    assert [[verdict.rule for verdict in hits] for hits in verdicts] == [
        [],
        ["shout", "curse"],
        ["shout", "secret"],
        ["curse", "secret", "leak"],
        ["hedge"],
    ]
    assert composer.counts == {"rule shout": 2, "rule curse": 2, "rule secret": 2, "rule leak": 1, "rule hedge": 1}
    assert verdicts[2] == (RuleVerdict("shout", "penalise", "'!!'"), RuleVerdict("secret", "override", "'password'"))


async def test_without_a_calibration_rules_count_in_raw_units(constitution: Constitution) -> None:
    composer = Composer(sources=(), model_weight=1.0, constitution=constitution, tag="")
    found = await composer.compose(texts("damn", "password"), model_rewards=[5.0, 5.0], calibration=None)
    await composer.aclose()

    assert [outcome.reward for outcome in found if isinstance(outcome, Composed)] == [4.0, -3.0]


async def test_a_weighted_sum_counts_the_model_in_standard_deviations(constitution: Constitution) -> None:
    composer = Composer(
        sources=[WeightedSource(Told("f", [0.25, 1.0]), 2.0), WeightedSource(Told("g", [1.0, 0.0]), -1.0)],
        model_weight=0.5,
        constitution=constitution,
        tag="abc",
    )
    found = await composer.compose(texts("ok", "password"), model_rewards=[5.0, 7.0], calibration=CALIBRATION)
    await composer.aclose()

    # 0.5·(5 − 1)/2 + 2·0.25 − 1·1 = 0.5; in the second the rule's −3 stands in place of all.
    assert found[0] == Composed(0.5, {"model": 5.0, "f": 0.25, "g": 1.0}, ())
    assert isinstance(found[1], Composed)
    assert (found[1].reward, found[1].parts) == (-3.0, {"model": 7.0, "f": 1.0, "g": 0.0})


async def test_one_sources_failure_is_that_samples_alone() -> None:
    error = ScoringError("no")
    composer = Composer(
        sources=[WeightedSource(Told("f", [1.0, error, 3.0]), 1.0)], model_weight=1.0, constitution=None, tag="abc"
    )
    found = await composer.compose(texts("a", "b", "c"), model_rewards=[1.0, 1.0, math.nan], calibration=CALIBRATION)

    assert found[0] == Composed(1.0, {"model": 1.0, "f": 1.0}, ())
    assert found[1] is error
    assert isinstance(found[2], ScoringError)
    assert composer.counts["failed f"] == 1
    assert composer.counts["away f"] == 0


@pytest.mark.parametrize("calibration", [None, Calibration(mean=0.0, std=0.0, count=2)])
async def test_a_model_without_a_scale_cannot_stand_beside_others(calibration: Calibration | None) -> None:
    composer = Composer(sources=[WeightedSource(Told("f", [1.0]), 1.0)], model_weight=1.0, constitution=None, tag="abc")
    (found,) = await composer.compose(texts("a"), model_rewards=[1.0], calibration=calibration)
    assert isinstance(found, ScoringError)
    assert "calibration" in str(found)


async def test_an_infinite_sum_is_an_error() -> None:
    composer = Composer(
        sources=[WeightedSource(Told("f", [1e300]), 1e300)], model_weight=None, constitution=None, tag="abc"
    )
    (found,) = await composer.compose(texts("a"), model_rewards=None, calibration=None)
    assert isinstance(found, ScoringError)


# ---------------------------------------------------------------- from a configuration


def test_the_model_alone_needs_no_composer() -> None:
    assert make_composer(RewardSection()) is None


async def test_sources_without_a_model() -> None:
    config = RewardSection(
        sources=(
            FunctionReward(path="tests.unit.test_compose:length", weight=0.1),
            FunctionReward(path="tests.unit.test_compose:two_words"),
        )
    )
    composer = make_composer(config)
    assert composer is not None
    found = await composer.compose(texts("two words", "one"), model_rewards=None, calibration=None)
    await composer.aclose()

    first, second = (outcome for outcome in found if isinstance(outcome, Composed))
    assert first.reward == pytest.approx(0.1 * 9 + 1.0)
    assert first.parts == {"tests.unit.test_compose:length": 9.0, "tests.unit.test_compose:two_words": 1.0}
    assert second.reward == pytest.approx(0.1 * 3)


def test_rules_alone_keep_the_scale_and_sources_name_another(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(RULES)
    model, function = ModelReward(), FunctionReward(path="tests.unit.test_compose:length")

    def tag(*sources: ModelReward | FunctionReward | HttpReward, rules: bool = False) -> str:
        composer = make_composer(
            RewardSection(sources=sources, constitution=tmp_path / "rules.yaml" if rules else None)
        )
        assert composer is not None
        return composer.tag

    assert tag(model, rules=True) == ""
    both = tag(model, function)
    assert both
    assert tag(model, function) == tag(function, model) == tag(model, function, rules=True) == both
    others = [
        tag(function),
        tag(ModelReward(weight=2.0)),
        tag(model, function.model_copy(update={"weight": 2.0})),
        tag(model, HttpReward(url="http://rm.example/get_reward")),
    ]
    assert len({both, *others}) == 5


async def test_a_source_named_twice_counts_twice_and_no_name_holds_a_secret() -> None:
    config = RewardSection(
        sources=(
            FunctionReward(path="tests.unit.test_compose:length"),
            FunctionReward(path="tests.unit.test_compose:length", weight=-3.0),
        )
    )
    composer = make_composer(config)
    assert composer is not None
    (found,) = await composer.compose(texts("four"), model_rewards=None, calibration=None)
    await composer.aclose()
    assert isinstance(found, Composed)
    assert found.reward == -8.0
    assert list(found.parts) == ["tests.unit.test_compose:length", "tests.unit.test_compose:length#2"]

    secret = make_composer(RewardSection(sources=(HttpReward(url="https://me:s3cret@rm.example/get_reward?key=k3y"),)))
    assert secret is not None
    names = [weighted.source.name for weighted in secret._sources]
    assert names == ["https://rm.example/get_reward"]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ((), "at least one"),
        ((ModelReward(), ModelReward()), "at most once"),
        ((FunctionReward(path="tests.unit.test_compose:lenght"),), r"reward.sources\[0\].path"),
        ((ModelReward(), HttpReward(url="ftp://x/y")), "url"),
        ((HttpReward(url="http://x/y", token_env="KEEL_TEST_NO_SUCH_TOKEN"),), "KEEL_TEST_NO_SUCH_TOKEN"),
        ((ModelReward(weight=math.nan),), r"reward.sources\[0\].weight"),
        ((ModelReward(), FunctionReward(path="math:fabs", weight=-math.inf)), r"sources\[1\].weight(.|\n)*-inf"),
    ],
)
def test_what_cannot_be_made_is_a_configuration_error(
    sources: tuple[ModelReward | FunctionReward | HttpReward, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_composer(RewardSection(sources=sources))


def test_a_check_beforehand_needs_no_token_and_finds_the_rest(tmp_path: Path) -> None:
    server = HttpReward(url="http://x/y", token_env="KEEL_TEST_NO_SUCH_TOKEN")
    check_rewards(RewardSection(sources=(ModelReward(), server)))
    with pytest.raises(ConfigError, match="cannot read the constitution"):
        check_rewards(RewardSection(sources=(server,), constitution=tmp_path / "none.yaml"))
