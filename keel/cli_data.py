"""The verbs about preference data: `keel data audit`, `keel data build`, `keel advise`. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cluster.errors import ConfigError

data_app = typer.Typer(
    help="Preference data: say what is wrong with it, or build it from votes, rankings and ratings.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

ColumnOption = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="FIELD=COLUMN", help="Keel's field: the file's column. Repeatable."),
]
RebalanceChoice = Literal["none", "stratified", "weights"]


def _columns(options: list[str] | None) -> dict[str, str]:
    pairs = [option.partition("=") for option in options or []]
    for field, separator, column in pairs:
        if not (field and separator and column):
            raise ConfigError("a column map is FIELD=COLUMN", got=field, do="e.g. --column prompt=question")
    return {field: column for field, _, column in pairs}


@data_app.command("audit")
def data_audit(
    preferences: Annotated[
        Path, typer.Argument(metavar="PREFERENCES", help="JSON Lines (also .gz) or Parquet, or a run's directory.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Where audit.json and plots go; left out: PREFERENCES.audit/.")
    ] = None,
    column: ColumnOption = None,
    sft: Annotated[Path | None, typer.Option(help="SFT's demonstrations, to compare prompts.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="RL's prompts, to compare with SFT's.")] = None,
    rebalance: Annotated[RebalanceChoice, typer.Option(help="Say what rebalancing would change.")] = "none",
    seed: Annotated[int, typer.Option(help="Of samples and folds.")] = 0,
) -> None:
    """Say what is wrong with preferences before a reward model learns it: a table, audit.json, plots."""
    from keel.preferences.audit import AuditInput, audit_file

    what = AuditInput(preferences, columns=_columns(column), sft=sft, prompts=prompts, rebalance=rebalance)
    audit_file(what, out=out, seed=seed, say=typer.echo)


@data_app.command("build")
def data_build(
    source: Annotated[
        Path, typer.Argument(metavar="INPUT", help="Pairs, comparisons, rankings or ratings; JSON Lines or Parquet.")
    ],
    out: Annotated[Path, typer.Option(help="Where the pairs go, a .jsonl file: data.preferences reads it.")],
    column: ColumnOption = None,
    rebalance: Annotated[
        RebalanceChoice, typer.Option(help="Against lopsided data: draw strata evenly, or weigh pairs.")
    ] = "none",
    hold_out: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of annotators whose votes go to a file of their own.")
    ] = 0.0,
    min_confidence: Annotated[
        float, typer.Option(min=0.5, max=1.0, help="Least share of votes for the chosen answer.")
    ] = 0.6,
    min_votes: Annotated[int, typer.Option(min=1, help="Fewest votes a pair needs.")] = 1,
    seed: Annotated[int, typer.Option(help="Of draws.")] = 0,
) -> None:
    """Make preference pairs from whatever people gave: majority of votes, rankings, ratings as z-scores.

    Counts every record: used, merged, or refused with its line and reason.
    """
    from keel.preferences.build import BuildOptions, build

    options = BuildOptions(
        columns=_columns(column), rebalance=rebalance, held_out=hold_out, min_confidence=min_confidence,
        min_votes=min_votes, seed=seed,
    )  # fmt: skip
    build(source, out=out, options=options, say=typer.echo)


def advise(
    preferences: Annotated[
        Path | None, typer.Argument(metavar="[PREFERENCES]", help="A file, a run, or an audit.json made earlier.")
    ] = None,
    factual: Annotated[bool | None, typer.Option(help="Answers are right or wrong, to be looked up.")] = None,
    verifiable: Annotated[bool | None, typer.Option(help="A program can check an answer.")] = None,
    baseline: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Share of answers that are good now.")
    ] = None,
    latency_ms: Annotated[float | None, typer.Option(help="Most milliseconds for an answer.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON; asks nothing.")] = False,
) -> None:
    """RLHF, DPO, rules or SFT: which fits, why, and what would change that. On a terminal, asks what is not given."""
    from keel.preferences.advise import advise_command
    from reward_service.audit.advise import Answers

    answers = Answers(factual=factual, verifiable=verifiable, baseline=baseline, latency_ms=latency_ms)
    advise_command(preferences, answers=answers, as_json=as_json, say=typer.echo)
