"""Against lopsided preferences: strata of pairs, and weights or a sample in which every stratum counts alike.

A stratum is which answer is longer × how much longer × topic of the prompt. Where the longer answer is chosen far more
often, a reward model learns length; with even strata, length says nothing about the label. Rare strata are raised CAP
times at most, so that a handful of pairs does not decide; so strong imbalance is lessened, not undone.

Apply it to training pairs alone, after held-out ones are split off: a sample repeats pairs. Deterministic from a seed.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from cluster.data_records import PreferencePair, Prompt
from reward_service.audit.duplicates import content_text
from reward_service.audit.lengths import length_unit, lengths_of

CAP: Final = 4.0
"""Most that a pair counts, where the mean is 1."""
TOPICS: Final = 8
MIN_PAIRS_PER_TOPIC: Final = 200
"""So that most strata have some pairs: a topic has six."""
_BUCKETS: Final = 3
_MOST_WORDS: Final = 4096
_MOST_CLUSTERED: Final = 20_000

How = Literal["none", "stratified", "inverse_frequency"]


@dataclass(frozen=True, order=True)
class Stratum:
    """`longer`: the chosen answer, the rejected one, or neither. `bucket`: thirds of the pairs by difference in length,
    0 the smallest. `topic`: a number without meaning."""

    longer: Literal["chosen", "rejected", "neither"]
    bucket: int
    topic: int


def rebalance(pairs: Sequence[PreferencePair], *, how: How, seed: int = 0) -> list[PreferencePair]:
    """As rm.rebalance says: the pairs as they are, a sample with even strata, or all with weights."""
    if how == "stratified":
        return stratified_sample(pairs, seed=seed)
    if how == "inverse_frequency":
        return weighted(pairs, seed=seed)
    return list(pairs)


def weighted(pairs: Sequence[PreferencePair], *, seed: int = 0) -> list[PreferencePair]:
    """The pairs with `inverse_frequency_weights` in `weight`, times the weight they have."""
    weights = inverse_frequency_weights(pairs, seed=seed)
    return [
        msgspec.structs.replace(pair, weight=weight * (1.0 if pair.weight is None else pair.weight))
        for pair, weight in zip(pairs, weights, strict=True)
    ]


def inverse_frequency_weights(pairs: Sequence[PreferencePair], *, cap: float = CAP, seed: int = 0) -> list[float]:
    """One weight a pair, in inverse proportion to its stratum's size; their mean is 1, none is over `cap` (≥ 1)."""
    found = strata(pairs, seed=seed)
    weights = _weight_by_stratum(Counter(found), cap=cap)
    return [weights[stratum] for stratum in found]


def stratified_sample(pairs: Sequence[PreferencePair], seed: int, *, cap: float = CAP) -> list[PreferencePair]:
    """About as many pairs, the same number of each stratum: large ones lose some, and pairs of small ones are repeated
    up to `cap` times. In random order."""
    found = strata(pairs, seed=seed)
    weights = _weight_by_stratum(Counter(found), cap=cap)
    members: dict[Stratum, list[PreferencePair]] = defaultdict(list)
    for pair, stratum in zip(pairs, found, strict=True):
        members[stratum].append(pair)
    rng = random.Random(f"stratified {seed}")
    drawn: list[PreferencePair] = []
    for stratum in sorted(members):
        there = members[stratum]
        whole, part = divmod(round(weights[stratum] * len(there)), len(there))
        drawn += there * whole + rng.sample(there, part)
    rng.shuffle(drawn)
    return drawn


def _weight_by_stratum(sizes: Mapping[Stratum, int], *, cap: float) -> dict[Stratum, float]:
    """w = min(cap, level/size), with the level at which Σ w·size is the number of pairs."""
    if cap < 1:
        raise ValueError(f"cap {cap} < 1: the mean weight cannot be 1")
    capped: set[Stratum] = set()
    total = sum(sizes.values())
    while len(capped) < len(sizes):
        left = total - cap * sum(sizes[stratum] for stratum in capped)
        level = left / (len(sizes) - len(capped))
        over = {stratum for stratum in sizes if stratum not in capped and level > cap * sizes[stratum]}
        if not over:
            return {stratum: cap if stratum in capped else level / size for stratum, size in sizes.items()}
        capped |= over
    return dict.fromkeys(sizes, cap)


# ---------------------------------------------------------------- strata


def strata(pairs: Sequence[PreferencePair], *, seed: int = 0) -> list[Stratum]:
    """The stratum of each pair."""
    differences = [chosen - rejected for chosen, rejected in lengths_of(pairs, unit=length_unit(pairs))]
    sizes = sorted(abs(difference) for difference in differences if difference)
    bounds = [sizes[len(sizes) * part // _BUCKETS] for part in range(1, _BUCKETS)] if sizes else []
    topics = topics_of([pair.prompt for pair in pairs], seed=seed)
    return [
        Stratum(_longer(difference), _bucket(abs(difference), bounds), topic)
        for difference, topic in zip(differences, topics, strict=True)
    ]


def _longer(difference: int) -> Literal["chosen", "rejected", "neither"]:
    return "chosen" if difference > 0 else "rejected" if difference < 0 else "neither"


def _bucket(size: int, bounds: Sequence[int]) -> int:
    return sum(size >= bound for bound in bounds) if size else 0


def topics_of(prompts: Sequence[Prompt], *, topics: int = TOPICS, seed: int = 0) -> list[int]:
    """A topic for each prompt: k-means over the TF-IDF of their words. Fewer topics where prompts are few; one, where
    there are no words to tell prompts apart."""
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import TfidfVectorizer
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    texts = [content_text(prompt) for prompt in prompts]
    distinct = list(dict.fromkeys(texts))
    k = min(topics, len(texts) // MIN_PAIRS_PER_TOPIC, len(distinct))
    if k < 2:
        return [0] * len(texts)
    vectorizer = TfidfVectorizer(
        max_df=0.5, min_df=2, sublinear_tf=True, max_features=_MOST_WORDS, stop_words="english"
    )
    try:
        matrix = vectorizer.fit_transform(distinct)
    except ValueError:  # no word is in two prompts, or every word is in most
        return [0] * len(texts)
    with threadpool_limits(1):  # sums in one order: the same topics on any number of cores
        some = sorted(random.Random(f"topics {seed}").sample(range(len(distinct)), min(len(distinct), _MOST_CLUSTERED)))
        clusters = KMeans(n_clusters=k, random_state=seed, n_init=4).fit(matrix[some])
        labels = clusters.predict(matrix)
    number = dict(zip(distinct, map(int, labels), strict=True))
    return [number[text] for text in texts]
