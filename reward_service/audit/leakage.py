"""What can be told about the label without reading the answers properly: by length alone, by an answer's words without
the prompt, by the prompt without the answers. Cross-validated, whole prompts in one fold; scikit-learn stands here.

Pairs enter from either side, half of them each, so a predictor that knows nothing is right in half of the cases.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Final

from cluster.data_records import PreferencePair, Prompt, stable_prompt_id
from reward_service.audit.duplicates import content_text
from reward_service.audit.lengths import LengthPair
from reward_service.audit.records import Finding, Level, Share, share_of, worst_of

FOLDS: Final = 5
MAX_PAIRS: Final = 20_000
"""A random sample of so many is enough for an interval of ± 0.7 %."""
WARN_LENGTH: Final = 0.55
"""Lower end of the interval of length-only accuracy over which it warns,"""
BAD_LENGTH: Final = 0.65
WARN_WORDS: Final = 0.70
"""the same for the answers' words,"""
BAD_WORDS: Final = 0.85
WARN_PROMPT: Final = 0.02
"""and of the prompt-only predictor, over always giving the commoner outcome,"""
BAD_PROMPT: Final = 0.10
WARN_ORDER: Final = 0.03
"""How far from a half the first place's share may be,"""
BAD_ORDER: Final = 0.10
_MAX_WORDS: Final = 20_000


def leakage(pairs: Sequence[PreferencePair], lengths: Sequence[LengthPair], *, seed: int = 0) -> list[Finding]:
    """Three findings; none of a predictor that has too few prompts to be cross-validated."""
    chosen = list(range(len(pairs)))
    if len(chosen) > MAX_PAIRS:
        chosen = sorted(random.Random(f"leakage {seed}").sample(chosen, MAX_PAIRS))
    some = [pairs[index] for index in chosen]
    some_lengths = [lengths[index] for index in chosen]
    groups = [stable_prompt_id(pair.prompt) for pair in some]
    if len(set(groups)) < 2 * FOLDS:
        return []
    findings = [_length_only(some_lengths, groups), _words_only(some, groups)]
    prompt_only = _prompt_only(some, some_lengths, groups)
    return [*findings, prompt_only] if prompt_only is not None else findings


# ---------------------------------------------------------------- length


def _length_only(lengths: Sequence[LengthPair], groups: Sequence[str]) -> Finding:
    import numpy as np

    difference = np.array([[chosen - rejected] for chosen, rejected in lengths], dtype=float)
    ratio = np.array([[np.log1p(chosen) - np.log1p(rejected)] for chosen, rejected in lengths])
    features = np.hstack([np.sign(difference), ratio, difference / (difference.std() or 1.0)])
    share = _paired_accuracy(features, groups)
    level = _level(share.low, warn=WARN_LENGTH, bad=BAD_LENGTH)
    return Finding(
        name="length_only",
        level=level,
        value=f"length alone tells {share} of pairs right",
        numbers=_numbers(share),
        meaning="A model that never reads the answers gets this far. A reward model's accuracy counts from here, not "
        "from 50 %." if level != "ok" else "Length is no shortcut to the label.",
        advice="Rebalance by length (--rebalance), and ask annotators to ignore length." if level != "ok" else "",
    )  # fmt: skip


# ---------------------------------------------------------------- words of the answers


def _words_only(pairs: Sequence[PreferencePair], groups: Sequence[str]) -> Finding:
    from sklearn.feature_extraction.text import CountVectorizer

    texts = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
    counter = CountVectorizer(binary=True, min_df=min(3, len(texts)), max_features=_MAX_WORDS, token_pattern=r"\w+")
    try:
        counts = counter.fit_transform(texts).astype(float)
    except ValueError:  # no word occurs three times
        return Finding(name="words_only", level="ok", value="no word occurs often enough", meaning="Nothing to learn.")
    share = _paired_accuracy((counts[0::2] - counts[1::2]).tocsr(), groups)
    level = _level(share.low, warn=WARN_WORDS, bad=BAD_WORDS)
    return Finding(
        name="words_only",
        level=level,
        value=f"the answers' words, without the prompt, tell {share} of pairs right",
        numbers=_numbers(share),
        meaning="Which words occur settles most labels, whatever was asked. Such labels teach a vocabulary, and a "
        "policy can please them without answering." if level != "ok" else
        "The label does not follow from single words of the answers.",
        advice="Look at the cues; compare answers from one and the same model, so that its style cannot give the label "
        "away." if level != "ok" else "",
    )  # fmt: skip


# ---------------------------------------------------------------- prompt


def _prompt_only(
    pairs: Sequence[PreferencePair], lengths: Sequence[LengthPair], groups: Sequence[str]
) -> Finding | None:
    """Which of two answers is preferred cannot follow from the prompt; *what kind* of answer is, can: whether the
    longer one wins. Learned from the prompt's words and compared with always giving the commoner outcome."""
    import numpy as np

    unequal = [index for index, (chosen, rejected) in enumerate(lengths) if chosen != rejected]
    labels = np.array([lengths[index][0] > lengths[index][1] for index in unequal], dtype=int)
    found = _prompt_accuracy([pairs[index].prompt for index in unequal], labels, [groups[index] for index in unequal])
    if found is None:
        return None
    share, base = found
    level = _level(share.low - base, warn=WARN_PROMPT, bad=BAD_PROMPT)
    return Finding(
        name="prompt_only",
        level=level,
        value=f"the prompt alone tells whether the longer answer wins in {share} of pairs; always the commoner "
        f"outcome: {base:.1%}",
        numbers=_numbers(share) | {"base": base},
        meaning="Some prompts have one kind of answer preferred whatever it says; pairs of those come from different "
        "sources, or their annotators follow a rule." if level != "ok" else
        "The prompt gives nothing away about which answer is preferred.",
        advice="Compare by topic (audit.json, topics), and sample both answers of a pair in the same way."
        if level != "ok" else "",
    )  # fmt: skip


# ---------------------------------------------------------------- order

Shown = Sequence[tuple[Prompt, bool]]
"""Prompt of each comparison as it was recorded, and whether the answer in the first place was preferred."""


def order_only(shown: Shown) -> Finding | None:
    """Whether the place of an answer in the record, alone or with the prompt, tells that it is preferred. None for too
    few comparisons."""
    shown = shown[:MAX_PAIRS]
    groups = [stable_prompt_id(prompt) for prompt, _ in shown]
    if len(set(groups)) < 2 * FOLDS:
        return None
    share = share_of(sum(first for _, first in shown), len(shown))
    by_prompt = _order_from_prompt(shown, groups)
    level = _order_level(share)
    value = f"the answer in the first place is preferred in {share}"
    if by_prompt is not None:
        found, base = by_prompt
        level = worst_of([level, _level(found.low - base, warn=WARN_PROMPT, bad=BAD_PROMPT)])
        value += f"; the prompt alone tells the preferred place in {found}, always the commoner one: {base:.1%}"
    return Finding(
        name="order_only",
        level=level,
        value=value,
        numbers=_numbers(share) | ({} if by_prompt is None else {"prompt_accuracy": by_prompt[0].share}),
        meaning="The order of the record gives the label away: annotators favour a place, or records were sorted "
        "after judging." if level != "ok" else "The order of the record gives nothing away.",
        advice="If this is the order that annotators saw, show answers in random order; if it was set afterwards, "
        "never let a model see it." if level != "ok" else "",
    )  # fmt: skip


def _order_level(share: Share) -> Level:
    off = abs(share.share - 0.5)
    if share.low <= 0.5 <= share.high or off < WARN_ORDER:
        return "ok"
    return "bad" if off >= BAD_ORDER else "warn"


def _order_from_prompt(shown: Shown, groups: Sequence[str]) -> tuple[Share, float] | None:
    import numpy as np

    return _prompt_accuracy([prompt for prompt, _ in shown], np.array([int(first) for _, first in shown]), groups)


# ---------------------------------------------------------------- cross-validation


def _paired_accuracy(features: Any, groups: Sequence[str]) -> Share:
    """`features`: chosen − rejected, a row a pair. Accuracy in order of preference; an undecided pair is half right.

    Without an intercept a pair says the same from either side, so every other one is turned over: in each fold there
    are both labels, which scikit-learn wants.
    """
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    right = 0.0
    for train, test in _folds(groups):
        labels = np.arange(len(train)) % 2
        signs = (2.0 * labels - 1.0)[:, None]
        some = features[train]
        signed = some.multiply(signs).tocsr() if hasattr(some, "multiply") else some * signs
        model = LogisticRegression(fit_intercept=False, C=0.1, max_iter=300).fit(signed, labels)
        margins = model.decision_function(features[test])
        right += float((margins > 0).sum() + 0.5 * (margins == 0).sum())
    return share_of(right, len(groups))


def _prompt_accuracy(prompts: Sequence[Prompt], labels: Any, groups: Sequence[str]) -> tuple[Share, float] | None:
    """(accuracy of a label predicted from the prompt's words, that of always giving the commoner one). None for too few
    prompts, one outcome alone, or prompts without words."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    if len(set(groups)) < 2 * FOLDS or not 0 < labels.sum() < len(labels):
        return None
    vectorizer = TfidfVectorizer(max_features=_MAX_WORDS, token_pattern=r"\w+")
    try:
        features = vectorizer.fit_transform([content_text(prompt) for prompt in prompts])
    except ValueError:  # no words
        return None
    commoner = float(max(labels.mean(), 1 - labels.mean()))
    return share_of(_held_out(features, labels, groups), len(labels)), commoner


def _held_out(features: Any, labels: Any, groups: Sequence[str]) -> int:
    """How many the model gets right."""
    from sklearn.linear_model import LogisticRegression

    right = 0
    for train, test in _folds(groups):
        if len(set(labels[train].tolist())) < 2:
            right += int((labels[test] == labels[train][0]).sum())
            continue
        model = LogisticRegression(max_iter=300).fit(features[train], labels[train])
        right += int((model.predict(features[test]) == labels[test]).sum())
    return right


def _folds(groups: Sequence[str]) -> Any:
    from sklearn.model_selection import GroupKFold

    return GroupKFold(n_splits=FOLDS).split(groups, groups=groups)


def _level(value: float, *, warn: float, bad: float) -> Level:
    return "bad" if value > bad else "warn" if value > warn else "ok"


def _numbers(share: Share) -> dict[str, float | int | None]:
    return {"accuracy": share.share, "low": share.low, "high": share.high, "pairs": share.count}
