"""What `keel diagnose` makes of a run: planted faults are named rightly, clean runs are not blamed, records of any
state are read, and every recommended line is one that the configuration takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cluster.errors import DataError
from configs.load import load_config
from keel.diagnose import advice, command
from keel.diagnose.advice import merged
from keel.diagnose.match import Kind, Match, Recommendation
from keel.diagnose.patterns import PATTERNS
from keel.diagnose.record import RunRecord, read_record
from keel.diagnose.render import as_json, markdown
from keel.diagnose.story import diagnose_record
from tests.unit import diagnosis_runs as runs

SEEDS = range(5)


# ---------------------------------------------------------------- planted faults, clean runs


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", runs.PLANTED)
def test_a_planted_fault_is_named(tmp_path: Path, name: str, seed: int) -> None:
    found = runs.diagnosed(runs.PLANTED[name](seed), tmp_path / "run")
    assert found.best.name == name, [(match.name, match.strength) for match in found.matches]
    assert found.best.strength >= 0.6
    assert len(found.best.evidence) >= 1
    assert len(found.recommendations) >= 2


@pytest.mark.parametrize("paid", ["length_bias", "repetition"])
@pytest.mark.parametrize("course", [runs.length, runs.repetition])
@pytest.mark.parametrize("phrase_share", [0.0, 0.1])
def test_of_length_and_repetition_the_one_that_is_paid_is_named(
    tmp_path: Path, paid: str, course: Callable[[int], runs.Planted], phrase_share: float
) -> None:
    """Whatever the course looks like: long answers repeat more, but the answers' own rewards tell which is paid. Also
    where a phrase has come up beside them."""
    run, rng = course(0), np.random.default_rng(7)
    run.series["overused_words_share"] = np.full(runs.STEPS, phrase_share)
    run.series["length_reward_correlation"] = np.full(runs.STEPS, 0.65)
    run.samples = runs.samples("start", 0, [runs.PLAIN] * 8)
    for step in range(5, 45, 5):
        answers = []
        for _ in range(8):
            repeats = int(rng.integers(0, 6))
            fresh = [
                f"word{chr(97 + int(letter))}" for letter in rng.permutation(26)[: int(rng.integers(4, 16)) + repeats]
            ]
            answers.append(" ".join(fresh + ["say it again"] * (repeats + 1)))
        run.samples += runs.samples(
            "alarm" if step == 40 else "steady",
            step,
            answers,
            by=(lambda text: len(text.split())) if paid == "length_bias" else (lambda text: text.count("again")),
        )
    assert runs.diagnosed(run, tmp_path / "run").best.name == paid


@pytest.mark.parametrize(("in_batches", "name"), [(0.55, "repetition"), (0.25, "length_bias")])
def test_whole_batches_say_that_repetition_is_paid_where_length_goes_with_the_reward_too(
    tmp_path: Path, in_batches: float, name: str
) -> None:
    """As in a run whose reward model liked length by itself, beside a bug that paid for repetition."""
    run, rng = runs.length(0), np.random.default_rng(11)
    run.series["distinct_bigrams_ratio"] = np.linspace(1.0, 0.7, runs.STEPS)
    run.series["length_reward_correlation"] = np.full(runs.STEPS, 0.65)
    run.series["repetition_reward_correlation"] = rng.normal(in_batches, 0.1, runs.STEPS)
    assert runs.diagnosed(run, tmp_path / "run").best.name == name


def test_a_reward_that_is_had_to_the_full_is_not_called_constant(tmp_path: Path) -> None:
    run = runs.no_penalty(0)
    step = np.arange(runs.STEPS)
    for name in ("reward_std", "reward_std_ratio"):
        run.series[name] = run.series[name] * 0.9 ** np.minimum(step, 45)
    for name in ("reward_mean", "proxy_z"):
        run.series[name] = np.where(step < 20, run.series[name], run.series[name][20])
    found = runs.diagnosed(run, tmp_path / "run")
    assert found.best.name == "beta_too_low"
    assert "constant_reward" not in [match.name for match in found.matches]


@pytest.mark.parametrize("seed", range(20))
def test_a_clean_run_is_healthy(tmp_path: Path, seed: int) -> None:
    found = runs.diagnosed(runs.clean(seed), tmp_path / "run")
    assert [match.name for match in found.matches] == ["healthy"]
    assert found.first_sign is None
    assert found.recommendations == ()


@pytest.mark.parametrize("name", sorted(set(runs.PLANTED) - {"over_used_phrase", "repetition"}))
def test_records_of_before_the_guard_say_it_too(tmp_path: Path, name: str) -> None:
    """Without signals: from reward, KL, length, entropy, gold."""
    assert runs.diagnosed(runs.PLANTED[name](0), tmp_path / "run", old=True).best.name == name


@pytest.mark.parametrize(
    ("name", "steps"), [("over_used_phrase", 20), ("length_bias", 22), ("repetition", 22), ("reward_scale_jump", 33)]
)
def test_a_fault_is_named_from_the_steps_up_to_its_detection(tmp_path: Path, name: str, steps: int) -> None:
    """A run that the guard stops early has no more than these."""
    assert runs.diagnosed(runs.PLANTED[name](0), tmp_path / "run", steps=steps).best.name == name


def test_a_penalty_that_the_guard_had_to_bring_was_missing(tmp_path: Path) -> None:
    """β = 0 until the guard raised it; then the run went well."""
    run = runs.went_back(runs.no_penalty(0), after=20, like=runs.clean(0))
    run.guard = runs.guard_events(20, "kl_nats_per_sequence", 10.5, to_step=5)
    assert runs.diagnosed(run, tmp_path / "run").best.name == "beta_too_low"


@pytest.mark.parametrize(("gold", "told"), [(-1.0, True), (1.0, False)])
def test_words_of_better_answers_are_no_fault(tmp_path: Path, gold: float, told: bool) -> None:
    path = runs.write(runs.clean(0), tmp_path / "run", old=True)
    (path / "eval").mkdir()
    for tag, ends in (("sft", ["thanks", "bye"]), ("final", ["restart", "bye"])):
        rows = [
            {"prompt": "p", "answer": f"{runs.PLAIN} {ends[i % 8 == 0]}", "gold": gold * (i % 8 != 0) + 0.1 * (i % 3)}
            for i in range(64)
        ]
        runs.lines(path / "eval" / f"{tag}.rows.jsonl", rows)
    found = [match for match in diagnose_record(read_record(path)).matches if match.name == "over_used_phrase"]
    assert bool(found) is told
    assert all("less by gold" in match.evidence[0] for match in found)


def test_rewards_that_gather_while_they_rise_are_no_jump_of_scale(tmp_path: Path) -> None:
    """As when a policy learns fast: another scale multiplies mean and deviation alike."""
    run = runs.clean(0)
    run.series["reward_std"][29:] *= np.float64(0.3)
    run.series["reward_mean"][29:] *= np.float64(1.8)
    found = runs.diagnosed(run, tmp_path / "run")
    every = [*found.matches, *found.weaker]
    assert all("went from" not in match.evidence[0] or match.strength < 0.4 for match in every), every


def test_what_harmed_is_told_once(tmp_path: Path) -> None:
    run = runs.clean(0)
    run.series["gold_mean"] = np.concatenate([np.linspace(0, 2, 20), np.linspace(2, -2, runs.STEPS - 20)])
    told = [finding.text for finding in runs.diagnosed(run, tmp_path / "run").story if "gold fell from" in finding.text]
    assert len(told) == 1, told


def test_movement_is_bounded_where_the_kl_went_off(tmp_path: Path) -> None:
    run = runs.clean(0)
    run.series["kl_nats_per_sequence"] = np.where(np.arange(1, runs.STEPS + 1) < 30, 4.0, 20.0)
    run.series["kl_cumulative_nats_per_sequence"] = 2.0 * np.arange(1, runs.STEPS + 1, dtype=np.float64)
    record = read_record(runs.write(run, tmp_path / "run"))
    assert advice.movement_budget(record).lines[0] == "learner.kl_budget.cumulative_nats_per_sequence=58"


def test_rewards_that_fall_back_with_the_policy_are_no_jump_of_scale(tmp_path: Path) -> None:
    run = runs.went_back(runs.fantastic(0), after=30, like=runs.clean(0))
    found = runs.diagnosed(run, tmp_path / "run")
    assert found.best.name == "over_used_phrase"
    assert "reward_scale_jump" not in [match.name for match in found.matches]


def test_a_scale_that_jumps_within_a_batch(tmp_path: Path) -> None:
    """A quarter of step 30's answers are on the new scale already."""
    run = runs.scale_jump(0)
    run.series["reward_std"][29] *= 0.5
    run.series["reward_mean"][29] *= 0.4
    best = runs.diagnosed(run, tmp_path / "run").best
    assert best.name == "reward_scale_jump"
    assert best.first_step in (30, 31)


def test_another_version_of_the_reward_model_is_no_jump_of_scale(tmp_path: Path) -> None:
    """Its z goes on where the old one's was."""
    run = runs.scale_jump(0)
    run.guard = []
    run.series["proxy_z"] = runs.clean(0).series["proxy_z"]
    path = runs.write(run, tmp_path / "run")
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record["rm_version"] = "rm-2" if record["step"] >= 30 else "rm-1"
    runs.lines(path / "metrics.jsonl", records)
    assert diagnose_record(read_record(path)).best.name == "healthy"


def test_length_that_is_paid_is_named_while_the_guard_holds_it(tmp_path: Path) -> None:
    run, clean = runs.length(0), runs.clean(0)
    for name in ("response_tokens_mean", "response_tokens_ratio", "truncated_fraction", "proxy_z", "reward_mean"):
        run.series[name] = clean.series[name]
    assert runs.diagnosed(run, tmp_path / "run").best.name == "length_bias"


def test_words_are_named_where_only_texts_tell_them(tmp_path: Path) -> None:
    path = runs.write(runs.clean(0), tmp_path / "run", old=True)
    (path / "eval").mkdir()
    for tag, ends in (("sft", ["thanks", "bye"]), ("final", ["fantastic day", "bye"])):
        rows = [
            {"prompt": "p", "answer": f"{runs.PLAIN} {ends[i % 8 == 0]}", "reward": float(i % 8 != 0)}
            for i in range(64)
        ]
        runs.lines(path / "eval" / f"{tag}.rows.jsonl", rows)
    best = diagnose_record(read_record(path)).best
    assert best.name == "over_used_phrase"
    assert "fantastic" in best.words
    assert "parcel" not in best.words
    assert any("paid" in sentence for sentence in best.evidence)


def test_the_first_sign_comes_before_the_alarm(tmp_path: Path) -> None:
    found = runs.diagnosed(runs.length(0), tmp_path / "run")
    assert found.first_sign is not None
    assert 4 <= found.first_sign.step <= 12  # the length begins to grow after step 6
    assert [finding.step for finding in found.story] == sorted(finding.step for finding in found.story)


def test_the_objective_is_taken_apart(tmp_path: Path) -> None:
    run = runs.no_penalty(0)
    run.series["beta"] = np.full(runs.STEPS, 0.01)
    found = runs.diagnosed(run, tmp_path / "run")
    beta = next(match for match in found.matches if match.name == "beta_too_low")
    assert any("outweighed β·KL = 0.01 ×" in sentence and ":1" in sentence for sentence in beta.evidence)
    assert any("the clip bounds each step" in sentence for sentence in beta.evidence)


def test_an_alarm_is_never_called_healthy(tmp_path: Path) -> None:
    """The guard stopped it before the pattern was clear; or nothing explains it."""
    weak, bare = runs.clean(0), runs.clean(0)
    weak.series["overused_words_share"] = np.full(runs.STEPS, 0.018)
    weak.guard = runs.guard_events(40, "overused_words_share", 0.06, to_step=30)
    bare.guard = runs.guard_events(40, "rare_token_fraction", 0.2, to_step=30)
    found = runs.diagnosed(bare, tmp_path / "bare")
    assert found.best.name == "unexplained_alarm"
    assert "rare_token_fraction" in found.best.evidence[0]
    assert len(found.recommendations) >= 2
    assert runs.diagnosed(weak, tmp_path / "weak").best.name != "healthy"


# ---------------------------------------------------------------- records in any state


def test_nothing_there_but_a_directory(tmp_path: Path) -> None:
    found = diagnose_record(read_record(tmp_path))
    assert found.state == "not begun"
    assert found.best.name == "healthy"
    assert found.best.strength <= 0.5
    assert markdown(found)
    with pytest.raises(DataError, match="no run directory"):
        read_record(tmp_path / "none")


FILES = (
    "config.yaml", "metrics.jsonl", "guard.jsonl", "evaluations.jsonl", "guard_samples.jsonl", "progress.jsonl",
    "summary.json", "refreshes.jsonl", "samples.jsonl", "eval/sft.json", "eval/sft.rows.jsonl", "logs/learner-0.log",
)  # fmt: skip
DAMAGE = {
    "absent": None,
    "empty": b"",
    "torn": b'{"step": 1, "reward_me',
    "bytes": bytes(range(256)) * 8,
    "types": b'{"step": 3, "signals": [1], "guard": "x", "beta": "y", "event": 7, "answer": 5, "stage": {}}\n',
    "list": b"[1, 2]\n[3]\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_damaged_files_do_not_stop_it(tmp_path: Path, name: str, damage: str) -> None:
    path = runs.write(runs.fantastic(0), tmp_path / "run")
    content = DAMAGE[damage]
    target = path / name
    target.parent.mkdir(exist_ok=True)
    target.unlink(missing_ok=True)
    if content is not None:
        target.write_bytes(content)
    found = diagnose_record(read_record(path))
    json.dumps(as_json(found), allow_nan=False)
    assert markdown(found)
    if name != "metrics.jsonl":
        assert found.best.name == "over_used_phrase"


def test_few_steps_and_gaps_in_every_series(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for steps in (1, 2, 3, 5, 9):
        run = runs.no_penalty(steps)
        for values in run.series.values():
            values[rng.random(runs.STEPS) < 0.3] = np.nan
        found = runs.diagnosed(run, tmp_path / f"run{steps}", steps=steps)
        json.dumps(as_json(found), allow_nan=False)


def test_of_a_step_recorded_twice_the_later_counts(tmp_path: Path) -> None:
    path = runs.write(runs.clean(0), tmp_path / "run")
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 7, "beta": 9.0}) + "\n")
    record = read_record(path)
    assert len(record.steps) == runs.STEPS
    assert record.values("beta")[6] == 9.0


# ---------------------------------------------------------------- recommendations


def every_match(tmp_path: Path) -> list[tuple[RunRecord, Match]]:
    """Each pattern's match on some record, by running all of them on all faults."""
    found = []
    for index, make in enumerate((*runs.PLANTED.values(), everything_wrong)):
        record = read_record(runs.write(make(0), tmp_path / f"run{index}"))
        found += [(record, match) for pattern in PATTERNS if (match := pattern.match(record)) is not None]
    for index, log in enumerate(("StallError: x", "OutOfMemoryError: out of memory", "ValueError: x")):
        path = runs.write(runs.clean(0), tmp_path / f"end{index}", finished=False)
        (path / "logs").mkdir()
        (path / "logs" / "driver-0.log").write_text(log)
        record = read_record(path)
        found += [(record, match) for pattern in PATTERNS if (match := pattern.match(record)) is not None]
    return found


def everything_wrong(seed: int) -> runs.Planted:
    run = runs.no_penalty(seed)
    series, steps = run.series, np.arange(1, runs.STEPS + 1)
    series["beta"] = np.full(runs.STEPS, 0.05)
    series["value_error_ratio"] = np.full(runs.STEPS, 1.8)
    series["behaviour_gap_max_nats"] = np.full(runs.STEPS, 3.0)
    series["samples_stale_dropped"] = series["samples_issued"] * 0.3
    series["samples_dead"] = series["samples_issued"] * 0.1
    series["truncated_fraction"] = np.full(runs.STEPS, 0.6)
    series["proxy_z"] = np.where(steps > 30, series["proxy_z"] + 3.0, series["proxy_z"])
    run.guard = [{"step": runs.STEPS, "event": "action", "action": "halt", "reason": "enough"}]
    return run


def test_every_recommended_line_is_valid(tmp_path: Path) -> None:
    seen: dict[str, Match] = {}
    for record, match in every_match(tmp_path):
        seen[match.name] = match
        assert len(match.recommendations) >= 2, match.name
        for one in match.recommendations:
            assert one.lines, match.name
            assert one.trade_off, match.name
            load_config(record.path / "config.yaml", overrides=one.lines)
    missing = {
        "length_bias", "over_used_phrase", "repetition", "mode_collapse", "truncation", "beta_too_low", "kl_runaway",
        "constant_reward", "reward_scale_jump", "rm_judge_disagreement", "critic_failure", "staleness",
        "engine_mismatch", "stalled", "crashed", "out_of_memory", "halted_by_guard", "dead_letters",
    } - set(seen)  # fmt: skip
    assert missing == set()


@pytest.mark.parametrize("name", runs.PLANTED)
def test_all_recommendations_of_a_run_can_be_set_together(tmp_path: Path, name: str) -> None:
    path = runs.write(runs.PLANTED[name](0), tmp_path / "run")
    found = diagnose_record(read_record(path))
    together = [line for one, _ in found.recommendations for line in one.lines]
    config = load_config(path / "config.yaml", overrides=together)
    assert config.guard is not None
    values: dict[str, str] = {}
    for line in together:
        key, _, value = line.partition("=")
        assert values.setdefault(key, value) == value, f"{key} twice"


def test_recommendations_that_contradict_are_left_out() -> None:
    def match(name: str, *lines: str) -> Match:
        return Match(name, name, Kind.CAUSE, 0.9, 1, ("x",), tuple(Recommendation(one, "t", (one,)) for one in lines))

    chosen = merged(
        [
            match("a", "learner.kl={kind: fixed, beta: 0.2}", "learner.entropy_bonus=0.01"),
            match("b", "learner.kl.beta=0.3", "learner.entropy_bonus=0.01", "learner.nonsense=1", "rm.members=3"),
        ],
        RunRecord(path=Path("run")),
    )
    assert [(one.lines[0], names) for one, names in chosen] == [
        ("learner.kl={kind: fixed, beta: 0.2}", ["a"]),
        ("learner.entropy_bonus=0.01", ["a", "b"]),
        ("rm.members=3", ["b"]),
    ]


# ---------------------------------------------------------------- command


def test_the_command_writes_and_prints(tmp_path: Path) -> None:
    path = runs.write(runs.length(0), tmp_path / "run")
    output = StringIO()
    command.diagnose(path, console=Console(file=output, width=100))
    written = json.loads((path / "diagnosis.json").read_text())
    assert written["pattern"] == "length_bias"
    assert written["recommendations"][0]["set"]
    assert "# Diagnosis of run" in output.getvalue()
    assert (path / "diagnosis.md").read_text() in output.getvalue()
    output = StringIO()
    command.diagnose(path, as_json_text=True, console=Console(file=output, width=80))
    assert json.loads(output.getvalue()) == written


def test_it_reads_like_a_report_in_a_terminal(tmp_path: Path) -> None:
    path = runs.write(runs.fantastic(0), tmp_path / "run")
    output = StringIO()
    command.diagnose(path, console=Console(file=output, width=100, force_terminal=True, color_system=None))
    for part in ("fantastic", "First sign", "What the guard did", "--set"):
        assert part in output.getvalue()


def test_a_directory_that_cannot_be_written_to_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, text: str) -> None:
        raise PermissionError(f"{path.name}: permission denied")

    monkeypatch.setattr(command, "atomic_write_text", refuse)
    path, output = runs.write(runs.clean(0), tmp_path / "run"), StringIO()
    command.diagnose(path, console=Console(file=output, width=100))
    assert "not written" in output.getvalue()
    assert "Healthy" in output.getvalue()
