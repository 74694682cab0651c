"""From a run's record to its diagnosis: which patterns match and in what order, how one thing led to another, what the
guard did and whether it helped, and what to change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from cluster.files import Json
from keel.diagnose.advice import half_the_learning_rate, hold_by_adaptive_kl, merged
from keel.diagnose.attribution import HACKS, HINTED, paid_for
from keel.diagnose.evidence import baseline, crossing, departure, harm, known, objective, start_and_end, worst_lasting
from keel.diagnose.match import Kind, Match, Recommendation
from keel.diagnose.patterns import PATTERNS
from keel.diagnose.patterns.control import outweighed
from keel.diagnose.patterns.ends import finished, halt_of, last_step, open_stage
from keel.diagnose.record import RunRecord
from keel.display import number

FOUND: Final = 0.5
_ROOT: Final = ("constant_reward", "reward_scale_jump")
"""What is measured directly, and what others follow from: with a constant reward the critic has nothing to predict."""
_COURSE: Final = (("gold_mean", "gold"), ("proxy_z", "reward, z"), ("kl_nats_per_sequence", "KL, nats per answer"))
_ORDER: Final = {Kind.END: 0, Kind.CAUSE: 1, Kind.MACHINERY: 2, Kind.SYMPTOM: 3}


@dataclass(frozen=True)
class Finding:
    """Something that happened at a step."""

    step: int
    text: str


@dataclass(frozen=True)
class GuardAction:
    """`helped`: None where there are too few steps after it to say."""

    step: int
    action: str
    detail: str
    helped: bool | None
    effect: str


@dataclass(frozen=True)
class Diagnosis:
    """`matches`: found patterns, the best first; never empty. `weaker`: under the threshold, for the record."""

    run: str
    state: str
    headline: str
    matches: tuple[Match, ...]
    weaker: tuple[Match, ...]
    first_sign: Finding | None
    story: tuple[Finding, ...]
    numbers: tuple[str, ...]
    guard: tuple[GuardAction, ...]
    recommendations: tuple[tuple[Recommendation, tuple[str, ...]], ...]
    gaps: tuple[str, ...]

    @property
    def best(self) -> Match:
        return self.matches[0]


def diagnose_record(record: RunRecord) -> Diagnosis:
    every = [match for pattern in PATTERNS if (match := pattern.match(record)) is not None]
    every = _explained(every, record)
    every = _alarmed(every, record)
    found = ranked([match for match in every if match.strength >= FOUND], record)
    weaker = sorted((match for match in every if match.strength < FOUND), key=lambda match: -match.strength)
    matches = found or [_healthy(record, weaker)]
    troubled = [match for match in matches if match.name != "healthy"]
    first = _first_sign(troubled)
    chosen = merged(troubled, record)
    return Diagnosis(
        run=record.path.name,
        state=state_of(record),
        headline=_headline(matches, record),
        matches=tuple(matches),
        weaker=tuple(weaker),
        first_sign=first,
        story=tuple(_story(troubled, record)),
        numbers=tuple(_numbers(record)),
        guard=tuple(guard_actions(record)),
        recommendations=tuple((one, tuple(names)) for one, names in chosen),
        gaps=tuple(record.gaps),
    )


# ---------------------------------------------------------------- which comes first


def ranked(matches: Sequence[Match], record: RunRecord) -> list[Match]:
    """The best first. What the run died of, other than by somebody's hand or the guard's, comes first; then causes,
    machinery, symptoms that no cause explains. β = 0 comes before what the policy found when nothing held it."""
    found = objective(record)
    free = found is not None and found.free

    def place(match: Match) -> tuple[int, float]:
        if match.kind is Kind.END and match.name in ("stopped_early", "halted_by_guard", "dead_letters"):
            return 4, -match.strength
        if match.name in _ROOT and match.strength >= 0.7:
            return _ORDER[Kind.CAUSE], -match.strength - 2
        if match.name == "beta_too_low" and free:
            return _ORDER[Kind.CAUSE], -match.strength - 1
        return _ORDER[match.kind], -match.strength

    return sorted(matches, key=place)


def _explained(matches: Sequence[Match], record: RunRecord) -> list[Match]:
    """Weigh down what another match explains: values of a constant reward, and of several things
    that answers are full of, those that the reward does not go with."""
    by_name = {match.name: match for match in matches}
    weight = dict.fromkeys(by_name, 1.0)
    constant = by_name.get("constant_reward")
    if constant is not None and constant.strength >= FOUND:
        weight |= dict.fromkeys(("critic_failure", "reward_scale_jump", "rm_drift", "length_bias"), 0.5)
    jump = by_name.get("reward_scale_jump")
    if jump is not None and jump.strength >= 0.8:
        weight |= dict.fromkeys(("beta_too_low", "rm_drift", "critic_failure"), 0.7)
    strengths = {match.name: match.strength * weight[match.name] for match in matches}
    hacks = [by_name[name] for name in HACKS if strengths.get(name, 0.0) >= HINTED]
    leading = paid_for(hacks, record) if len(hacks) > 1 else None
    if leading is not None:
        # What the others show is its doing too.
        strengths[leading] = max(strengths[match.name] * (0.9 if match.name != leading else 1.0) for match in hacks)
        strengths |= {match.name: 0.7 * strengths[match.name] for match in hacks if match.name != leading}
    return [replace(match, strength=strengths[match.name]) for match in matches]


def _alarmed(matches: list[Match], record: RunRecord) -> list[Match]:
    """Where the guard acted, something was wrong: what fits best counts as found, and a run without any such match is
    said to be unexplained."""
    faults = [match for match in matches if match.kind is not Kind.END]
    if not record.acted() or any(match.strength >= FOUND for match in faults):
        return matches
    best = max(faults, key=lambda match: match.strength, default=None)
    if best is not None and best.strength >= HINTED:
        return [replace(match, strength=FOUND) if match is best else match for match in matches]
    events = [line for line in record.guard_events if line.get("event") == "act"]
    step = number(events[0], "step")
    why = "; ".join(dict.fromkeys(str(line.get("why") or "no reason recorded") for line in events[:3]))
    alarm = Match(
        "unexplained_alarm",
        "The guard acted, and no known pattern says why",
        Kind.SYMPTOM,
        FOUND,
        None if step is None else int(step),
        (f"the guard: {why}",),
        (hold_by_adaptive_kl(record), half_the_learning_rate(record)),
    )
    return [*matches, alarm]


def _healthy(record: RunRecord, weaker: Sequence[Match]) -> Match:
    """No pattern was found."""
    sure = 1.0 - max((match.strength for match in weaker), default=0.0)
    enough = len(record.steps) >= 10
    evidence = [] if enough else [f"only {len(record.steps)} PPO steps are recorded: too few to say much"]
    for name, label in (
        ("gold_mean", "gold"),
        ("proxy_z", "reward, z"),
        ("kl_nats_per_sequence", "KL, nats per answer"),
    ):
        start, end = start_and_end(record.values(name))
        if not np.isnan(end):
            evidence.append(f"{label}: {start:+.2f} → {end:+.2f}")
    return Match(
        "healthy", "Healthy: no known pattern", Kind.END, sure if enough else 0.5 * sure, None, tuple(evidence)
    )


# ---------------------------------------------------------------- in words


def state_of(record: RunRecord) -> str:
    if record.alive and open_stage(record) != "report":  # While it writes its report, all else is over.
        return "running"
    if halt_of(record) is not None:
        return "halted by the guard"
    if finished(record):
        return "finished"
    return "ended early" if record.progress or len(record.steps) else "not begun"


def _headline(matches: Sequence[Match], record: RunRecord) -> str:
    best, step = matches[0], last_step(record)
    where = f"at step {step}" if step is not None else f"in stage {open_stage(record) or 'none'}"
    text = f"{best.title} ({best.strength:.0%}). The run is {state_of(record)}, {where}."
    others = [match.title.partition(":")[0].lower() for match in matches[1:3]]
    return text + (f" Also: {', '.join(others)}." if others else "")


def _first_sign(matches: Sequence[Match]) -> Finding | None:
    dated = [match for match in matches if match.first_step is not None and match.kind is not Kind.END]
    if not dated:
        return None
    first = min(dated, key=lambda match: match.first_step or 0)
    return Finding(first.first_step or 0, first.evidence[0] if first.evidence else first.title)


def _story(matches: Sequence[Match], record: RunRecord) -> list[Finding]:
    """Everything that can be dated, in order: how the series left their baselines, what the patterns say, the guard."""
    found = [
        Finding(match.first_step, f"{match.title.partition(':')[0]}: {match.evidence[0]}")
        for match in matches
        if match.first_step is not None and match.evidence
    ]
    if matches:
        found += _departures(record)
    hurt = harm(record)
    told = "; ".join(finding.text for finding in found)
    fresh = [sentence for sentence in hurt.sentences if f": {sentence}" not in told]
    if hurt.first_step is not None and fresh:
        found.append(Finding(hurt.first_step, "; ".join(fresh)))
    for line in record.guard_events:
        step = number(line, "step")
        if step is None:
            continue
        if line.get("event") in ("warn", "act"):
            why = line.get("why") or ", ".join(line.get("signals") or {})
            found.append(Finding(int(step), f"the guard says {line['event']}: {why}"))
        elif line.get("event") == "action":
            found.append(Finding(int(step), f"the guard's action: {line.get('action')} {_detail(line)}".rstrip()))
    return _without_repeats(sorted(found, key=lambda one: one.step))


_WATCHED: Final = (
    ("reward_mean", True, "mean reward rises off its baseline"),
    ("kl_nats_per_sequence", True, "KL to the reference rises off its baseline"),
    ("response_tokens_mean", True, "answers grow longer"),
    ("entropy_nats_per_token", False, "entropy falls off its baseline"),
    ("gold_mean", False, "gold falls below its baseline"),
)


def _departures(record: RunRecord) -> list[Finding]:
    found = []
    for name, upward, text in _WATCHED:
        step = departure(record, name, upward=upward)
        values = record.values(name)
        middle, spread = baseline(values)
        gone = abs(worst_lasting(values, upward=upward) - middle)
        if step is not None and gone > max(6 * spread, 0.1 * abs(middle)):
            start, end = start_and_end(values)
            found.append(Finding(step, f"{text} ({start:.2f} at the start, {end:.2f} at the end)"))
    return found


def _without_repeats(findings: Sequence[Finding]) -> list[Finding]:
    seen: set[str] = set()
    kept = []
    for finding in findings:
        if finding.text not in seen:
            seen.add(finding.text)
            kept.append(finding)
    return kept


def _numbers(record: RunRecord) -> list[str]:
    """The decomposition of the objective, and every signal past its threshold."""
    found = objective(record)
    sentences = [outweighed(found)] if found is not None else []
    for name in type(record.thresholds).model_fields:
        one = crossing(record, name)
        if one is not None:
            still = "still" if one.still else "no longer"
            sentences.append(
                f"{name}: {one.start:.3g} → {one.last:.3g}, worst {one.worst:.3g} (threshold {one.threshold:g}, passed "
                f"at step {one.first_step}, {still} past it)"
            )
    return sentences


# ---------------------------------------------------------------- the guard


def guard_actions(record: RunRecord) -> list[GuardAction]:
    """Each of the guard's actions but alerts, and whether the signals that called for it came back over the ten steps
    after it."""
    concerned: dict[str, float] = {}
    found = []
    for line in record.guard_events:
        signals = line.get("signals")
        if line.get("event") == "act" and isinstance(signals, dict):
            concerned = {str(name): value for name in signals if (value := number(signals, name)) is not None}
        if line.get("event") != "action" or line.get("action") == "alert":
            continue
        step = int(number(line, "step") or 0)
        own = signals if isinstance(signals, dict) and signals else concerned
        values = {str(name): value for name in own if (value := number(own, name)) is not None}
        helped, effect = _effect(record, step, values)
        found.append(GuardAction(step, str(line.get("action")), _detail(line), helped, effect))
    return found


def _effect(record: RunRecord, step: int, before: dict[str, float]) -> tuple[bool | None, str]:
    after = (record.steps > step) & (record.steps <= step + 10)
    back, there, texts = 0, 0, []
    for name, value in before.items():
        later = known(record.values(name)[after])
        limits = getattr(record.thresholds, name, None)
        if len(later) < 2 or limits is None:
            continue
        warn = limits.warn if limits.warn is not None else limits.act
        end = float(np.median(later[-3:]))
        there += 1
        if warn is not None and (end < warn if value >= warn else end > warn):
            back += 1
        texts.append(f"{name} {value:.3g} → {end:.3g}")
    if not there:
        return None, "too few steps after it to say"
    return back * 2 >= there, ", ".join(texts)


def _detail(line: Json) -> str:
    names = ("factor", "beta", "to_step", "rm_version", "until_version", "reason")
    return ", ".join(f"{name} {line[name]}" for name in names if line.get(name) is not None)
