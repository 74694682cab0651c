"""One record of preference data, in any of its forms → judgements of two answers, or a rated answer.

| form | fields |
|---|---|
| pair | chosen, rejected, prompt; where known votes, annotators, confidence, weight, policy_version, … |
| dialogues | chosen, rejected: whole dialogues that differ in the last answer |
| comparison | prompt, answer_a, answer_b, preferred: "a", "b" or "tie"; policy_version or policy_version_a and _b |
| ranking | prompt, answers; ranking: places in `answers`, best first, from 0; without it they are best first |
| rating | prompt, answer, rating |

The last three may have annotator, judged_at, source. A record's form shows in the fields it has, so one file may hold
several forms; other columns are ignored. Pure functions: what cannot be used comes back as Refused, with its reason,
for the caller to count.
"""

from __future__ import annotations

import datetime
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import msgspec

from cluster.data_records import PreferencePair, Prompt
from cluster.data_tables import Located
from cluster.dialogues import Rejection, check_answer, check_prompt, compare, compare_dialogues

FIELDS: Final = (
    "prompt", "chosen", "rejected", "pair_id", "votes", "annotators", "confidence", "weight", "policy_version",
    "rejected_version", "judged_at", "source", "answer_a", "answer_b", "preferred", "annotator", "policy_version_a",
    "policy_version_b", "answers", "ranking", "answer", "rating",
)  # fmt: skip
"""All that a column map may name."""
UNKNOWN: Final = ""
"""The annotator of a judgement that names none."""


@dataclass(frozen=True)
class Judged:
    """What one record, or several merged, says of two answers.

    `pair`: answer A as `chosen`, without votes. `opinions`: (annotator, prefers A; None: equal). No opinions: the
    record's own order is the label. `merges`: with other records on the same answers: never; if no annotator is in
    both; or always, an annotator's later judgement in place of the earlier.
    """

    line: int
    pair: PreferencePair
    opinions: tuple[tuple[str, bool | None], ...] = ()
    merges: Literal["never", "disjoint", "always"] = "never"


@dataclass(frozen=True)
class Rated:
    """One annotator's rating of one answer."""

    line: int
    prompt: Prompt
    answer: str
    rating: float
    annotator: str
    policy_version: int | None
    judged_at: str | None


@dataclass(frozen=True)
class Refused:
    """A record, or one pair of a ranking, that is left out. `reason` is a counter's name: few distinct values.
    `malformed`: it is none of the forms, or a field has the wrong type; else it is well formed and says nothing, as a
    comparison of equal answers."""

    line: int
    reason: str
    detail: str = ""
    malformed: bool = False


Item = Judged | Rated | Refused


class _Malformed(Exception):
    """A field of the wrong type or value."""

    def __init__(self, reason: str, *, got: Any) -> None:
        super().__init__(reason)
        self.reason, self.got = reason, repr(got)[:80]


def parse(row: Located, *, columns: Mapping[str, str]) -> list[Item]:
    """The judgements of one record; never none. `columns`: field → column, for those that are named otherwise."""
    absent = [column for column in columns.values() if column not in row.values]
    if absent:
        found = ", ".join(sorted(map(str, row.values))) or "none"
        return [Refused(row.line, "a mapped column is missing", f"no {absent[0]!r}; columns: {found}", malformed=True)]
    values = {
        field: row.values[columns.get(field, field)] for field in FIELDS if columns.get(field, field) in row.values
    }
    try:
        return _parser(values, found=row.values)(values, row.line)
    except _Malformed as problem:
        return [Refused(row.line, problem.reason, f"got {problem.got}", malformed=True)]


def _parser(values: dict[str, Any], *, found: Mapping[str, Any]) -> Callable[[dict[str, Any], int], list[Item]]:
    """By the first form of which all fields are there; null counts only where no other form fits (Parquet has every
    column in every row)."""
    for there in ([name for name in values if values[name] is not None], list(values)):
        for needed, parser in _FORMS:
            if set(needed) <= set(there):
                return parser
    raise _Malformed("none of the known forms", got=f"columns {', '.join(sorted(map(str, found))) or 'none'}")


# ---------------------------------------------------------------- forms


def _pair(values: dict[str, Any], line: int) -> list[Item]:
    if "prompt" in values:
        result = compare(values["prompt"], values["chosen"], values["rejected"])
    else:
        result = compare_dialogues(values["chosen"], values["rejected"])
    if isinstance(result, Rejection):
        return [Refused(line, result.reason)]
    votes, annotators = _votes(values), _names(values)
    if annotators is not None and len(annotators) != len(votes):
        raise _Malformed("votes and annotators differ in number", got=f"{len(votes)} and {len(annotators)}")
    pair = PreferencePair(
        pair_id=_text(values, "pair_id") or f"pair-{line:07d}",
        prompt=result.prompt,
        chosen=result.chosen,
        rejected=result.rejected,
        confidence=_number(values, "confidence", low=0.0, high=1.0),
        policy_version=_integer(values, "policy_version"),
        rejected_version=_integer(values, "rejected_version"),
        weight=_number(values, "weight", low=0.0),
        judged_at=_time(values),
        source=_text(values, "source"),
    )
    names = annotators or [UNKNOWN] * len(votes)
    opinions = tuple((name, vote) for name, vote in zip(names, votes, strict=True))
    return [Judged(line, pair, opinions, merges="disjoint" if annotators else "never")]


def _comparison(values: dict[str, Any], line: int) -> list[Item]:
    result = compare(values["prompt"], values["answer_a"], values["answer_b"])
    if isinstance(result, Rejection):
        return [Refused(line, result.reason)]
    said = str(values["preferred"]).strip().lower()
    if said not in ("a", "b", "tie"):
        raise _Malformed("preferred is not a, b or tie", got=values["preferred"])
    both = _integer(values, "policy_version")
    version_a, version_b = _integer(values, "policy_version_a"), _integer(values, "policy_version_b")
    version_a, version_b = both if version_a is None else version_a, both if version_b is None else version_b
    pair = PreferencePair(
        pair_id=_text(values, "pair_id") or f"pair-{line:07d}",
        prompt=result.prompt,
        chosen=result.chosen,
        rejected=result.rejected,
        policy_version=version_a,
        rejected_version=None if version_b == version_a else version_b,
        weight=_number(values, "weight", low=0.0),
        judged_at=_time(values),
        source=_text(values, "source"),
    )
    opinion = None if said == "tie" else said == "a"
    return [Judged(line, pair, ((_annotator(values), opinion),), merges="always")]


def _ranking(values: dict[str, Any], line: int) -> list[Item]:
    answers = values["answers"]
    if not isinstance(answers, list) or len(answers) < 2:
        raise _Malformed("answers is not a list of two or more", got=answers)
    order = values.get("ranking")
    if order is None:
        order = list(range(len(answers)))
    if not isinstance(order, list) or any(type(place) is not int for place in order) or (
        sorted(order) != list(range(len(answers)))
    ):  # fmt: skip
        raise _Malformed("ranking does not name every place in answers once, from 0", got=order)
    shared: dict[str, Any] = {
        key: values[key]
        for key in ("prompt", "annotator", "policy_version", "judged_at", "source", "weight")
        if key in values
    }
    ranking_id = _text(values, "pair_id") or f"ranking-{line:07d}"
    items: list[Item] = []
    for better, worse in itertools.combinations(range(len(order)), 2):
        shared |= {"answer_a": answers[order[better]], "answer_b": answers[order[worse]], "preferred": "a"}
        items += _comparison(shared | {"pair_id": f"{ranking_id}-{better}-{worse}"}, line)
    return items


def _rating(values: dict[str, Any], line: int) -> list[Item]:
    prompt, answer = check_prompt(values["prompt"]), check_answer(values["answer"])
    for checked in (prompt, answer):
        if isinstance(checked, Rejection):
            return [Refused(line, checked.reason)]
    rating = _number(values, "rating")
    if rating is None or isinstance(prompt, Rejection) or isinstance(answer, Rejection):
        raise _Malformed("rating is not a number", got=values["rating"])
    version = _integer(values, "policy_version")
    return [Rated(line, prompt, answer, rating, _annotator(values), version, _time(values))]


_FORMS: Final[Sequence[tuple[tuple[str, ...], Callable[[dict[str, Any], int], list[Item]]]]] = (
    (("chosen", "rejected"), _pair),
    (("prompt", "answer_a", "answer_b", "preferred"), _comparison),
    (("prompt", "answers"), _ranking),
    (("prompt", "answer", "rating"), _rating),
)


# ---------------------------------------------------------------- fields


def _text(values: dict[str, Any], field: str) -> str | None:
    value = values.get(field)
    if value is None or isinstance(value, str):
        return value
    raise _Malformed(f"{field} is not text", got=value)


def _annotator(values: dict[str, Any]) -> str:
    return _name(values.get("annotator"), field="annotator")


def _name(value: Any, *, field: str) -> str:
    if value is None:
        return UNKNOWN
    if isinstance(value, str) or type(value) is int:
        return str(value).strip()
    raise _Malformed(f"{field} is neither text nor a whole number", got=value)


def _names(values: dict[str, Any]) -> list[str] | None:
    names = values.get("annotators")
    if names is None:
        return None
    if not isinstance(names, list):
        raise _Malformed("annotators is not a list", got=names)
    ids = [_name(name, field="an annotator") for name in names]
    known = [name for name in ids if name != UNKNOWN]
    if len(set(known)) != len(known):
        raise _Malformed("an annotator votes twice", got=names)
    return ids


def _votes(values: dict[str, Any]) -> list[bool]:
    votes = values.get("votes")
    if votes is None:
        return []
    if not isinstance(votes, list) or not all(isinstance(vote, bool) for vote in votes):
        raise _Malformed("votes is not a list of true and false (true: for chosen)", got=votes)
    return votes


def _integer(values: dict[str, Any], field: str) -> int | None:
    value = values.get(field)
    if value is None or type(value) is int:
        return value
    if isinstance(value, float) and value.is_integer():  # Parquet turns whole numbers with gaps into floats
        return int(value)
    raise _Malformed(f"{field} is not a whole number", got=value)


def _number(values: dict[str, Any], field: str, *, low: float = -math.inf, high: float = math.inf) -> float | None:
    value = values.get(field)
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:  # a whole number of hundreds of digits
        number = math.inf
    if not math.isfinite(number):
        raise _Malformed(f"{field} is not a number", got=value)
    if not low <= number <= high:
        raise _Malformed(f"{field} is not in [{low:g}, {high:g}]", got=value)
    return number


def _time(values: dict[str, Any]) -> str | None:
    """ISO 8601, from that, seconds since 1970, or Parquet's own type."""
    value = values.get("judged_at")
    if value is None:
        return None
    try:
        if isinstance(value, str):
            datetime.datetime.fromisoformat(value)
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return datetime.datetime.fromtimestamp(value, tz=datetime.UTC).isoformat()
        if isinstance(value, datetime.datetime):
            return value.isoformat()
    except (ValueError, OverflowError, OSError) as error:
        raise _Malformed("judged_at is not a time in ISO 8601", got=value) from error
    raise _Malformed("judged_at is not a time in ISO 8601", got=value)


# ---------------------------------------------------------------- merging


def merged(first: Judged, later: Judged) -> Judged | None:
    """Both records' opinions on the same two answers, in the order of `first`; None where they must stay apart.

    Answers known under several ids or policy versions keep those of `first`.
    """
    same_order = first.pair.chosen == later.pair.chosen
    new = [
        (name, opinion if opinion is None or same_order else not opinion) for name, opinion in later.opinions
    ]  # fmt: skip
    named = {name for name, _ in new if name != UNKNOWN}
    overlap = any(name in named for name, _ in first.opinions)
    if overlap and "disjoint" in (first.merges, later.merges):
        return None
    kept = [(name, opinion) for name, opinion in first.opinions if name not in named]
    pair = msgspec.structs.replace(first.pair, judged_at=later.pair.judged_at or first.pair.judged_at)
    return replace(first, pair=pair, opinions=(*kept, *new))
