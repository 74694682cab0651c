"""The validation card's charts, as base64 of SVG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from cluster.charts import empty_chart, svg_base64
from reward_service.card.records import Card, Distribution, NamedRate, RankCorrelation, Rate, Reliability

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE_INCHES: Final = (4.8, 3.0)
_BLUE, _RED, _GREEN, _GREY, _AMBER = "#0969da", "#cf222e", "#1a7f37", "#8c959f", "#bf8700"
_SOURCES: Final = {"train": ("training answers", _GREY), "held_out": ("held-out answers", _BLUE),
                   "policy": ("the policy's answers", _RED)}  # fmt: skip
_LABEL_WIDTH: Final = 24


def charts(card: Card) -> list[tuple[str, str]]:
    """(title, base64 of SVG) of every chart that the card has figures for."""
    drawn = [("Reliability", _reliability(card.reliability)), ("Scores", _distributions(card))]
    differences = _shares([*card.length.by_difference], title="Accuracy by length difference", least=card.min_accuracy)
    drawn.append(("Accuracy by length difference", differences))
    if card.annotators:
        names = [
            NamedRate(name=each.annotator + (" (held out)" if each.held_out else ""), rate=each.rate)
            for each in card.annotators
        ]
        title = "Agreement with each annotator"
        drawn.append((title, _shares(names, title=title, least=card.min_accuracy)))
    if card.probes:
        names = [NamedRate(name=probe.kind.replace("_", " "), rate=probe.rate) for probe in card.probes]
        drawn.append(("Probes passed", _shares(names, title="Probes passed", least=0.8)))
    if card.rank:
        drawn.append(("Scores against people", _ranking(card.rank)))
    return drawn


def _reliability(part: Reliability) -> str:
    figure, axes = empty_chart(
        "Reliability", "confidence, σ(|margin|)", "share ordered right", size_inches=_SIZE_INCHES
    )
    axes.plot([0.5, 1.0], [0.5, 1.0], color=_GREY, linewidth=1, linestyle="--", label="calibrated")
    x = [each.confidence for each in part.bins]
    _whiskers(axes, x, [each.right for each in part.bins], colour=_BLUE, label="held-out pairs", line="-")
    axes.set_xlim(0.49, 1.01)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return svg_base64(figure)


def _distributions(card: Card) -> str:
    figure, axes = empty_chart("Scores", "score", "share of answers", size_inches=_SIZE_INCHES)
    for found in card.distributions:
        name, colour = _SOURCES[found.source]
        shares = _cumulated(found)
        axes.stairs(shares, card.edges, color=colour, linewidth=1.5, label=f"{name} ({found.count:,})")
        axes.stairs(shares, card.edges, color=colour, alpha=0.10, fill=True)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    return svg_base64(figure)


def _cumulated(found: Distribution) -> list[float]:
    return [count / found.count for count in found.counts]


def _shares(rates: Sequence[NamedRate], *, title: str, least: float) -> str:
    """A line a share with its interval; dotted at a coin's 0.5, dashed at what is wanted."""
    figure, axes = empty_chart(title, "share, with its 95 % interval", "", size_inches=_SIZE_INCHES)
    places = list(range(len(rates)))[::-1]
    axes.axvline(0.5, color=_GREY, linewidth=1, linestyle=":")
    axes.axvline(least, color=_GREY, linewidth=1, linestyle="--")
    for place, found in zip(places, rates, strict=True):
        rate = found.rate
        colour = _RED if rate.high < 0.5 else _AMBER if rate.share < least else _GREEN
        axes.plot([rate.low, rate.high], [place, place], color=colour, linewidth=2.2, solid_capstyle="butt", alpha=0.55)
        axes.plot([rate.share], [place], "o", color=colour, markersize=5)
    axes.set_yticks(places, [f"{_plain(_short(found.name))}\nn = {found.rate.n}" for found in rates], fontsize=7)
    axes.set_ylim(-0.6, len(rates) - 0.4)
    axes.set_xlim(-0.02, 1.02)
    return svg_base64(figure)


def _ranking(ranks: Sequence[RankCorrelation]) -> str:
    """Of the newest answers that people or gold scored; else margins against votes."""
    human = [rank for rank in ranks if rank.against == "human scores"]
    rank = human[-1] if human else ranks[-1]
    of_pairs = rank.against == "votes"
    figure, axes = empty_chart(
        f"{'Margins against votes' if of_pairs else 'Scores against human scores'}: ρ = {rank.spearman:.2f}",
        "margin" if of_pairs else "score",
        "share of votes − ½" if of_pairs else "human or gold score",
        size_inches=_SIZE_INCHES,
    )
    x, y = zip(*rank.points, strict=True)
    axes.scatter(x, y, s=12, color=_BLUE, alpha=0.5, linewidths=0)
    return svg_base64(figure)


def _whiskers(axes: Axes, x: Sequence[float], rates: Sequence[Rate], *, colour: str, label: str, line: str) -> None:
    shares = [rate.share for rate in rates]
    below = [rate.share - rate.low for rate in rates]
    above = [rate.high - rate.share for rate in rates]
    axes.errorbar(x, shares, yerr=[below, above], fmt="o" + line, color=colour, markersize=4, linewidth=1.4,
                  elinewidth=1, capsize=2, label=label)  # fmt: skip


def _short(name: str) -> str:
    return name if len(name) <= _LABEL_WIDTH + 8 else name[: _LABEL_WIDTH + 7] + "…"


def _plain(name: str) -> str:
    """A name that people chose, and not matplotlib's formulas."""
    return name.replace("$", r"\$")
