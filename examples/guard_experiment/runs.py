"""Doing the runs: one `keel train` each, one after another, so that each has both cores and the times compare.

What a seed's runs share, everything up to the reward model and the answers of the policy before training, is made once,
in <out>/base/s<seed>, and copied. A run that is complete is left alone, one that was killed goes on. Layout:

    base/s<seed>/  runs/<arm>/s<seed>/  logs/  table.md  table.json  gold_against_distance.svg

Consumes: arms. Produces: run directories with outcome.json and diagnosis.json. Waits for: the process of each run.
Who unblocks it: that process, whose own time limits end it; an interrupt is passed on and waited for.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Final, Self

from cluster.files import atomic_directory, atomic_write_text
from examples.guard_experiment.arms import PRESET, Arm, run_name
from examples.guard_experiment.records import OUTCOME_FILE, lines_of, read_json, value, was_halted

_BASE_STAGES: Final = ("data", "sft", "collect", "rm", "evaluate")
_SHARED: Final = ("config.yaml", "data", "init", "sft", "rm", "eval")
_ROOT: Final = Path(__file__).parents[2]
_TRIES: Final = 2
_TICK_S: Final = 60.0
_DIAGNOSE_S: Final = 120.0
INTERRUPTED: Final = 130
"""The exit code of a run that saved and stopped when it was asked to."""
BASE_SECONDS: Final = 250.0
"""Rough times on two cores, until there are measured ones."""
START_SECONDS: Final = 30.0
EVALUATION_SECONDS: Final = 20.0
STEP_SECONDS: Final = 2.7


class RunFailedError(Exception):
    """A run ended by an error. The experiment goes on with the next one."""


@dataclass(frozen=True)
class Plan:
    """`common`: settings of all runs, their shared stages too. `say`: takes a line. `base_s`: what the shared stages of
    a seed take, roughly."""

    out: Path
    arms: tuple[Arm, ...]
    common: tuple[str, ...]
    say: Callable[[str], None]
    base_s: float = BASE_SECONDS

    @property
    def runs(self) -> list[tuple[Arm, int]]:
        """Seed by seed, so that a table of the first seed is there early."""
        seeds = sorted({seed for arm in self.arms for seed in arm.seeds})
        return [(arm, seed) for seed in seeds for arm in self.arms if seed in arm.seeds]

    def run_dir(self, arm: Arm, seed: int) -> Path:
        return self.out / "runs" / arm.name / run_name(seed)

    def base_dir(self, seed: int) -> Path:
        return self.out / "base" / run_name(seed)

    def is_complete(self, arm: Arm, seed: int) -> bool:
        return bool(read_json(self.run_dir(arm, seed) / OUTCOME_FILE).get("complete"))

    def has_base(self, seed: int) -> bool:
        return set(_BASE_STAGES) <= set(read_json(self.base_dir(seed) / "stages.json"))


def estimated_seconds(plan: Plan) -> float:
    """What is left, by the pace of the runs that are complete; steps that an unfinished one has done count as done."""
    done_steps, done_s, left_steps, left_s = 0, 0.0, 0, 0.0
    for arm, seed in plan.runs:
        fixed_s = START_SECONDS + (EVALUATION_SECONDS if arm.evaluated else 0.0)
        outcome = read_json(plan.run_dir(arm, seed) / OUTCOME_FILE)
        if outcome.get("complete"):
            done_steps, done_s = done_steps + outcome["steps"], done_s + max(0.0, outcome["seconds"] - fixed_s)
        else:
            left_steps, left_s = left_steps + max(0, arm.steps - _steps_of(plan.run_dir(arm, seed))), left_s + fixed_s
    bases = {seed for arm, seed in plan.runs if not plan.is_complete(arm, seed) and not plan.has_base(seed)}
    step_s = done_s / done_steps if done_steps else STEP_SECONDS
    return left_s + left_steps * step_s + plan.base_s * len(bases)


def do_runs(plan: Plan, *, finished: Callable[[], object]) -> list[str]:
    """All runs that are not complete. Returns what failed; `finished` is called after each run. Raises
    KeyboardInterrupt when the experiment is asked to stop; what was done is kept."""
    failures: list[str] = []
    for number, (arm, seed) in enumerate(plan.runs, start=1):
        name = f"[{number}/{len(plan.runs)}] {arm.name} {run_name(seed)}"
        if plan.is_complete(arm, seed):
            plan.say(f"{name}: there already")
            continue
        plan.say(f"{name}: {arm.title}; about {estimated_seconds(plan) / 60:.0f} min left")
        try:
            _do_base(plan, seed)
            _do_run(plan, arm, seed, name=name)
        except RunFailedError as error:
            failures.append(f"{arm.name} {run_name(seed)}: {error}")
            plan.say(f"{name}: {error}")
        finished()
    return failures


def diagnose(plan: Plan, run_dir: Path) -> None:
    """`keel diagnose`, which writes diagnosis.json there. A failure is said, and leaves the run without a diagnosis."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "keel.cli", "diagnose", str(run_dir)],
            cwd=_ROOT, capture_output=True, text=True, check=False, timeout=_DIAGNOSE_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        plan.say(f"keel diagnose {run_dir}: not done in {_DIAGNOSE_S:g} s")
        return
    if done.returncode != 0:
        plan.say(f"keel diagnose {run_dir}: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")


def _do_base(plan: Plan, seed: int) -> None:
    if plan.has_base(seed):
        return
    plan.say(f"  what the runs of seed {seed} share: data, fine-tuning, preferences, reward model")
    settings = (f"name={run_name(seed)}", f"seed={seed}", f"runs_dir={plan.out / 'base'}", *plan.common)
    log = plan.out / "logs" / f"base-{run_name(seed)}.log"
    code = _keel_train(_BASE_STAGES, settings, log=log, tick=lambda: None)
    if code != 0 or not plan.has_base(seed):
        raise RunFailedError(f"its offline stages ended with exit code {code}; see {log}")


def _do_run(plan: Plan, arm: Arm, seed: int, *, name: str) -> None:
    run_dir, log = plan.run_dir(arm, seed), plan.out / "logs" / f"{arm.name}-{run_name(seed)}.log"
    settings = (*plan.common, *arm.settings(seed=seed, runs_dir=run_dir.parent))
    code = 0
    for _ in range(_TRIES):
        if run_dir.exists() and not arm.resumable:
            shutil.rmtree(run_dir)
        if not run_dir.exists():
            copy_base(plan.base_dir(seed), run_dir)
        earlier_s = float(read_json(run_dir / OUTCOME_FILE).get("seconds", 0.0))
        began_s = time.monotonic()
        code = INTERRUPTED
        try:
            code = _keel_train(
                arm.stages, settings, log=log, tick=lambda: plan.say(f"{name}: {_standing(run_dir, arm)}")
            )
        finally:
            complete = _write_outcome(run_dir, arm, code=code, seconds=earlier_s + time.monotonic() - began_s)
        if complete:
            plan.say(f"{name}: {_standing(run_dir, arm)}; done in {(time.monotonic() - began_s) / 60:.1f} min")
            diagnose(plan, run_dir)
            return
    diagnose(plan, run_dir)
    raise RunFailedError(f"ended with exit code {code}; see {log}")


def copy_base(base: Path, run_dir: Path) -> None:
    """A run that stands where its offline stages have just been done."""
    with atomic_directory(run_dir) as directory:
        for name in _SHARED:
            source = base / name
            if source.is_dir():
                shutil.copytree(source, directory / name)
            elif source.exists():
                shutil.copy2(source, directory / name)
        done = {stage: s for stage, s in read_json(base / "stages.json").items() if stage != "evaluate"}
        atomic_write_text(directory / "stages.json", json.dumps(done))


def _write_outcome(run_dir: Path, arm: Arm, *, code: int, seconds: float) -> bool:
    """Whether the run is complete: all its stages are done, or the guard has halted it."""
    halted = was_halted(lines_of(run_dir / "guard.jsonl"))
    complete = halted or (code == 0 and set(arm.stages) <= set(read_json(run_dir / "stages.json")))
    outcome = {"complete": complete, "exit_code": code, "halted": halted, "seconds": round(seconds, 1)}
    atomic_write_text(run_dir / OUTCOME_FILE, json.dumps(outcome | {"steps": _steps_of(run_dir)}))
    return complete


def _steps_of(run_dir: Path) -> int:
    steps = lines_of(run_dir / "metrics.jsonl")
    return int(steps[-1]["step"]) if steps else 0


def _standing(run_dir: Path, arm: Arm) -> str:
    """Where a run stands, for people."""
    steps = lines_of(run_dir / "metrics.jsonl")
    if not steps:
        return "starting"
    last = steps[-1]
    shown = [f"step {last['step']}/{arm.steps}"]
    if (gold := value(last, "gold_mean")) is not None:
        shown.append(f"gold {gold:.2f}")
    if (kl := value(last, "kl_nats_per_sequence")) is not None:
        shown.append(f"KL {kl:.1f}")
    acted = [str(event["action"]) for event in lines_of(run_dir / "guard.jsonl") if event.get("action")]
    return ", ".join(shown + ([f"guard: {', '.join(dict.fromkeys(acted))}"] if acted else []))


def _keel_train(stages: Sequence[str], settings: Sequence[str], *, log: Path, tick: Callable[[], None]) -> int:
    """The exit code. Raises KeyboardInterrupt after the run has saved and ended, when that was asked for."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "keel.cli", "train", PRESET, "--resume", "--stages", ",".join(stages)]
    for setting in settings:
        command += ["--set", setting]
    with log.open("a") as output, _HandedOn() as interrupts:
        process = subprocess.Popen(command, cwd=_ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        interrupts.go_to(process)
        code = _waited_for(process, tick=tick)
    if code in (INTERRUPTED, -signal.SIGINT, -signal.SIGTERM):
        raise KeyboardInterrupt
    return code


def _waited_for(process: subprocess.Popen[bytes], *, tick: Callable[[], None]) -> int:
    """The exit code. Whatever goes wrong here meanwhile, no run is left behind that nobody waits for."""
    try:
        while True:
            try:
                return process.wait(timeout=_TICK_S)
            except subprocess.TimeoutExpired:
                tick()
    except BaseException:
        process.terminate()
        process.wait()
        raise


class _HandedOn:
    """SIGINT and SIGTERM go to the run's process instead of ending this one. The run has a session of its own, so that
    one Ctrl-C reaches it once: from here. One that comes before there is a process waits for it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def go_to(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        for number in self._early:
            process.send_signal(number)

    def _hand_on(self, number: int, _frame: FrameType | None) -> None:
        if self._process is None:
            self._early.append(number)
        else:
            self._process.send_signal(number)
