"""Length in preference data: whether the longer answer wins, how lengths lie, and how even the pairs are by length.

Lengths are in words; in characters where texts do not put spaces between words. Pure functions; scipy for ranks.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Sequence
from typing import Final

from cluster.data_records import PreferencePair
from reward_service.audit.records import Finding, Lengths, Level, Number, Share, Stratum, share_of

WARN_OFF_EVEN: Final = 0.05
"""How far P(longer preferred) is from a half when it warns, its interval apart from a half besides,"""
BAD_OFF_EVEN: Final = 0.15
"""and when it is bad."""
MUCH_LONGER: Final = 2.0
"""Times as long."""
ABOUT_EQUAL: Final = 1.1
SMALL_STRATUM: Final = 0.05
"""Share of the pairs under which a stratum is not judged."""
LOPSIDED: Final = 0.15
"""How far from a half a stratum's share may be."""
_BINS: Final = 24
_SPACED: Final = re.compile(r"\S+")
_UNSPACED_WORD_CHARACTERS: Final = 20

LengthPair = tuple[int, int]
"""(chosen, rejected)"""


def length_unit(pairs: Sequence[PreferencePair]) -> str:
    """ "words", or "characters" for scripts without spaces."""
    texts = [text for pair in pairs[:500] for text in (pair.chosen, pair.rejected)]
    words = sum(len(_SPACED.findall(text)) for text in texts)
    return "characters" if words and sum(map(len, texts)) / words > _UNSPACED_WORD_CHARACTERS else "words"


def lengths_of(pairs: Sequence[PreferencePair], *, unit: str) -> list[LengthPair]:
    def length(text: str) -> int:
        return len(text) if unit == "characters" else len(_SPACED.findall(text))

    return [(length(pair.chosen), length(pair.rejected)) for pair in pairs]


def longer_preferred(lengths: Sequence[LengthPair]) -> Share | None:
    """Share of pairs of unequal length whose longer answer is the chosen one; None without such pairs."""
    unequal = [(chosen, rejected) for chosen, rejected in lengths if chosen != rejected]
    if not unequal:
        return None
    return share_of(sum(chosen > rejected for chosen, rejected in unequal), len(unequal))


def correlations(lengths: Sequence[LengthPair]) -> tuple[float | None, float | None]:
    """(point-biserial, Spearman) correlation of "this answer is preferred" with how much longer it is than the other.

    Each pair counts from both sides, so the labels are even and the differences symmetric about 0. None where all
    differences are 0.
    """
    differences = [chosen - rejected for chosen, rejected in lengths]
    if not any(differences):
        return None, None
    from scipy.stats import spearmanr

    mean = sum(differences) / len(differences)
    root_mean_square = math.sqrt(sum(one * one for one in differences) / len(differences))
    both = [*differences, *(-one for one in differences)]
    labels = [1] * len(differences) + [0] * len(differences)
    return mean / root_mean_square, float(spearmanr(both, labels).statistic)


def length_bias(lengths: Sequence[LengthPair], *, unit: str) -> Finding:
    """Whether the longer answer wins more or less often than not."""
    share = longer_preferred(lengths)
    point_biserial, spearman = correlations(lengths)
    numbers: dict[str, Number] = {"point_biserial": point_biserial, "spearman": spearman}
    if share is None:
        return Finding(
            name="length_bias",
            level="ok",
            value="all pairs have answers of equal length",
            numbers=numbers,
            meaning="Length cannot tell which answer is preferred.",
        )
    numbers |= {
        "longer_preferred": share.share, "low": share.low, "high": share.high, "pairs": share.count,
        "mean_chosen": _mean([chosen for chosen, _ in lengths]), "mean_rejected": _mean([less for _, less in lengths]),
    }  # fmt: skip
    level = _bias_level(share)
    side = "longer" if share.share > 0.5 else "shorter"
    if level == "ok":
        meaning = "Length alone says little about which answer is preferred."
        advice = ""
    else:
        meaning = (
            f"The {side} answer tends to win. A reward model can learn that in place of quality, and a policy trained "
            f"on it will then write {side} answers."
        )
        advice = (
            "Build with --rebalance stratified or weights, watch the validation card's accuracy on pairs of like "
            "length, and look whether single annotators cause it."
        )
    value = f"the longer answer is chosen in {share} of {share.count:,} pairs; correlation {point_biserial:+.2f}"
    return Finding(name="length_bias", level=level, value=f"{value} ({unit})", numbers=numbers, meaning=meaning,
                   advice=advice)  # fmt: skip


def _bias_level(share: Share) -> Level:
    if share.low <= 0.5 <= share.high or abs(share.share - 0.5) < WARN_OFF_EVEN:
        return "ok"
    return "bad" if abs(share.share - 0.5) >= BAD_OFF_EVEN else "warn"


def histogram(lengths: Sequence[LengthPair], *, unit: str) -> Lengths:
    """Of chosen and of rejected answers, in like bins; the last bin takes the longest 1 %."""
    every = sorted(length for both in lengths for length in both)
    top = every[min(len(every) - 1, int(len(every) * 0.99))] if every else 1
    width = max(1, math.ceil((top + 1) / _BINS))
    edges = tuple(range(0, top + width + 1, width))
    chosen, rejected = [0] * (len(edges) - 1), [0] * (len(edges) - 1)
    for first, second in lengths:
        chosen[_bin(first, edges)] += 1
        rejected[_bin(second, edges)] += 1
    return Lengths(unit=unit, edges=edges, chosen=tuple(chosen), rejected=tuple(rejected))


def _bin(length: int, edges: Sequence[int]) -> int:
    return min(bisect.bisect_right(edges, length) - 1, len(edges) - 2)


def length_strata(lengths: Sequence[LengthPair]) -> list[Stratum]:
    """Pairs by how unlike their lengths are."""
    names = ("about as long", "one longer", f"one over {MUCH_LONGER:g}× as long")
    members: dict[str, list[LengthPair]] = {name: [] for name in names}
    for both in lengths:
        ratio = (max(both) + 1) / (min(both) + 1)
        members[names[(ratio > ABOUT_EQUAL) + (ratio > MUCH_LONGER)]].append(both)
    return [Stratum(name=name, pairs=len(some), longer_chosen=_longer(some)) for name, some in members.items()]


def length_balance(strata: Sequence[Stratum]) -> Finding:
    """Whether in each stratum the longer answer wins about as often as the shorter one."""
    total = sum(stratum.pairs for stratum in strata)
    judged = [one for one in strata if one.longer_chosen is not None and one.pairs >= SMALL_STRATUM * total]
    worst = max(judged, key=lambda one: abs((one.longer_chosen or 0.5) - 0.5), default=None)
    lopsided = worst is not None and abs((worst.longer_chosen or 0.5) - 0.5) > LOPSIDED
    return Finding(
        name="length_balance",
        level="warn" if lopsided else "ok",
        value="; ".join(
            f"{one.name}: {one.pairs:,}"
            + ("" if one.longer_chosen is None else f" (longer chosen {one.longer_chosen:.0%})")
            for one in strata
        ),
        numbers={f"{one.name}: longer chosen": one.longer_chosen for one in strata},
        meaning=f"Where {worst.name}, length nearly decides." if lopsided and worst is not None else
        "Both outcomes occur at every difference of length.",
        advice="Build with --rebalance stratified, or collect pairs of like length." if lopsided else "",
    )  # fmt: skip


def _longer(lengths: Sequence[LengthPair]) -> float | None:
    share = longer_preferred(lengths)
    return None if share is None else share.share


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)
