"""The experiment's command line.

    python -m examples.guard_experiment.run [--quick] [--out DIR] [--only ARM …] [--seeds N …] [--table]

Run it again to go on: what is complete is left alone. Exit code 0: every run is complete and no bar is missed; 1: a run
failed, or a bar is missed; 130: stopped on request.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from examples.guard_experiment.arms import ALL, QUICK, QUICK_BASE_SECONDS, QUICK_SETTINGS, Arm
from examples.guard_experiment.bars import Bar
from examples.guard_experiment.records import read_run
from examples.guard_experiment.runs import BASE_SECONDS, INTERRUPTED, Plan, diagnose, do_runs, estimated_seconds
from examples.guard_experiment.table import FIGURE, TABLE, counted, write_table

_OUT: Final = Path("runs/guard-experiment")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    asked = _parser().parse_args(arguments)
    plan = _plan(asked)
    if asked.table:
        for arm, seed in plan.runs:
            if plan.is_complete(arm, seed):
                diagnose(plan, plan.run_dir(arm, seed))
        return _report(plan, failures=[])
    plan.out.mkdir(parents=True, exist_ok=True)
    plan.say(f"{len(plan.runs)} runs into {plan.out}, about {estimated_seconds(plan) / 60:.0f} min")
    try:
        failures = do_runs(plan, finished=lambda: _written(plan))
    except KeyboardInterrupt:
        _written(plan)
        plan.say("stopped; the same command goes on")
        return INTERRUPTED
    return _report(plan, failures=failures)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.guard_experiment.run", description="What the guard is worth, measured."
    )
    parser.add_argument("--quick", action="store_true", help="three short runs on little data")
    parser.add_argument("--out", type=Path, default=None, help=f"where to; else {_OUT}, or {_OUT}-quick")
    parser.add_argument("--only", nargs="+", choices=[arm.name for arm in ALL], metavar="ARM", help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="only these seeds")
    parser.add_argument("--table", action="store_true", help="do no runs: diagnose what is there and write the table")
    return parser


def _plan(asked: argparse.Namespace) -> Plan:
    out: Path = asked.out or (_OUT.with_name(f"{_OUT.name}-quick") if asked.quick else _OUT)
    arms: tuple[Arm, ...] = QUICK if asked.quick else ALL
    if asked.only:
        arms = tuple(arm for arm in arms if arm.name in asked.only)
    if asked.seeds:
        arms = tuple(replace(arm, seeds=tuple(seed for seed in arm.seeds if seed in asked.seeds)) for arm in arms)
    # Absolute: the runs' processes are started in the repository.
    common, base_s = (QUICK_SETTINGS, QUICK_BASE_SECONDS) if asked.quick else ((), BASE_SECONDS)
    return Plan(out=out.resolve(), arms=arms, common=common, say=_say, base_s=base_s)


def _written(plan: Plan) -> list[Bar]:
    return write_table(plan.out, [read_run(arm, seed, plan.run_dir(arm, seed)) for arm, seed in plan.runs])


def _report(plan: Plan, *, failures: Sequence[str]) -> int:
    bars = _written(plan)
    missed = [bar for bar in bars if bar.passed is False]
    _say((plan.out / TABLE).read_text(encoding="utf-8"))
    for failure in failures:
        _say(f"failed: {failure}")
    _say(f"{counted(bars)}: {plan.out / TABLE}, {FIGURE}")
    return 1 if failures or missed else 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
