"""One frame of `keel top`: lines that fit the terminal, most important first. Levels stand as words too, so that
nothing hangs on colour."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Final

from rich.console import Group
from rich.text import Text

from cluster.files import Json
from keel.display import GAP, number, one_line, says_again, seconds_text
from keel.signal_levels import limits
from keel.top_view import Concern, Curve, TopView
from learner.guard.record import Level

_BARS: Final = "▁▂▃▄▅▆▇█"
_PLAIN_BARS: Final = ".:-=+*#@"
_STYLES: Final = {Level.OK: "green", Level.WARN: "yellow", Level.ACT: "bold red"}
_STATE_STYLES: Final = {"running": "green", "finished": "cyan", "halted": "bold red", "silent": "yellow"}
_ROOMY_LINES: Final = 32
"""A terminal of so many lines gets blank ones between the parts."""
_NAME, _VALUE = 10, 20
"""Columns of a curve's name and value."""


def frame(view: TopView, *, now_s: float, width: int, height: int | None, plain: bool = False) -> Group:
    """`height` None: as long as it takes. `plain`: in ASCII where it matters."""
    fixed = [_header(view, now_s, width), _curves(view, width, plain), _machine(view)]
    roomy = height is None or height >= _ROOMY_LINES
    used = sum(len(part) + roomy for part in fixed) + 1
    room = None if height is None else height - used
    guard = _guard(view, None if room is None else max(2, room - 3))
    events = _events(view, None if room is None else max(0, room - len(guard)))
    lines = _joined([fixed[0], guard, fixed[1], fixed[2], events], roomy=roomy)
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
        line.truncate(width, overflow="ellipsis")
    return Group(*(lines if height is None else lines[: max(1, height - 1)]))


def _joined(parts: Sequence[list[Text]], *, roomy: bool) -> list[Text]:
    """One below the other, with a blank line between those that are not empty."""
    lines: list[Text] = []
    for part in filter(None, parts):
        lines += [*([Text("")] if roomy and lines else []), *part]
    return lines


# ---------------------------------------------------------------- parts


def _header(view: TopView, now_s: float, width: int) -> list[Text]:
    state = view.state(now_s)
    going = state.word == "running"
    news_s = view.news_s()
    ago = seconds_text(max(0.0, now_s - news_s))
    detail = f"for {ago}: {state.detail}" if state.word == "silent" else state.detail
    word = (state.word.upper(), _STATE_STYLES.get(state.word, "dim"))
    name = (one_line(view.path.name), "bold")
    title = Text.assemble(("keel top ", "dim"), name, "  ", word, f" {one_line(detail)}")
    if going:
        title.append(f" · news {ago} ago", "dim")
    ppo = view.run.stages.get("ppo")
    elapsed_s = ppo.seconds(now_s if going else news_s) if ppo is not None else None
    step, total = number(view.step, "step"), view.run.total_steps
    if step is None:
        return [title, _before_ppo(view)]
    parts = [f"step {view.run.step_position}"]
    if total:
        parts.append(_bar(step / total, min(20, max(5, width - 70))))
    version = number(view.step, "version")
    parts += [f"version {version:.0f}"] if version is not None else []
    parts += [f"elapsed {seconds_text(elapsed_s)}"] if elapsed_s is not None else []
    parts += [f"ETA {seconds_text(view.run.eta_s)}"] if going else []
    return [title, Text("  ".join(parts))]


def _before_ppo(view: TopView) -> Text:
    """Which stages are done, and how far the present one is."""
    stage = view.open_stage()
    done = [name for name, one in view.run.stages.items() if one.state == "done"]
    text = f"done: {', '.join(done)}" if done else "no stage done yet"
    if stage is not None:
        loss = "" if stage.loss is None else f" loss {stage.loss:.3f}"
        text += f" · now: {' '.join(filter(None, (stage.name, stage.position, stage.note)))}{loss}"
    return Text(one_line(text))


def _bar(done: float, width: int) -> str:
    full = round(max(0.0, min(1.0, done)) * width)
    return f"[{'#' * full}{'.' * (width - full)}] {done:.0%}"


def _guard(view: TopView, room: int | None) -> list[Text]:
    if not view.verdict and not view.events:
        return [Text("guard  nothing recorded", "dim")] if view.step else []
    concerns = view.concerns()
    head = Text.assemble(("guard  ", "dim"), (f" {view.level.value.upper()} ", f"reverse {_STYLES[view.level]}"))
    told = sum(one.named for one in concerns)
    early = len(concerns) - told
    head.append(f"  rollbacks {view.rollbacks} of {view.guard.max_rollbacks}", "" if view.rollbacks else "dim")
    head.append(f" · named: {told}, past a threshold besides: {early}" if concerns else f" · {_nearest(view)}")
    shown = concerns if room is None else concerns[: max(1, room - 1)]
    lines = [head, *(_concern(one) for one in shown)]
    if len(shown) < len(concerns):
        lines[-1].append(f"   … and {len(concerns) - len(shown)} more", "dim")
    return lines


def _concern(one: Concern) -> Text:
    value = GAP if one.value is None else f"{one.value:.4g}"
    style = _STYLES[one.level] if one.named else "dim"
    line = Text.assemble("  ", (f"{one.level.value if one.named else '(' + one.level.value + ')':<7}", style),
                         (f"{one_line(one.name):<34}", style), f"{value:>9}")  # fmt: skip
    if one.limit is not None:
        pairs = (("warn", one.limit.warn), ("act", one.limit.act))
        bounds = [f"{name} {one.limit.sign} {bound:g}" for name, bound in pairs if bound is not None]
        line.append("   " + ", ".join(bounds), "dim")
    return line


def _nearest(view: TopView) -> str:
    """The signal that is nearest to its warning, of those whose threshold has a scale."""
    found: list[tuple[float, str]] = []
    for name, limit in limits(view.guard.thresholds).items():
        value = view.signals.get(name)
        if value is None or not limit.warn or (not limit.over and value <= 0):
            continue
        share = value / limit.warn if limit.over else limit.warn / value
        found.append((share, f"nearest: {name} {value:.3g} (warn {limit.sign} {limit.warn:g})"))
    return max(found)[1] if found else "all within"


def _curves(view: TopView, width: int, plain: bool) -> list[Text]:
    step = view.step
    if not step:
        return []
    target = number(step, "kl_target_nats_per_sequence")
    low, high = number(view.evaluation, "win_rate_low"), number(view.evaluation, "win_rate_high")
    rows = (
        ("reward z", "proxy_z", "{:+.2f}", ""),
        ("gold", "gold_mean", "{:+.2f}", ""),
        ("win rate", "win_rate", "{:.2f}", f" ({low:.2f}–{high:.2f})" if low is not None and high is not None else ""),
        ("KL, nats", "kl_nats_per_sequence", "{:.2f}", f" of {target:.2f}" if target is not None else ""),
        ("beta" if plain else "β", "beta", "{:.4g}", ""),
        ("entropy", "entropy_nats_per_token", "{:.3f}", ""),
        ("length", "response_tokens_mean", "{:.1f}", " tokens"),
    )
    lines = []
    for name, key, template, more in rows:
        curve = view.curves[key]
        if not curve.values:
            continue
        value = template.format(curve.values[-1]) + more
        lines.append(Text.assemble((f"{name:<{_NAME}}", "dim"), f"{value:<{_VALUE}}",
                                   (sparkline(curve, width - _NAME - _VALUE - 1, plain=plain), "blue")))  # fmt: skip
    return lines


def sparkline(curve: Curve, width: int, *, plain: bool = False) -> str:
    """The whole curve in at most `width` marks, each the mean of its stretch, between its least and its largest."""
    marks = _PLAIN_BARS if plain else _BARS
    count = min(len(curve.values), max(1, width))
    edges = [round(at * len(curve.values) / count) for at in range(count + 1)]
    means = [statistics.fmean(curve.values[start:end]) for start, end in itertools.pairwise(edges)]
    least, span = min(means), max(means) - min(means)
    if span <= 1e-12 * max(1.0, abs(least)):
        return marks[0] * count
    return "".join(marks[min(len(marks) - 1, int((mean - least) / span * len(marks)))] for mean in means)


def _machine(view: TopView) -> list[Text]:
    step = view.step
    if not step:
        return []
    seconds, idle = number(step, "step_seconds"), number(step, "idle_seconds")
    share = f"{idle / seconds:.0%}" if seconds and idle is not None else GAP
    queues = " · ".join(f"{name} {_count(step, f'depth_{name}')}" for name in ("prompts", "rollouts", "scored"))
    lost = " · ".join(f"{name} {_count(step, f'samples_{key}')}" for name, key in (
        ("stale", "stale_dropped"), ("dead", "dead"), ("rejected", "rejected"), ("abandoned", "abandoned"),
        ("dup", "duplicate")) if number(step, f"samples_{key}") is not None)  # fmt: skip
    lines = [
        _labelled("queues", f"{queues}   actors {_actors(view.run.workers)}   staleness "
                            f"{_value(step, 'staleness_mean')}"),
        _labelled("speed", f"{_value(step, 'tokens_per_second_rollout', '{:,.0f}')} tokens/s   step "
                           f"{seconds_text(seconds)}, {share} of it waiting"),
        _labelled("samples", f"trained {_count(step, 'samples_trained')} · {lost}"),
    ]  # fmt: skip
    version = step.get("rm_version")
    if version or view.refreshes:
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in view.refreshes.items())
        lines.append(_labelled("reward", f"model {one_line(str(version or GAP))}   refreshes: {outcomes or 'none'}"))
    return lines


def _events(view: TopView, room: int | None) -> list[Text]:
    """The newest last."""
    if room is not None and room <= 0:
        return []
    events = list(view.events)
    told = [event for before, event in itertools.pairwise([{}, *events]) if not says_again(event, before)]
    lines = [_event(event) for event in told]
    return lines[-(room if room is not None else 12) :]


def _event(event: Json) -> Text:
    what = str(event.get("action") if event.get("event") == "action" else event.get("event"))
    style = "bold" if event.get("event") == "action" else _STYLES.get(_level(what), "")
    to_step, factor, beta = number(event, "to_step"), number(event, "factor"), number(event, "beta")
    more = f" → step {to_step:.0f}" if to_step is not None else f" → {beta:.4g}" if beta is not None else ""
    more = more or (f" ×{factor:g}" if factor is not None else "")
    why = event.get("reason") or event.get("why")
    step = number(event, "step")
    return Text.assemble((f"step {GAP if step is None else f'{step:.0f}':<6}", "dim"), (one_line(what) + more, style),
                         f"  {one_line(why)}" if isinstance(why, str) else "")  # fmt: skip


def _level(word: str) -> Level:
    return Level(word) if word in tuple(Level) else Level.OK


# ---------------------------------------------------------------- words


def _labelled(name: str, text: str) -> Text:
    return Text.assemble((f"{name:<{_NAME}}", "dim"), text)


def _count(step: Json, key: str) -> str:
    return _value(step, key, "{:,.0f}")


def _value(step: Json, key: str, template: str = "{:.2f}") -> str:
    value = number(step, key)
    return GAP if value is None else template.format(value)


def _actors(workers: Json) -> str:
    running, wanted = number(workers, "running"), number(workers, "wanted")
    if running is None:
        return GAP
    return f"{running:.0f}" if running == wanted or wanted is None else f"{running:.0f} of {wanted:.0f}"
