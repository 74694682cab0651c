"""Patterns of how a run ended, when it was not by finishing."""

from __future__ import annotations

from typing import Final

from cluster.files import Json
from keel.diagnose import advice
from keel.diagnose.evidence import known, ramp
from keel.diagnose.match import Kind, Match, Recommendation
from keel.diagnose.patterns.answers import present
from keel.diagnose.record import RunRecord
from keel.display import number

_STALLS: Final = ("StallError", "DeadlineError")
_BY_HAND: Final = ("KeyboardInterrupt", "InterruptedRun")


def finished(record: RunRecord) -> bool:
    """All that was asked for is done: there is a summary, or every stage that began has ended."""
    staged = [line for line in record.progress if line.get("event") in ("start", "end", "skip") and line.get("stage")]
    return bool(record.summary) or (bool(staged) and open_stage(record) is None)


def open_stage(record: RunRecord) -> str | None:
    """The stage that began and did not end."""
    begun: str | None = None
    for line in record.progress:
        stage, event = line.get("stage"), line.get("event")
        if isinstance(stage, str) and event == "start":
            begun = stage
        elif event in ("end", "skip") and stage == begun:
            begun = None
    return begun


def last_step(record: RunRecord) -> int | None:
    return int(record.steps[-1]) if len(record.steps) else None


def halt_of(record: RunRecord) -> Json | None:
    """The guard's own end of the run, unless steps were done after it: a run may go on with other settings."""
    halts = [line for line in record.guard_events if line.get("event") == "action" and line.get("action") == "halt"]
    if not halts:
        return None
    at_step, last = number(halts[-1], "step"), last_step(record)
    return None if at_step is not None and last is not None and last > at_step else halts[-1]


def _ended(record: RunRecord) -> bool:
    """Stopped before its end, and not by the guard."""
    return not record.alive and not finished(record) and (bool(record.progress) or len(record.steps) > 0)


def _where(record: RunRecord) -> str:
    stage, step = open_stage(record), last_step(record)
    at = f" at step {step}" if step is not None and stage in (None, "ppo") else ""
    return f"in stage {stage}{at}" if stage else f"after stage work was done{at}"


class OutOfMemory:
    def match(self, record: RunRecord) -> Match | None:
        error = record.error
        if not _ended(record) or error is None or not error.out_of_memory:
            return None
        budget = int(record.setting_number("learner.token_budget", 8192))
        requests = int(record.setting_number("rollout.max_concurrent_requests", 64))
        return Match(
            "out_of_memory",
            "Out of memory",
            Kind.END,
            0.95,
            last_step(record),
            (f"the run ended {_where(record)}; {error.file} says: {error.what}",),
            present(
                Recommendation(
                    f"Smaller micro-batches in the learner and the reward workers: {budget // 2} tokens",
                    "More forward passes, each less efficient.",
                    (f"learner.token_budget={budget // 2}", f"reward.token_budget={budget // 2}"),
                ),
                Recommendation(
                    "Recompute activations in the backward pass",
                    "About a third more work in each update.",
                    ("learner.gradient_checkpointing=true",),
                ),
                Recommendation(
                    f"Fewer answers at once in each engine: {max(1, requests // 2)}",
                    "Slower generation.",
                    (f"rollout.max_concurrent_requests={max(1, requests // 2)}",),
                ),
            ),
        )


class Stalled:
    def match(self, record: RunRecord) -> Match | None:
        error = record.error
        if not _ended(record) or error is None or error.kind not in _STALLS:
            return None
        limit = record.setting_number("learner.stall_timeout_s", 300.0)
        deadline = record.setting_number("learner.task_deadline_s", 120.0)
        return Match(
            "stalled",
            "Stalled: no scored rollout came back",
            Kind.END,
            0.9,
            last_step(record),
            (f"the run ended {_where(record)}; {error.file} says: {error.kind}: {error.what}",),
            present(
                Recommendation(
                    f"Wait longer: {2 * limit:g} s",
                    "A run that is truly stuck is noticed later.",
                    (f"learner.stall_timeout_s={2 * limit:g}", f"learner.task_deadline_s={max(deadline, limit / 2):g}"),
                ),
                Recommendation(
                    "Bound each generation and each scoring, so that one stuck request is handed out again",
                    "Long answers that are under way are lost.",
                    ("rollout.generate_timeout_s=60", "reward.score_timeout_s=30"),
                ),
            ),
        )


class Crashed:
    """Also a run that somebody stopped: without an error in its logs the two cannot be told apart."""

    def match(self, record: RunRecord) -> Match | None:
        error = record.error
        if not _ended(record) or halt_of(record) is not None:
            return None
        if error is not None and (error.out_of_memory or error.kind in _STALLS):
            return None
        told = f"; {error.file} says last: {error.kind}: {error.what}" if error is not None else ""
        by_hand = error is None or error.kind in _BY_HAND
        every = max(1, int(record.setting_number("checkpoint.every_steps", 10)) // 2)
        restarts = 2 * int(record.setting_number("learner.max_restarts", 3)) + 2
        return Match(
            "stopped_early" if by_hand else "crashed",
            "Stopped before its end" if by_hand else "Crashed",
            Kind.END,
            0.6 if by_hand else 0.85,
            last_step(record),
            (f"the run ended {_where(record)} without a summary, and no process owns it{told}",),
            present(
                Recommendation(
                    f"Go on with --resume, and save a checkpoint every {every} steps",
                    "More time and disk for checkpoints.",
                    (f"checkpoint.every_steps={every}",),
                ),
                Recommendation(
                    f"Allow {restarts} restarts of the learner",
                    "A fault that always comes back is met more often before the run ends.",
                    (f"learner.max_restarts={restarts}",),
                ),
            ),
        )


class HaltedByGuard:
    def match(self, record: RunRecord) -> Match | None:
        halt = halt_of(record)
        if halt is None:
            return None
        backs = sum(1 for line in record.guard_events if line.get("action") == "roll_back")
        step = halt.get("step")
        reason = str(halt.get("reason") or halt.get("why") or "no reason recorded")
        more = int(record.setting_number("guard.max_rollbacks", 3)) + 2
        return Match(
            "halted_by_guard",
            "Halted by the guard",
            Kind.END,
            0.9,
            int(step) if isinstance(step, int | float) else last_step(record),
            (f"the guard ended the run after {backs} rollback{'' if backs == 1 else 's'}: {reason}",),
            present(
                advice.firmer_guard(record),
                Recommendation(
                    f"Allow {more} rollbacks",
                    "Time spent on a run that comes back to the same place; only with another change.",
                    (f"guard.max_rollbacks={more}",),
                ),
            ),
        )


class DeadLetters:
    """Tasks that failed at every try."""

    def match(self, record: RunRecord) -> Match | None:
        dead, issued = known(record.values("samples_dead")), known(record.values("samples_issued"))
        if not len(dead) or dead[-1] <= 0:
            return None
        share = float(dead[-1] / issued[-1]) if len(issued) and issued[-1] > 0 else 1.0
        tries = int(record.setting_number("reward.max_deliveries", 3)) + 2
        at = int((record.values("samples_dead") > 0).argmax())
        return Match(
            "dead_letters",
            "Dead letters: answers that could not be scored",
            Kind.END,
            0.3 + 0.6 * ramp(share, 0.0, 0.1),
            int(record.steps[at]),
            (f"{dead[-1]:.0f} of {issued[-1] if len(issued) else float('nan'):.0f} tasks were given up ({share:.1%})",),
            present(
                Recommendation(
                    f"Try each {tries} times",
                    "A task that always fails takes longer to be given up.",
                    (f"reward.max_deliveries={tries}",),
                ),
                Recommendation(
                    "Allow scoring 120 s",
                    "A worker that hangs is noticed later.",
                    ("reward.score_timeout_s=120",),
                ),
                advice.without_other_sources(record),
            ),
        )
