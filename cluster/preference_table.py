"""A table of preference data → labelled pairs, with every record used, merged, or refused for a counted reason.

Records on the same two answers by different annotators are merged into one pair with their votes; the label is the
majority's. Ratings are put on each annotator's own scale (z-scores), averaged over annotators, and compared within a
prompt. The forms of a record are in cluster/judgements.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import msgspec

from cluster.data_records import PreferencePair, TableReport, stable_prompt_id
from cluster.data_tables import Unreadable, check_columns, scan_table
from cluster.errors import DataError
from cluster.judgements import FIELDS, UNKNOWN, Judged, Rated, Refused, merged, parse
from cluster.labels import MIN_CONFIDENCE, labelled, pick_held_out
from cluster.ratings import Rating, rated_pairs
from configs.run import FileSource, HubSource

LOW_CONFIDENCE: Final = "low confidence"
TOO_FEW_VOTES: Final = "too few votes"
MERGED: Final = "merged with an earlier record on the same answers"
_SHOWN: Final = 5


@dataclass(frozen=True)
class Vote:
    """One annotator on one pair, in the order that the pair has now. Ties and unknown annotators are left out."""

    pair_id: str
    annotator: str
    prefers_chosen: bool


@dataclass(frozen=True)
class Problem:
    """A record that is not used, and why. `line`: of the file, or number of the row. `malformed`: it can be repaired;
    else it is well formed and compares nothing."""

    line: int
    reason: str
    malformed: bool


@dataclass
class LoadedPreferences:
    """What a table gave.

    `pairs`: with a clear majority of the annotators that were not held out. `unclear`: judged, without one; `chosen`
    is whichever answer came first. `held_out_pairs`: labelled by the held-out annotators alone, in their order; most
    are among `pairs` too, under the same pair_id. `votes`, `held_out_votes`: by named annotators, in the order that the
    pair has in `pairs` or `unclear`, else in `held_out_pairs`. `report`: in pairs, so a ranking of k answers counts
    k(k − 1)/2, and a record that never came to be pairs counts once. `counts`: how the records came: "records",
    "pairs", "comparisons", "ratings", "merged", "ties", "turned" (order set right by the votes).
    """

    pairs: list[PreferencePair] = field(default_factory=list)
    unclear: list[PreferencePair] = field(default_factory=list)
    votes: list[Vote] = field(default_factory=list)
    ratings: list[Rating] = field(default_factory=list)
    held_out: tuple[str, ...] = ()
    held_out_votes: list[Vote] = field(default_factory=list)
    held_out_pairs: list[PreferencePair] = field(default_factory=list)
    report: TableReport = field(default_factory=TableReport)
    problems: list[Problem] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def read_preferences(
    source: FileSource | HubSource,
    *,
    min_confidence: float = MIN_CONFIDENCE,
    min_votes: int = 1,
    held_out_annotators: float = 0.0,
    seed: int = 0,
    needed: bool = True,
) -> LoadedPreferences:
    """Read, merge and label. `needed`: that no pair is usable is an error.

    Raises DataError: source missing or damaged, unknown field in the column map, nothing usable (with the first
    problems).
    """
    check_columns(source, fields=FIELDS)
    loaded = LoadedPreferences()
    judged, rated = _gather(source, loaded)
    names = {name for one in judged for name, _ in one.opinions} | {one.annotator for one in rated}
    loaded.held_out = pick_held_out(names - {UNKNOWN}, held_out_annotators, seed=seed)
    labeller = _Labeller(loaded, min_confidence=min_confidence, min_votes=min_votes)
    for one in judged:
        labeller.add(one)
    loaded.ratings, pairs = rated_pairs(rated, held_out=loaded.held_out, report=loaded.report)
    for pair, opinions in pairs:
        loaded.pairs.append(pair)
        labeller.note_votes(pair, opinions)
    loaded.report.used = len(loaded.pairs)
    if needed and not loaded.pairs:
        raise DataError(
            f"no usable preference in {_name(source)}",
            got=_summary(loaded),
            do="see the forms in cluster/judgements.py; map columns by `columns: {field: column}`",
        )
    return loaded


def require_well_formed(loaded: LoadedPreferences, source: FileSource | HubSource) -> None:
    """For those who train on a table as it is: raise DataError if any record is malformed, naming file and line."""
    malformed = [problem for problem in loaded.problems if problem.malformed]
    if malformed:
        raise DataError(
            f"{len(malformed)} malformed record{'s' if len(malformed) > 1 else ''} in data.preferences",
            got=_lines(malformed, prefix=f"{_name(source)}:"),
            do="repair or delete them, or leave them out by `keel data build`",
        )


def _summary(loaded: LoadedPreferences) -> str:
    counts = ", ".join(f"{reason}: {count}" for reason, count in sorted(loaded.report.rejected.items()))
    return f"{loaded.counts['records']} records; {counts or 'nothing refused'}. {_lines(loaded.problems)}".rstrip()


def _name(source: FileSource | HubSource) -> str:
    return str(source.path) if isinstance(source, FileSource) else source.name


def _lines(problems: Sequence[Problem], *, prefix: str = "line ") -> str:
    shown = "; ".join(f"{prefix}{problem.line}: {problem.reason}" for problem in problems[:_SHOWN])
    return f"{shown}; …" if len(problems) > _SHOWN else shown


# ---------------------------------------------------------------- gathering


def _gather(source: FileSource | HubSource, loaded: LoadedPreferences) -> tuple[list[Judged], list[Rated]]:
    """All judgements, those on the same answers merged where they may be, in the order of first mention."""
    judged: list[Judged] = []
    rated: list[Rated] = []
    places: dict[tuple[str, frozenset[str]], int] = {}
    ids: set[str] = set()
    for row in scan_table(source):
        loaded.counts["records"] += 1
        if isinstance(row, Unreadable):
            _refuse(loaded, Refused(row.line, row.reason, row.got, malformed=True))
            continue
        for item in parse(row, columns=source.columns):
            if isinstance(item, Refused):
                _refuse(loaded, item)
            elif isinstance(item, Rated):
                loaded.counts["ratings"] += 1
                rated.append(item)
            else:
                _place(item, judged, places, ids=ids, loaded=loaded)
    return judged, rated


def _refuse(loaded: LoadedPreferences, item: Refused) -> None:
    loaded.report.read += 1
    loaded.report.reject(item.reason)
    detail = f" ({item.detail})" if item.detail else ""
    loaded.problems.append(Problem(item.line, f"{item.reason}{detail}", item.malformed))


def _place(
    item: Judged,
    judged: list[Judged],
    places: dict[tuple[str, frozenset[str]], int],
    *,
    ids: set[str],
    loaded: LoadedPreferences,
) -> None:
    loaded.report.read += 1
    loaded.counts["comparisons" if item.merges == "always" else "pairs"] += 1
    if item.merges != "never":
        key = (stable_prompt_id(item.pair.prompt), frozenset((item.pair.chosen, item.pair.rejected)))
        place = places.get(key)
        both = None if place is None else merged(judged[place], item)
        if place is not None and both is not None:
            judged[place] = both
            loaded.counts["merged"] += 1
            loaded.report.reject(MERGED)
            return
        places[key] = len(judged)
    if item.pair.pair_id in ids:
        item = replace(item, pair=msgspec.structs.replace(item.pair, pair_id=f"{item.pair.pair_id}@{item.line}"))
    ids.add(item.pair.pair_id)
    judged.append(item)


# ---------------------------------------------------------------- labelling


class _Labeller:
    """Puts each pair where it belongs, and its votes with it."""

    def __init__(self, loaded: LoadedPreferences, *, min_confidence: float, min_votes: int) -> None:
        self._loaded = loaded
        self._held_out = frozenset(loaded.held_out)
        self._min_confidence, self._min_votes = min_confidence, min_votes

    def add(self, judged: Judged) -> None:
        loaded = self._loaded
        theirs = [(name, opinion) for name, opinion in judged.opinions if name in self._held_out]
        rest = [(name, opinion) for name, opinion in judged.opinions if name not in self._held_out]
        by_them = self._label(judged.pair, theirs, everyone=not rest) if theirs else None
        if by_them is not None:
            loaded.held_out_pairs.append(by_them)
        if not rest and by_them is not None:
            loaded.report.held_out += 1
            self.note_votes(by_them, [(name, _as_in(judged.pair, by_them, opinion)) for name, opinion in theirs])
            return
        pair = self._label(judged.pair, rest, everyone=not theirs) if rest or not theirs else None
        enough = max(1, len(rest)) >= self._min_votes
        if pair is not None and enough:
            loaded.pairs.append(pair)
            loaded.counts["turned"] += judged.merges != "always" and pair.chosen != judged.pair.chosen
        else:
            loaded.report.reject(LOW_CONFIDENCE if enough else TOO_FEW_VOTES)
            pair = _voted(judged.pair, rest)
            loaded.unclear.append(pair)
        self.note_votes(pair, [(name, _as_in(judged.pair, pair, opinion)) for name, opinion in judged.opinions])

    def note_votes(self, pair: PreferencePair, opinions: Iterable[tuple[str, bool | None]]) -> None:
        """`opinions` in the order of `pair`."""
        for name, opinion in opinions:
            if opinion is None:
                self._loaded.counts["ties"] += 1
            elif name != UNKNOWN:
                votes = self._loaded.held_out_votes if name in self._held_out else self._loaded.votes
                votes.append(Vote(pair.pair_id, name, opinion))

    def _label(
        self, pair: PreferencePair, opinions: Sequence[tuple[str, bool | None]], *, everyone: bool
    ) -> PreferencePair | None:
        """The label by `opinions`. `everyone`: nobody's are left out, so the record's own confidence holds for them
        too; it may know of ties, which leave no vote."""
        stated = pair.confidence if everyone else None
        if stated is not None and stated < self._min_confidence:
            return None
        if not opinions:
            return pair
        ties = sum(opinion is None for _, opinion in opinions)
        label = labelled(_voted(pair, opinions), ties=ties, min_confidence=self._min_confidence)
        if label is None or label.confidence is None or stated is None or label.chosen != pair.chosen:
            return label
        return msgspec.structs.replace(label, confidence=min(label.confidence, stated))


def _voted(pair: PreferencePair, opinions: Sequence[tuple[str, bool | None]]) -> PreferencePair:
    votes = [(name, opinion) for name, opinion in opinions if opinion is not None]
    named = any(name != UNKNOWN for name, _ in votes)
    return msgspec.structs.replace(
        pair,
        votes=tuple(opinion for _, opinion in votes),
        annotators=tuple(name for name, _ in votes) if named else None,
        confidence=None,
    )


def _as_in(before: PreferencePair, after: PreferencePair, opinion: bool | None) -> bool | None:
    return opinion if opinion is None or before.chosen == after.chosen else not opinion
