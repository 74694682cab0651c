"""How evenly preferences lie over topics, and what rebalancing would make of them.

Topics are those of reward_service/audit/rebalance.py, so what is shown is what rebalancing evens out; here they get
names.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Final

from cluster.data_records import PreferencePair
from reward_service.audit.duplicates import content_text, normalised
from reward_service.audit.lengths import LengthPair, longer_preferred
from reward_service.audit.rebalance import How, rebalance, topics_of
from reward_service.audit.records import Finding, Number, Stratum

WARN_TOPIC: Final = 0.5
"""Share of the largest topic that warns,"""
WARN_TOPIC_LENGTH: Final = 0.2
"""and how far from all pairs' a topic's share of longer chosen answers may be, in a topic of FEW pairs or more."""
FEW: Final = 100
_NAMED_BY: Final = 3
_SHORTEST_WORD: Final = 3


def topic_strata(pairs: Sequence[PreferencePair], lengths: Sequence[LengthPair], *, seed: int) -> list[Stratum]:
    """The pairs by topic of their prompt, the largest first; none where prompts do not fall into topics."""
    topics = topics_of([pair.prompt for pair in pairs], seed=seed)
    members: dict[int, list[int]] = defaultdict(list)
    for place, topic in enumerate(topics):
        members[topic].append(place)
    if len(members) < 2:
        return []
    names = _names([normalised(content_text(pair.prompt)) for pair in pairs], members)
    strata: list[Stratum] = []
    for topic, places in members.items():
        share = longer_preferred([lengths[place] for place in places])
        strata.append(
            Stratum(name=names[topic], pairs=len(places), longer_chosen=None if share is None else share.share)
        )
    return sorted(strata, key=lambda stratum: (-stratum.pairs, stratum.name))


def _names(texts: Sequence[str], members: dict[int, list[int]]) -> dict[int, str]:
    """Topic → the words that most set its prompts apart from the others."""
    words = [frozenset(word for word in text.split() if len(word) >= _SHORTEST_WORD) for text in texts]
    everywhere = Counter(word for some in words for word in some)
    names: dict[int, str] = {}
    for topic, places in members.items():
        here = Counter(word for place in places for word in words[place])
        outside = max(1, len(texts) - len(places))

        def apart(word: str, here: Counter[str] = here, size: int = len(places), outside: int = outside) -> float:
            return here[word] / size - (everywhere[word] - here[word]) / outside

        best = sorted(here, key=lambda word: (-apart(word), word))[:_NAMED_BY]
        names[topic] = ", ".join(word for word in best if apart(word) > 0) or "other"
    return names


def topic_balance(topics: Sequence[Stratum], *, longer_chosen: float | None) -> list[Finding]:
    """How evenly the pairs lie over topics, and whether length means the same in each; nothing without topics."""
    if not topics:
        return []
    total = sum(topic.pairs for topic in topics)
    largest, smallest = topics[0], topics[-1]
    apart = _apart(topics, longer_chosen)
    warns = largest.pairs > WARN_TOPIC * total or bool(apart)
    value = (
        f"{len(topics)} topics; the largest ({largest.name}) has {largest.pairs / total:.0%} of the pairs, the "
        f"smallest ({smallest.name}) {smallest.pairs / total:.0%}"
    )
    if apart:
        value += "; by topic the longer answer is chosen in " + ", ".join(
            f"{one.longer_chosen:.0%} ({one.name})" for one in apart
        )
    numbers: dict[str, Number] = {
        "topics": len(topics), "largest": largest.pairs / total, "smallest": smallest.pairs / total,
    }  # fmt: skip
    return [
        Finding(
            name="topic_balance",
            level="warn" if warns else "ok",
            value=value,
            numbers=numbers,
            meaning="What is learned is learned for the largest topic, or differs by topic for reasons of length."
            if warns else "No topic outweighs the others.",
            advice="Build with --rebalance stratified or weights." if warns else "",
        )
    ]  # fmt: skip


def _apart(topics: Sequence[Stratum], longer_chosen: float | None) -> list[Stratum]:
    return [
        topic
        for topic in topics
        if topic.longer_chosen is not None
        and longer_chosen is not None
        and topic.pairs >= FEW
        and abs(topic.longer_chosen - longer_chosen) > WARN_TOPIC_LENGTH
    ]


def rebalanced(pairs: Sequence[PreferencePair], lengths: Sequence[LengthPair], *, how: How, seed: int) -> Finding:
    """How often the longer answer would be chosen after rebalancing."""
    length = {pair.pair_id: both for pair, both in zip(pairs, lengths, strict=True)}
    after = rebalance(pairs, how=how, seed=seed)
    unequal = [(_weight(pair), length[pair.pair_id]) for pair in after if len(set(length[pair.pair_id])) > 1]
    total = sum(weight for weight, _ in unequal)
    longer = sum(weight for weight, (chosen, rejected) in unequal if chosen > rejected) / total if total else None
    before = longer_preferred(lengths)
    most = max(map(_weight, after))
    different = len({pair.pair_id for pair in after})
    spent = f"{different:,} of {len(pairs):,} pairs drawn" if how == "stratified" else f"weights up to {most:.1f}"
    was = "" if before is None else f" (was {before.share:.1%})"
    return Finding(
        name="rebalanced",
        level="ok",
        value="all answers are equally long" if longer is None else
        f"{how}: the longer answer would be chosen in {longer:.1%}{was}; {spent}",
        numbers={"longer_preferred": longer, "different_pairs": different, "largest_weight": most},
        meaning="This is what a reward model would learn from.",
        advice=f"keel data build … --rebalance {'stratified' if how == 'stratified' else 'weights'}, or "
        f"rm.rebalance: {how}, which evens out the training pairs alone.",
    )  # fmt: skip


def _weight(pair: PreferencePair) -> float:
    return 1.0 if pair.weight is None else pair.weight
