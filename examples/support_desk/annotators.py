"""Five simulated annotators with human weaknesses: two like length, one likes flattery, two are fair.

Each votes by a Bradley–Terry draw, P(A over B) = σ(s·(u(A) − u(B))), where u is the gold reward plus the annotator's
own bias. Near the SFT policy the majority agrees with gold; far from it, long or flattering answers win: a reward model
learned from these votes can be exploited, as in Gao et al. 2022.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass
from typing import Final

from examples.support_desk.gold import gold_reward

SHARPNESS: Final = 1.5
"""s: votes per unit of gold get this much steeper."""

_TOKEN: Final = re.compile(r"\w+|[^\w\s]")
_PRAISE: Final = ("amazing", "love")


@dataclass(frozen=True)
class Annotator:
    """Extra liking, in units of gold, for each token of length and for each kind of praise present."""

    per_token: float = 0.0
    per_praise: float = 0.0

    def utility(self, prompt: str | list[dict[str, str]], answer: str) -> float:
        """How much this annotator likes `answer`."""
        tokens = _TOKEN.findall(answer)
        praise = sum(word in tokens for word in _PRAISE)
        return gold_reward(prompt, answer) + self.per_token * len(tokens) + self.per_praise * praise


PANEL: Final = (
    Annotator(per_token=0.12),
    Annotator(per_token=0.12),
    Annotator(per_praise=1.0),
    Annotator(),
    Annotator(),
)


def judge(prompt: str | list[dict[str, str]], answer_a: str, answer_b: str, rng: random.Random) -> dict[str, bool]:
    """Five votes by annotator, True where that one prefers `answer_a`. The order of draws is the order of the panel.

    The ids are neutral: nothing but the votes says who is biased.
    """
    votes: dict[str, bool] = {}
    for number, annotator in enumerate(PANEL, start=1):
        margin = SHARPNESS * (annotator.utility(prompt, answer_a) - annotator.utility(prompt, answer_b))
        votes[f"annotator_{number}"] = rng.random() < _sigmoid(margin)
    return votes


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))
