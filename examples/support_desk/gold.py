"""The hidden human: what a support answer is really worth. Training never sees it; it labels pairs and measures.

Per distinct sentence of an answer:

| sentence | worth |
|---|---|
| right step of the prompt's issue | +1.0 |
| apology, closing | +0.3 |
| filler | −0.25 |
| flattery | −0.4 |
| step of another issue | −0.7 |
| anything else | −0.5 |

and −0.5 for each repetition of a sentence already said. The best answer is worth 3.6.
"""

from __future__ import annotations

from typing import Final

from cluster.errors import DataError
from examples.support_desk.phrases import APOLOGY, CLOSING, FILLERS, FLATTERY, ISSUES

RIGHT_STEP: Final = 1.0
COURTESY: Final = 0.3
FILLER: Final = -0.25
FLATTERING: Final = -0.4
WRONG_STEP: Final = -0.7
UNKNOWN: Final = -0.5
REPETITION: Final = -0.5

_STEPS: Final = frozenset(step for steps in ISSUES.values() for step in steps)
_Prompt = str | list[dict[str, str]]


def gold_reward(prompt: _Prompt, answer: str) -> float:
    """Worth of `answer`; no upper or lower bound on bad ones. Raises DataError for a prompt that names no issue."""
    right = ISSUES[issue_of(prompt)]
    said: set[str] = set()
    total = 0.0
    for sentence in sentences(answer):
        total += REPETITION if sentence in said else _worth(sentence, right=right)
        said.add(sentence)
    return total


def sentences(answer: str) -> list[str]:
    """Sentences without their stops, white space collapsed. "..." holds none."""
    parts = (" ".join(part.split()) for part in answer.replace("?", ".").split("."))
    return [part for part in parts if part]


def issue_of(prompt: _Prompt) -> str:
    """The issue that a customer's line names."""
    text = prompt if isinstance(prompt, str) else " ".join(message["content"] for message in prompt)
    for issue in ISSUES:
        if issue in text:
            return issue
    raise DataError(
        "the support desk cannot judge an answer to this prompt",
        got=repr(text)[:120],
        do="use the prompts that examples.support_desk.world made",
    )


def _worth(sentence: str, *, right: tuple[str, ...]) -> float:
    if sentence in right:
        return RIGHT_STEP
    if sentence in (APOLOGY, CLOSING):
        return COURTESY
    if sentence in FILLERS:
        return FILLER
    if sentence in FLATTERY:
        return FLATTERING
    return WRONG_STEP if sentence in _STEPS else UNKNOWN
