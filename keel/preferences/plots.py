"""An audit's plots as PNG files: lengths, cues, balance, annotators. matplotlib is imported when one is drawn.

Blue is the chosen side in all of them, orange the rejected one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from reward_service.audit.agreement import LENGTH
from reward_service.audit.cues import Cue
from reward_service.audit.records import AnnotatorFacts, Audit, Leaning, Stratum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CHOSEN: Final = "#0969da"
_REJECTED: Final = "#d9730d"
_LONGER: Final = "#1a7f37"
_SHORTER: Final = "#8250df"
_GREY: Final = "#8c959f"
_DPI: Final = 130
_MOST_CUES: Final = 24
_MOST_ROWS: Final = 30
_LONGEST_NAME: Final = 34


def write_plots(audit: Audit, directory: Path) -> list[Path]:
    """Write what there are figures for; returns the files. Raises OSError."""
    plots: tuple[tuple[str, Callable[[Audit], Figure | None]], ...] = (
        ("lengths.png", _lengths),
        ("cues.png", _cues),
        ("balance.png", _balance),
        ("annotators.png", _annotators),
    )
    directory.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    with _plain_text():
        for name, draw in plots:
            figure = draw(audit)
            path = directory / name
            path.unlink(missing_ok=True)  # an earlier audit's, which would be taken for this one's
            if figure is not None:
                figure.savefig(path, dpi=_DPI)
                written.append(path)
    return written


@contextmanager
def _plain_text() -> Iterator[None]:
    """A dollar sign starts no formula, and a script that the font lacks is drawn as boxes without a warning; audit.json
    has it all."""
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _lengths(audit: Audit) -> Figure | None:
    lengths = audit.lengths
    if lengths is None:
        return None
    figure, (axes,) = _figure(width=7.0, height=3.4)
    for counts, colour, name in (
        (lengths.chosen, _CHOSEN, "chosen"), (lengths.rejected, _REJECTED, "rejected"),
    ):  # fmt: skip
        axes.stairs(counts, lengths.edges, fill=True, color=colour, alpha=0.18)
        axes.stairs(counts, lengths.edges, color=colour, linewidth=1.8, label=name)
    _titled(axes, "How long answers are", x=f"{lengths.unit} (the last bar: and longer)", y="answers")
    share = audit.number("length_bias", "longer_preferred")
    if share is not None:
        axes.set_title(f"longer answer chosen: {share:.0%}", fontsize=9, loc="right", color="#59636e")
    axes.set_xlim(0, lengths.edges[-1])
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)
    return figure


def _cues(audit: Audit) -> Figure | None:
    cues = sorted(audit.cues[:_MOST_CUES], key=lambda cue: cue.log_odds)
    if not cues:
        return None
    figure, (axes,) = _figure(width=7.0, height=1.3 + 0.24 * len(cues))
    for place, cue in enumerate(cues):
        colour = _CHOSEN if cue.favours == "chosen" else _REJECTED
        axes.errorbar(
            cue.log_odds, place, xerr=1.96 * cue.standard_error, fmt="o", color=colour, markersize=5, linewidth=1.4
        )
    axes.axvline(0, color=_GREY, linewidth=1)
    axes.set_yticks(range(len(cues)), [_cue_label(cue) for cue in cues])
    axes.set_ylim(-0.7, len(cues) - 0.3)
    _titled(axes, "Words that go with the label", x="log-odds, 95 % interval: ← rejected | chosen →")
    axes.set_title("share of chosen / rejected answers", fontsize=8, loc="right", color="#59636e")
    return figure


def _cue_label(cue: Cue) -> str:
    return f"{_name(cue.term)}  {cue.chosen_share:.0%} / {cue.rejected_share:.0%}"


def _balance(audit: Audit) -> Figure | None:
    groups = [("by length", audit.length_strata), ("by topic", audit.topics[:_MOST_ROWS])]
    groups = [(name, strata) for name, strata in groups if strata]
    if not groups:
        return None
    rows = [len(strata) for _, strata in groups]
    figure, all_axes = _figure(width=7.0, height=1.0 * len(rows) + 0.36 * sum(rows), rows=rows)
    for axes, (name, strata) in zip(all_axes, groups, strict=True):
        _stacked(axes, strata)
        _titled(axes, f"Pairs {name}", x="pairs")
    all_axes[0].legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0)
    return figure


def _stacked(axes: Axes, strata: tuple[Stratum, ...]) -> None:
    places = list(range(len(strata)))
    shares = [stratum.longer_chosen for stratum in strata]
    longer = [0.0 if share is None else stratum.pairs * share for stratum, share in zip(strata, shares, strict=True)]
    shorter = [
        0.0 if share is None else stratum.pairs * (1 - share) for stratum, share in zip(strata, shares, strict=True)
    ]
    unknown = [stratum.pairs if share is None else 0.0 for stratum, share in zip(strata, shares, strict=True)]
    axes.barh(places, longer, color=_LONGER, alpha=0.75, label="longer answer chosen")
    axes.barh(places, shorter, left=longer, color=_SHORTER, alpha=0.75, label="shorter answer chosen")
    if any(unknown):
        axes.barh(places, unknown, color=_GREY, label="equal length")
    for place, (stratum, share) in enumerate(zip(strata, shares, strict=True)):
        text = f" {stratum.pairs:,}" if share is None else f" {stratum.pairs:,} ({share:.0%} longer)"
        axes.text(stratum.pairs, place, text, va="center", fontsize=8)
    axes.set_yticks(places, [_name(stratum.name) for stratum in strata])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(stratum.pairs for stratum in strata))


def _annotators(audit: Audit) -> Figure | None:
    known = [one for one in audit.annotators if one.agreement is not None][:_MOST_ROWS]
    if not known:
        return None
    figure, all_axes = _figure(width=8.6, height=1.4 + 0.34 * len(known), columns=2)
    places = list(range(len(known)))
    _agreement(all_axes[0], known)
    all_axes[0].set_yticks(places, [_name(one.annotator) for one in known])
    _leanings(all_axes[1], known)
    all_axes[1].set_yticks(places, [""] * len(known))
    for axes in all_axes:
        axes.set_ylim(len(known) - 0.5, -0.5)
    return figure


def _agreement(axes: Axes, annotators: list[AnnotatorFacts]) -> None:
    for place, one in enumerate(annotators):
        share = one.agreement
        if share is not None:
            spread = [[share.share - share.low], [share.high - share.share]]
            colour = "#cf222e" if one.against else _CHOSEN
            axes.errorbar(share.share, place, xerr=spread, fmt="o", color=colour, markersize=5, linewidth=1.4)
    axes.axvline(0.5, color=_GREY, linewidth=1)
    _titled(axes, "Agreement with the majority of the others", x="share of votes, 95 % interval")


def _leanings(axes: Axes, annotators: list[AnnotatorFacts]) -> None:
    """One text a row: what draws this annotator, beside a bar of the strongest leaning's z."""
    for place, one in enumerate(annotators):
        strongest = max((leaning.z for leaning in one.leanings), key=abs, default=0.0)
        axes.barh(place, strongest, color=_SHORTER, alpha=0.75, height=0.55)
        text = ", ".join(_leaning(leaning) for leaning in one.leanings[:3]) or "like the others"
        axes.annotate(
            text, (max(strongest, 0.0), place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8
        )
    most = max((abs(leaning.z) for one in annotators for leaning in one.leanings), default=1.0)
    axes.set_xlim(
        0 if all(leaning.z > 0 for one in annotators for leaning in one.leanings) else -1.3 * most, 1.9 * most
    )
    _titled(axes, "What draws each more than the others", x="z of the strongest")


def _leaning(leaning: Leaning) -> str:
    if leaning.feature == LENGTH:
        return "longer answers" if leaning.z > 0 else "shorter answers"
    return f"“{_name(leaning.feature)}”"


# ---------------------------------------------------------------- common


def _figure(
    *, width: float, height: float, rows: list[int] | None = None, columns: int = 1
) -> tuple[Figure, list[Axes]]:
    """Made without pyplot: no global state, no display. `rows`: how high each is, relatively."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(
        len(rows or [1]), columns, squeeze=False, gridspec_kw={"height_ratios": [one + 1 for one in rows or [1]]}
    )
    every: list[Axes] = list(grid.flat)
    return figure, every


def _titled(axes: Axes, title: str, *, x: str = "", y: str = "") -> None:
    axes.set_title(title, fontsize=10, loc="left", fontweight="bold")
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, axis="x")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _name(text: str) -> str:
    """A user's text as a label: one short line."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return line if len(line) <= _LONGEST_NAME else line[: _LONGEST_NAME - 1] + "…"
