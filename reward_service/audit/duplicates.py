"""Repetition in preference data: pairs that occur twice, pairs judged both ways, prompts shared between stages.

Texts are compared without regard to case, punctuation and white space. Near-duplicates: word sets of Jaccard similarity
≥ NEAR, found by MinHash with locality-sensitive hashing (Broder 1997) and then compared exactly, so none is reported by
chance; a few near the threshold can be missed. Deterministic.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, Final

from cluster.data_records import PreferencePair, Prompt
from reward_service.audit.records import Finding, Level, Number

NEAR: Final = 0.8
"""Jaccard similarity of word sets (words and pairs of neighbours)."""
WARN_DUPLICATES: Final = 0.02
"""Share of the pairs that repeat another one,"""
BAD_DUPLICATES: Final = 0.2
WARN_CONTRADICTIONS: Final = 0.01
WARN_OVERLAP: Final = 0.3
"""Share of the RL prompts that SFT saw."""
MAX_PAIRS: Final = 20_000
"""Near-duplicates are sought among so many pairs."""
MAX_CANDIDATES: Final = 50
"""Likely near-duplicates that are compared with a text; more are not needed to know that it has one."""
_PERMUTATIONS: Final = 64

_WORD: Final = re.compile(r"\w+")
Shingles = frozenset[str]


def content_text(prompt: Prompt) -> str:
    """What a prompt says, without roles: messages one after another."""
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


def normalised(text: str) -> str:
    """Words alone, in lower case; the text itself where it holds no words."""
    return " ".join(_WORD.findall(text.casefold())) or " ".join(text.split())


def shingles(text: str) -> Shingles:
    """Words and pairs of neighbouring words of a normalised text."""
    words = text.split()
    return frozenset(words) | frozenset(map(" ".join, itertools.pairwise(words)))


def jaccard(a: Shingles, b: Shingles) -> float:
    return len(a & b) / len(a | b) if a or b else 1.0


class _Similar:
    """Texts by number; which of them are near another text."""

    def __init__(self) -> None:
        from datasketch import MinHashLSH

        self._index: Any = MinHashLSH(threshold=NEAR, num_perm=_PERMUTATIONS)
        self._shingles: dict[Hashable, Shingles] = {}

    def sketches(self, texts: Iterable[Shingles]) -> Iterator[Any]:
        from datasketch import MinHash

        empty = MinHash(num_perm=_PERMUTATIONS, hashfunc=zlib.crc32)
        for text in texts:
            sketch = empty.copy()
            sketch.update_batch([word.encode() for word in text])
            yield sketch

    def near(self, text: Shingles, sketch: Any) -> list[int]:
        """Numbers of the added texts that are near, in order."""
        candidates = sorted(self._index.query(sketch))[:MAX_CANDIDATES]
        return [number for number in candidates if jaccard(text, self._shingles[number]) >= NEAR]

    def add(self, number: int, text: Shingles, sketch: Any) -> None:
        self._shingles[number] = text
        self._index.insert(number, sketch, check_duplication=False)


def duplicates(pairs: Sequence[PreferencePair]) -> list[Finding]:
    """Pairs that repeat an earlier one, exactly or nearly; and pairs that say the opposite of an earlier one."""
    exact, opposed, rest = _exact(pairs)
    looked_at = rest[:MAX_PAIRS]
    near, near_opposed = _near(looked_at)
    return [
        _repetition(exact, near, total=len(pairs), looked_at=len(looked_at)),
        _contradiction(opposed, near_opposed, total=len(pairs)),
    ]


def _exact(pairs: Sequence[PreferencePair]) -> tuple[int, int, list[tuple[str, str, str]]]:
    """(repetitions, contradictions, the first of each kind as normalised (prompt, chosen, rejected))."""
    seen: set[tuple[str, str, str]] = set()
    first: list[tuple[str, str, str]] = []
    same = opposed = 0
    for pair in pairs:
        prompt, chosen, rejected = (
            normalised(text) for text in (content_text(pair.prompt), pair.chosen, pair.rejected)
        )
        if (prompt, chosen, rejected) in seen:
            same += 1
        elif (prompt, rejected, chosen) in seen:
            opposed += 1
        else:
            seen.add((prompt, chosen, rejected))
            first.append((prompt, chosen, rejected))
    return same, opposed, first


def _near(texts: Sequence[tuple[str, str, str]]) -> tuple[int, int]:
    """(near-repetitions, near-contradictions) of an earlier pair: prompt, and the answers in one order or the other."""
    similar = _Similar()
    parts = [tuple(shingles(text) for text in texts_of_pair) for texts_of_pair in texts]
    whole = [prompt | chosen | rejected for prompt, chosen, rejected in parts]
    same = opposed = 0
    for number, (text, sketch) in enumerate(zip(whole, similar.sketches(whole), strict=True)):
        how = {_alike(parts[number], parts[other]) for other in similar.near(text, sketch)}
        same += "same" in how
        opposed += "same" not in how and "opposed" in how
        similar.add(number, text, sketch)
    return same, opposed


def _alike(a: Sequence[Shingles], b: Sequence[Shingles]) -> str:
    """Whether two pairs ask nearly the same, and how their answers lie."""
    if jaccard(a[0], b[0]) < NEAR:
        return "other"
    if jaccard(a[1], b[1]) >= NEAR and jaccard(a[2], b[2]) >= NEAR:
        return "same"
    return "opposed" if jaccard(a[1], b[2]) >= NEAR and jaccard(a[2], b[1]) >= NEAR else "other"


def _repetition(exact: int, near: int, *, total: int, looked_at: int) -> Finding:
    share = (exact + near) / total
    level: Level = "bad" if share > BAD_DUPLICATES else "warn" if share > WARN_DUPLICATES else "ok"
    among = "" if looked_at + exact >= total else f" (near ones sought among {looked_at:,})"
    return Finding(
        name="duplicates",
        level=level,
        value=f"{exact:,} repeat another pair, {near:,} nearly ({share:.1%}){among}",
        numbers={"exact": exact, "near": near, "share": share},
        meaning="Repeated pairs count several times, and on both sides of a split they make held-out accuracy look "
        "better than it is." if level != "ok" else "Few pairs repeat another.",
        advice="Delete the repetitions. Keel splits by prompt, which keeps exact ones on one side, not near ones."
        if level != "ok" else "",
    )  # fmt: skip


def _contradiction(exact: int, near: int, *, total: int) -> Finding:
    share = (exact + near) / total
    warns = share > WARN_CONTRADICTIONS
    return Finding(
        name="contradictions",
        level="warn" if warns else "ok",
        value=f"{exact:,} pairs say the opposite of another one, {near:,} nearly ({share:.1%})",
        numbers={"exact": exact, "near": near, "share": share},
        meaning="Nothing can be learned from a pair and its opposite; annotators disagree, or some mixed up the sides."
        if warns else "Hardly any pair is judged both ways.",
        advice="Have those judged by more annotators and keep the majority; read some to see whether the task is clear."
        if warns else "",
    )  # fmt: skip


def prompt_overlap(sft: Sequence[Prompt], rl: Sequence[Prompt]) -> Finding:
    """How many of the prompts that PPO trains on were also in SFT's demonstrations. Neither may be empty."""
    known = {normalised(content_text(prompt)) for prompt in sft}
    asked = list(dict.fromkeys(normalised(content_text(prompt)) for prompt in rl))
    exact = [text for text in asked if text in known]
    others = [text for text in asked if text not in known]
    near = _near_any(others[:MAX_PAIRS], sorted(known)[:MAX_PAIRS])
    share = (len(exact) + near) / len(asked)
    numbers: dict[str, Number] = {
        "exact": len(exact), "near": near, "prompts": len(asked), "sft_prompts": len(known), "share": share,
    }  # fmt: skip
    warns = share > WARN_OVERLAP
    return Finding(
        name="prompt_overlap",
        level="warn" if warns else "ok",
        value=f"{len(exact):,} of {len(asked):,} different RL prompts are in SFT's, {near:,} nearly ({share:.0%})",
        numbers=numbers,
        meaning="On prompts with a known demonstration the policy has little left to explore, and what it gains there "
        "may not carry over." if warns else "RL asks mostly what SFT has not shown.",
        advice="Give SFT and RL prompts of their own: data.sft and data.prompts from different questions."
        if warns else "",
    )  # fmt: skip


def _near_any(texts: Sequence[str], known: Sequence[str]) -> int:
    """How many of `texts` are near one of `known`."""
    similar = _Similar()
    sets = [shingles(text) for text in known]
    for number, (text, sketch) in enumerate(zip(sets, similar.sketches(sets), strict=True)):
        similar.add(number, text, sketch)
    asked = [shingles(text) for text in texts]
    return sum(bool(similar.near(text, sketch)) for text, sketch in zip(asked, similar.sketches(asked), strict=True))
