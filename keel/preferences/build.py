"""`keel data build`: preferences in any form → canonical pairs, with what became of every record.

The files appear whole, once everything is read and labelled; after an error there are none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cluster.data_records import PreferencePair, write_rows
from cluster.errors import DataError
from cluster.labels import MIN_CONFIDENCE
from keel.preferences.audit import HOW, Rebalance, Say
from reward_service.audit.agreement import Agreement, agreement
from reward_service.audit.annotations import LoadedPreferences, Problem, load_preferences
from reward_service.audit.rebalance import rebalance

SHOWN_PROBLEMS: Final = 20


@dataclass(frozen=True)
class BuildOptions:
    """`columns`: Keel's field → the file's column. `held_out`: share of annotators, by id, whose votes make no label
    and go to a file of their own. `min_confidence`: least share of votes for the chosen answer."""

    columns: Mapping[str, str] = field(default_factory=dict)
    rebalance: Rebalance = "none"
    held_out: float = 0.0
    min_confidence: float = MIN_CONFIDENCE
    min_votes: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Built:
    """What was written, and what it was made of. `held_out_path`: None where nobody was held out."""

    path: Path
    pairs: int
    held_out_path: Path | None
    loaded: LoadedPreferences
    agreement: Agreement


def build(path: Path, *, out: Path, options: BuildOptions, say: Say) -> Built:
    """Read `path`, write canonical pairs to `out` (.jsonl) and say what there is.

    Raises DataError: input missing, damaged or without a usable pair; `out` no .jsonl or the input itself; no space.
    """
    _check_out(path, out)
    loaded = load_preferences(
        path,
        columns=options.columns,
        min_confidence=options.min_confidence,
        min_votes=options.min_votes,
        held_out_annotators=options.held_out,
        seed=options.seed,
    )
    measured = agreement([*loaded.votes, *loaded.held_out_votes], ratings=loaded.ratings)
    pairs = rebalance(loaded.pairs, how=HOW[options.rebalance], seed=options.seed)
    held_out_path = out.with_suffix(".held_out.jsonl") if loaded.held_out_pairs else None
    if held_out_path is not None:
        write_rows(held_out_path, loaded.held_out_pairs)
    write_rows(out, pairs)
    _say_counts(loaded, say)
    _say_agreement(measured, say)
    _say_problems(loaded.problems, path=path, say=say)
    say(f"wrote {_several(len(pairs), 'pair')} to {out}{_rebalanced(pairs, loaded.pairs, options)}")
    if held_out_path is not None:
        names = ", ".join(loaded.held_out)
        say(f"wrote {_several(len(loaded.held_out_pairs), 'pair')} labelled by {names} alone to {held_out_path}")
        say("their votes made no label: set rm.held_out_annotators to 0 in a run on these pairs")
    elif options.held_out:
        say(f"no pairs of held-out annotators: {_why_none_held_out(loaded, measured, share=options.held_out)}")
    return Built(out, len(pairs), held_out_path, loaded, measured)


def _why_none_held_out(loaded: LoadedPreferences, measured: Agreement, *, share: float) -> str:
    if loaded.held_out:
        return f"{', '.join(loaded.held_out)} left no clear label"
    return f"{share:.0%} of {_several(len(measured.annotators), 'named annotator')} is less than one"


def _check_out(path: Path, out: Path) -> None:
    if out.suffix != ".jsonl":
        raise DataError("pairs are written as JSON Lines", got=str(out), do="give --out a name that ends in .jsonl")
    if out.exists() and path.exists() and out.samefile(path):
        raise DataError("the output would replace the input", got=str(out), do="give --out another name")


def _several(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


# ---------------------------------------------------------------- words

_READ: Final = {"pairs": "pair", "comparisons": "comparison", "ratings": "rating"}


def _say_counts(loaded: LoadedPreferences, say: Say) -> None:
    counts, report = loaded.counts, loaded.report
    kinds = ", ".join(_several(counts[name], thing) for name, thing in _READ.items() if counts[name])
    say(f"read {_several(counts['records'], 'record')}{f': {kinds}' if kinds else ''}")
    say(f"used {_several(len(loaded.pairs), 'pair')}")
    if report.held_out:
        say(f"left out {_several(report.held_out, 'pair')} that held-out annotators alone judged")
    for reason, count in sorted(report.rejected.items(), key=lambda item: (-item[1], item[0])):
        say(f"  {count:,} not used: {reason}")
    if counts["ties"]:
        say(f"  {_several(counts['ties'], 'vote')} found both answers equal")
    if counts["turned"]:
        say(f"  {_several(counts['turned'], 'pair')} turned over: most of its votes were for the rejected answer")


def _say_agreement(measured: Agreement, say: Say) -> None:
    if measured.pairwise is not None and measured.alpha_votes is not None:
        couples = _several(measured.pairwise_count, "couple")
        say(f"annotators agree in {measured.pairwise:.1%} of {couples} of votes on one pair")
        say(f"Krippendorff's alpha of votes: {measured.alpha_votes:.2f} (1 perfect, 0 as by chance)")
    if measured.alpha_ratings is not None:
        say(f"Krippendorff's alpha of ratings: {measured.alpha_ratings:.2f} (interval)")
    for one in measured.annotators:
        if one.against:
            say(f"  {one.annotator}: {one.against}")


def _say_problems(problems: list[Problem], *, path: Path, say: Say) -> None:
    """Malformed records first: those can be repaired."""
    ordered = sorted(problems, key=lambda problem: (not problem.malformed, problem.line))
    for problem in ordered[:SHOWN_PROBLEMS]:
        say(f"{path}:{problem.line}: {problem.reason}")
    if len(ordered) > SHOWN_PROBLEMS:
        say(f"… and {len(ordered) - SHOWN_PROBLEMS:,} more records that were not used")


def _rebalanced(pairs: list[PreferencePair], before: list[PreferencePair], options: BuildOptions) -> str:
    if options.rebalance == "stratified":
        distinct = len({pair.pair_id for pair in pairs})
        return f", drawn evenly from strata: {distinct:,} of {len(before):,} pairs, some more than once"
    if options.rebalance == "weights":
        weights = [pair.weight or 0.0 for pair in pairs]
        return f", with weights from {min(weights):.2f} to {max(weights):.2f}"
    return ""
