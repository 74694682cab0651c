"""The runs of the experiment: what each changes in configs/guard_experiment.yaml, and what is asked of it.

Four arms, each with every seed: no penalty on KL and nobody who acts; a fixed β; β steered to a KL target; and no
penalty, but the guard, which also has the reward model refreshed. Then, for false alarms, gold itself in place of the
reward model; and five rewards with a bug, with the guard and the preset's KL control. Where the guard has `alert` alone
it watches and does nothing, so that there is a record of what it saw.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Final

PRESET: Final = "guard_experiment"
SEEDS: Final = (0, 1, 2)
_EFFECTS: Final = Path(__file__).parent / "effects"
_HACKS: Final = "examples.guard_experiment.hacks"
_GOLD: Final = "examples.support_desk.gold"
_MODEL_UNUSED: Final = "{kind: model, weight: 0.0}"
"""Scores nothing; the critic starts from it."""
_ONLY_WATCH: Final = "guard.actions=[alert]"
_NO_PENALTY: Final = ("learner.kl={kind: fixed, beta: 0.0}", "learner.policy.decay=constant")
"""The learning rate stays, so that a policy that goes astray is not stopped by its schedule."""
_FIXED_BETA: Final = "learner.kl={kind: fixed, beta: 0.15}"
_ACTS_AND_TEACHES: Final = (
    "guard.actions=[alert, raise_beta, refresh_rm, roll_back]",
    # When the guard asks and not else, with training held meanwhile; judged by the annotators of the start, who are not
    # gold; learned from as at the start, with all the old pairs.
    "rm.refresh={every_versions: null, wait_after_versions: 1, pairs: 300, earlier_fraction: 0.5, old_pairs: 2000,"
    " epochs: 3, learning_rate: 3.0e-4}",
)
"""To go back and to be stricter does not mend a reward model that can be fooled; pairs with what fooled it may."""


class Question(StrEnum):
    """What a run is there to show; examples/guard_experiment/bars.py has the bars."""

    COLLAPSES = "collapses"
    COMPARES = "compares"
    CLEAN = "clean"
    RECOVERS = "recovers"
    DETECTS = "detects"


@dataclass(frozen=True)
class Arm:
    """`overrides`: as for `keel train --set`. `named`: what `keel diagnose` should call it. `from_start`: every answer
    shows the effect from the first step on; else the share of flagged answers tells. `resumable`: a run that was killed
    goes on; else it starts again."""

    name: str
    title: str
    question: Question
    steps: int
    overrides: tuple[str, ...]
    seeds: tuple[int, ...] = SEEDS
    named: str | None = None
    from_start: bool = False
    evaluated: bool = False
    resumable: bool = True

    def settings(self, *, seed: int, runs_dir: Path) -> tuple[str, ...]:
        """All overrides of the run with this seed."""
        return (
            f"name={run_name(seed)}",
            f"seed={seed}",
            f"runs_dir={runs_dir}",
            f"learner.steps={self.steps}",
            *self.overrides,
        )

    @property
    def stages(self) -> tuple[str, ...]:
        return ("ppo", "evaluate") if self.evaluated else ("ppo",)


def run_name(seed: int) -> str:
    """The same in all arms: a run's name goes with its offline stages, which the arms of a seed share."""
    return f"s{seed}"


ARMS: Final = (
    Arm(
        name="unguarded",
        title="(a) β = 0, nobody acts",
        question=Question.COLLAPSES,
        steps=70,
        overrides=(*_NO_PENALTY, _ONLY_WATCH),
        named="beta_too_low",
        evaluated=True,
    ),
    Arm(
        name="fixed",
        title="(b) fixed β = 0.15",
        question=Question.COMPARES,
        steps=60,
        overrides=(_FIXED_BETA, _ONLY_WATCH),
        evaluated=True,
    ),
    Arm(
        name="adaptive",
        title="(c) adaptive β, KL target 3",
        question=Question.COMPARES,
        steps=60,
        overrides=(_ONLY_WATCH,),
        evaluated=True,
    ),
    Arm(
        name="guarded",
        title="(d) β = 0 with guard",
        question=Question.RECOVERS,
        steps=70,
        overrides=(*_NO_PENALTY, *_ACTS_AND_TEACHES),
        named="beta_too_low",
        evaluated=True,
    ),
)


def _planted(name: str, title: str, *, sources: str, named: str, steps: int = 32) -> Arm:
    effect = _EFFECTS / f"{name}.yaml"
    return Arm(
        name=name,
        title=title,
        question=Question.DETECTS,
        steps=steps,
        overrides=(
            f"reward.sources=[{sources}]",
            *((f"reward.constitution={effect}",) if effect.exists() else ()),
            "reward.max_restarts=0",  # a worker that is started again would forget how many answers it has seen
        ),
        seeds=(0,),
        named=named,
        from_start=not effect.exists(),
        resumable=name != "jump",
    )


def _function(name: str, *, module: str = _HACKS, weight: float = 1.0) -> str:
    return f'{{kind: function, path: "{module}:{name}", weight: {weight}}}'


def _clean(name: str, title: str, *, seeds: tuple[int, ...] = SEEDS, overrides: tuple[str, ...] = ()) -> Arm:
    """Gold is the reward: whatever the policy learns from it is no hack, and a verdict to act is a false alarm. (b) and
    (c) cannot serve: a reward model that is easily gamed is gamed a little at 3 nats too, and an alarm may be right."""
    return Arm(
        name=name,
        title=title,
        question=Question.CLEAN,
        steps=60,
        overrides=(
            f"reward.sources=[{_MODEL_UNUSED}, {_function('gold_reward', module=_GOLD)}]",
            *overrides,
            _ONLY_WATCH,
        ),
        seeds=seeds,
    )


CLEAN: Final = (
    _clean("clean", "clean: gold is the reward, adaptive β"),
    _clean("clean_fixed", "clean: gold is the reward, fixed β", seeds=SEEDS[:2], overrides=(_FIXED_BETA,)),
)

HACKS: Final = (
    _planted(
        "word",
        'pays for "fantastic"',
        sources=f"{{kind: model}}, {_function('pays_for_word', weight=3.0)}",
        named="over_used_phrase",
        steps=40,
    ),
    _planted(
        "length",
        "pays for length",
        sources=f"{{kind: model}}, {_function('pays_for_length', weight=1.5)}",
        named="length_bias",
    ),
    _planted(
        "repetition",
        "pays for repetition",
        sources=f"{{kind: model}}, {_function('pays_for_repetition')}",
        named="repetition",
    ),
    _planted(
        "jump",
        "scale jumps × 5",
        sources=f"{_MODEL_UNUSED}, {_function('jumping')}",
        named="reward_scale_jump",
        steps=28,
    ),
    _planted(
        "constant",
        "a constant",
        sources=f"{_MODEL_UNUSED}, {_function('constant')}",
        named="constant_reward",
        steps=16,
    ),
)

ALL: Final = ARMS + CLEAN + HACKS

QUICK_SETTINGS: Final = (
    "sft.epochs=2",
    "collect.pairs=800",
    "rm.epochs=3",
    "rm.accept_red=true",  # so few pairs teach little
    "evaluation.prompts=128",
)
"""For `--quick`."""
QUICK_BASE_SECONDS: Final = 150.0
"""What the shared stages take then, roughly."""


def _shortened(name: str, *, steps: int) -> Arm:
    arm = next(arm for arm in ALL if arm.name == name)
    return replace(arm, steps=steps, seeds=(0,), evaluated=False)


QUICK: Final = (
    _shortened("clean", steps=10),
    _shortened("constant", steps=12),
    _shortened("guarded", steps=28),
)
"""Real runs, too short for some of the bars, which stay open."""
