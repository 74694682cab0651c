"""Answers can be full of length, of repetition, of a phrase, and each brings the others along: which of them is it that
the reward pays for?
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from keel.diagnose.evidence import known, worst_lasting
from keel.diagnose.match import Match
from keel.diagnose.record import RunRecord
from keel.diagnose.texts import reward_goes_with, reward_goes_with_alone, word_pays

HACKS: Final = ("length_bias", "over_used_phrase", "repetition")
HINTED: Final = 0.2
"""Strength from which on one of them may be what is paid."""
_EARLY_STEPS: Final = 5
_SURELY, _HARDLY = 0.6, 0.45
"""Correlations of length and reward over these steps: length is what is paid, and is not."""
_TELLING, _APART = 0.5, 0.15
"""A link of the reward with a word that counts, and how much weaker those with anything else must be."""
_ALONE: Final = 0.25
"""Difference of the reward's partial correlations with length and with repetition that settles which of them is paid;
over the fifty answers or so that a short run records, its standard error is about 0.2."""
_BATCHES, _PAID_REPETITION = 8, 0.4
"""At equal length the reward of so many batches goes with repetition by more than this, in the median: on the test bed
0.5 to 0.6 where it is paid, −0.1 to 0.35 where length, a word or nothing is. A good reward model may come to 0.5 too,
as thorough answers say some pairs again; but then nothing here looks like a hack."""
_DENSE: Final = 0.26
"""Share of distinct bigrams lost for each time that an answer grows by the reference's length. Answers that are only
longer lose 0.1 to 0.2, the same phrases coming up again; repetition that is paid loses more."""


def paid_for(hacks: Sequence[Match], record: RunRecord) -> str | None:
    """The name of one of `hacks`; None where nothing tells them apart."""
    names = {match.name for match in hacks}
    early = known(record.values("length_reward_correlation"))[:_EARLY_STEPS]
    at_first = float(np.median(early)) if len(early) else float("nan")
    settled = _settled(record) if {"length_bias", "repetition"} <= names else None
    if "length_bias" in names and at_first > _SURELY and settled != "repetition":
        return "length_bias"  # Whole batches say so, before the policy had changed: nothing says it better.
    links = reward_goes_with(record)
    words = next((match.words for match in hacks if match.name == "over_used_phrase"), ())
    word = word_pays(record, words) or 0.0
    if word > _TELLING and word - max(links.values(), default=0.0) > _APART:
        return "over_used_phrase"
    if settled is not None and max(hacks, key=lambda match: match.strength).name != "over_used_phrase":
        return settled
    if names == {"length_bias", "repetition"}:
        return _length_or_repetition(record, links, at_first=at_first)
    return None


def _settled(record: RunRecord) -> str | None:
    """By what the reward goes with when the other is held fixed: in whole batches where they tell, else in the answers
    that were kept."""
    batches = known(record.values("repetition_reward_correlation"))
    if len(batches) >= _BATCHES and float(np.median(batches)) > _PAID_REPETITION:
        return "repetition"
    alone = reward_goes_with_alone(record)
    if not alone or abs(alone["length"] - alone["repetition"]) < _ALONE:
        return None
    return "length_bias" if alone["length"] > alone["repetition"] else "repetition"


def _length_or_repetition(record: RunRecord, links: Mapping[str, float], *, at_first: float) -> str | None:
    """By three votes: how length went with reward at the start; which of the two the recorded answers' rewards follow
    more closely; and whether answers got more repetitive than their length explains."""
    votes: list[bool] = []
    if not math.isnan(at_first):
        votes.append(at_first < _HARDLY)
    if len(links) == 2:
        votes.append(links["repetition"] > links["length"])
    grown = worst_lasting(record.values("response_tokens_ratio")) - 1.0
    lost = 1.0 - worst_lasting(record.values("distinct_bigrams_ratio"), upward=False)
    if not math.isnan(grown + lost):
        votes.append(lost / max(grown, 0.1) > _DENSE)
    if not votes or 2 * sum(votes) == len(votes):
        return None
    return "repetition" if 2 * sum(votes) > len(votes) else "length_bias"
