"""Going back to a good checkpoint: exact where it restores, and onward where the run goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.checkpoint import CheckpointStore
from cluster.errors import CheckpointError
from cluster.weights import unpack
from configs.learner import AdaptiveKl, ConstrainedKl, FixedKl, KlSection
from configs.run import RunConfig
from learner.guard.record import Alert, Halt, LowerLearningRate, RaiseBeta, RollBack
from learner.state import LearnerState
from tests.guard_support import alarm
from tests.rollback_scene import Run, identity, same
from tests.run_support import prepare_run, random_rollouts, write_reward_model
from tests.unit.helpers import scored


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return prepare_run(
        tmp_path_factory.mktemp("prepared"), "checkpoint.every_steps=1", "checkpoint.keep_last=2", "learner.steps=20"
    )


@pytest.fixture
def config(prepared: RunConfig, tmp_path: Path) -> RunConfig:
    """A run directory of this test's own over the same models."""
    run_dir = tmp_path / prepared.name
    run_dir.mkdir()
    for name in ("sft", "rm", "data", "model"):
        if (prepared.run_dir / name).exists():
            (run_dir / name).symlink_to(prepared.run_dir / name)
    return prepared.model_copy(update={"runs_dir": tmp_path})


@pytest.mark.parametrize("at", [0, 2])
async def test_what_is_restored_is_the_checkpoints_bit_for_bit(config: RunConfig, at: int) -> None:
    """Of the start, when no optimiser had a state, and of a later step."""
    run = Run(config)
    run.state.begin()
    for seed in range(at):
        await run.step(seed)
    before = run.restored()
    write_reward_model(config.run_dir, version="rm-2")
    for seed in (11, 12, 13):
        await run.step(seed, alarm())
    assert run.restored()["kl"] != before["kl"] or at == 0
    assert run.restored()["cursor"] > before["cursor"]
    assert run.state.roll_back(at) == at
    same(run.restored(), before)


async def test_steps_versions_and_totals_go_on_upward(config: RunConfig) -> None:
    run = Run(config)
    for seed in (1, 2, 3):
        await run.step(seed)
    state = run.state
    version, issued = state.version, state.intake.ledger.counts.issued
    await run.step(4, alarm(Alert("look"), RollBack(1), RaiseBeta(factor=2.0, floor=0.05), LowerLearningRate(0.5)))
    assert (state.step, state.branch) == (4, 1)
    assert state.version > version + 1 + config.learner.max_staleness
    assert (await run.channel.newest_version()) == state.version
    assert state.intake.ledger.counts.issued > issued
    saved = CheckpointStore(config.run_dir / "checkpoints", keep_last=9)
    of_step_1 = saved.load(1).state
    assert state.kl.beta == 2.0 * of_step_1["kl"]["beta"]
    assert state.lr_scale == 0.5
    done = [entry for entry in run.guard.log if isinstance(entry[0], RollBack | RaiseBeta | LowerLearningRate)]
    assert [type(action).__name__ for action, _ in done] == ["RollBack", "RaiseBeta", "LowerLearningRate"]
    facts = done[0][1]
    assert (facts["to_step"], facts["beta"], facts["rm_version"]) == (1, of_step_1["kl"]["beta"], "rm-1")
    assert done[1][1]["beta"] == state.kl.beta
    after = saved.load()
    assert (after.step, after.state["branch"], after.state["kl"]["beta"]) == (4, 1, state.kl.beta)


async def test_the_published_weights_are_the_checkpoints(config: RunConfig) -> None:
    run = Run(config)
    await run.step(1)
    good = dict(unpack(blob)) if (blob := await run.channel.latest()) else {}
    await run.step(2)
    await run.step(3, alarm(RollBack(1)))
    back = dict(unpack(blob)) if (blob := await run.channel.latest()) else {}
    assert good
    assert all(torch.equal(tensor, back[name]) for name, tensor in good.items())


async def test_samples_of_the_branch_that_is_left_are_counted_and_replaced(config: RunConfig) -> None:
    """Each issued sample has one outcome; what comes in late changes nothing."""
    run = Run(config)
    state = run.state
    await run.step(1)
    await state.intake.issue(step=state.step, version=state.version)
    tasks = run.tasks + await run.issued()
    for task in tasks[:5]:
        state.intake.ledger.accept(scored(task, version=state.version))
    out = state.intake.ledger.outstanding + state.intake.ledger.held
    assert out == len(tasks) > 5
    identity(state)
    state.roll_back(1)
    counts = state.intake.ledger.counts
    assert (counts.abandoned, state.intake.ledger.outstanding, state.intake.ledger.held) == (out, 0, 0)
    identity(state)
    duplicates = counts.duplicates
    for task in tasks:
        assert not state.intake.ledger.accept(scored(task, version=state.version))
    assert counts.duplicates == duplicates + len(tasks)
    issued = await state.intake.issue(step=state.step, version=state.version)
    assert issued == (1 + config.learner.max_staleness) * config.learner.batch_size
    assert {task.task_id for task in await run.issued()}.isdisjoint(task.task_id for task in tasks)
    identity(state)


async def test_answers_of_the_policy_that_was_left_are_over_age_for_new_tasks_too(config: RunConfig) -> None:
    """An actor that has not heard of the rollback yet takes a task that was issued after it."""
    run = Run(config)
    await run.step(1)
    state = run.state
    bad = state.version
    state.roll_back(1)
    await state.publish_weights()
    await state.intake.issue(step=state.step, version=state.version)
    ledger = state.intake.ledger
    for task in await run.issued():
        ledger.accept(scored(task, version=bad))
    held = ledger.held
    assert ledger.drop_stale(version=state.version, max_staleness=config.learner.max_staleness) == held > 0
    identity(state)


async def test_a_learner_killed_after_a_rollback_goes_on_behind_it(config: RunConfig) -> None:
    first = Run(config)
    for seed in (1, 2):
        await first.step(seed)
    await first.step(3, alarm(RollBack(1), RaiseBeta(factor=2.0, floor=0.05)))
    second = Run(config)
    same(second.restored(), first.restored())
    assert (second.state.step, second.state.branch) == (3, 1)
    assert second.state.good.steps == first.state.good.steps == (0, 1)
    assert second.state.intake.ledger.counts.abandoned == first.state.intake.ledger.counts.abandoned > 0
    ours, theirs = ([run.state.deck.deal().prompt_id for _ in range(40)] for run in (first, second))
    assert ours == theirs
    for run in (first, second):
        experience = run.state.make_experience(random_rollouts(seed=9))
        run.state.advance(experience, run.state.update(experience))
    same(second.restored(), first.restored() | {"cursor": second.state.deck.position})


async def test_a_learner_killed_in_the_middle_of_a_rollback_goes_on_from_before_it(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are published, the checkpoint behind the rollback is not yet saved."""
    first = Run(config)
    for seed in (1, 2):
        await first.step(seed)
    before = first.restored()
    monkeypatch.setattr(first.state, "save", _killed)
    with pytest.raises(_Killed):
        await first.step(3, alarm(RollBack(1), RaiseBeta(factor=2.0, floor=0.05)))
    seen = await first.channel.newest_version()
    assert seen == first.state.version
    second = Run(config, channel=first.channel)
    same(second.restored(), before)
    assert (second.state.step, second.state.branch, second.good()) == (2, 0, [0, 1, 2])
    identity(second.state)
    await second.state.publish_weights()
    assert await second.channel.newest_version() == second.state.version > seen
    await second.step(3, alarm(RollBack(1)))
    assert (second.state.step, second.state.branch) == (3, 1)
    identity(second.state)


class _Killed(Exception):
    """As by a signal: nothing comes after it."""


def _killed(**_: object) -> None:
    raise _Killed


async def test_prompts_after_the_cursor_come_in_another_order(config: RunConfig) -> None:
    run = Run(config)
    await run.step(1)
    deck = run.state.deck
    straight = [deck.deal().prompt_id for _ in range(50)]
    run.state.roll_back(1)
    again = [deck.deal().prompt_id for _ in range(50)]
    run.state.roll_back(1)
    third = [deck.deal().prompt_id for _ in range(50)]
    assert len({tuple(order) for order in (straight, again, third)}) == 3


async def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(config: RunConfig) -> None:
    run = Run(config)
    for seed in (1, 2):
        await run.step(seed)
    (config.run_dir / "checkpoints" / "step-00000002" / "state.json").write_text("{}")
    assert run.state.roll_back(2) == 1
    assert run.state.good.steps == (0, 1)
    for step in (0, 1):
        (config.run_dir / "checkpoints" / f"step-{step:08d}" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no good checkpoint of step 1 or before"):
        run.state.roll_back(1)


async def test_good_checkpoints_outlive_pruning_and_are_few(config: RunConfig) -> None:
    run = Run(config)
    for seed in range(1, 7):
        await run.step(seed)
    store = CheckpointStore(config.run_dir / "checkpoints", keep_last=2)
    assert run.good() == [0, 4, 5, 6] == sorted(store.pinned())
    for seed in (7, 8):
        await run.step(seed, alarm())
    assert store.list() == [0, 4, 5, 6, 7, 8]
    assert [store.load(step).state["guard"]["good"] for step in (6, 7)] == [True, False]
    await run.step(9, alarm(RollBack(5)))
    assert run.good() == [0, 4, 5]
    await run.step(10, alarm())
    assert store.list() == [0, 4, 5, 9, 10]


@pytest.mark.parametrize(
    ("section", "beta"),
    [
        (FixedKl(beta=0.1), 0.2),
        (FixedKl(beta=0.0), 0.05),
        (AdaptiveKl(beta_init=0.1), 0.2),
        (AdaptiveKl(beta_init=0.1, beta_max=0.15), 0.15),
        (ConstrainedKl(beta_init=0.01), 0.05),
    ],
    ids=["fixed", "fixed at 0", "adaptive", "adaptive at its most", "constrained, from under the floor"],
)
async def test_beta_is_raised_and_the_controller_goes_on_from_there(
    config: RunConfig, section: KlSection, beta: float
) -> None:
    learner = config.learner.model_copy(update={"kl": section})
    run = Run(config.model_copy(update={"learner": learner}))
    run.state.raise_beta(factor=2.0, floor=0.05)
    assert run.state.kl.beta == pytest.approx(beta)
    experience = run.state.make_experience(random_rollouts(seed=1))
    run.state.advance(experience, run.state.update(experience))
    if isinstance(section, FixedKl):
        assert run.state.kl.beta == beta
    else:
        assert run.state.kl.beta == pytest.approx(beta, rel=0.5)


async def test_a_lowered_learning_rate_multiplies_the_schedule_and_is_kept(config: RunConfig) -> None:
    run, plain = Run(config), Run(config.model_copy(update={"runs_dir": config.runs_dir}))
    run.state.lower_learning_rate(0.5)
    rates = [one.state.update(one.state.make_experience(random_rollouts(seed=1))).learning_rate for one in (run, plain)]
    assert rates[0] == pytest.approx(0.5 * rates[1])
    assert rates[0] > 0
    run.state.step = 1
    run.state.save()
    assert Run(config).state.lr_scale == 0.5


async def test_the_best_policy_of_a_branch_that_was_left_is_no_longer_the_best(config: RunConfig) -> None:
    run = Run(config)
    best = config.run_dir / "policy" / "best" / "keel.json"
    run.state.best.save_if_better = _always(run)  # type: ignore[method-assign]
    for seed in (1, 2):
        await run.step(seed)
    assert json.loads(best.read_text())["step"] == 2
    run.state.best.save_if_better = lambda *_, **__: None  # type: ignore[method-assign]
    await run.step(3, alarm(RollBack(2)))
    assert json.loads(best.read_text())["step"] == 2
    await run.step(4, alarm(RollBack(1)))
    assert not best.exists()


async def test_a_policy_that_the_guard_distrusts_is_not_kept_as_the_best(config: RunConfig) -> None:
    run = Run(config)
    report: Any = SimpleNamespace(record={"step": 1}, rollouts=(), prompts=(), texts=())
    run.guard.script[1] = alarm()
    await run.step(1)
    shutil.rmtree(config.run_dir / "policy" / "best")
    run.state.best._best = float("-inf")
    run.state.judge(report)
    run.state._saved_step = -1
    run.state.save()
    assert not (config.run_dir / "policy" / "best").exists()


def _always(run: Run) -> Any:
    def save(save_model: Any, *, tokenizer: Any, step: int) -> None:
        run.state.best._write("best", save_model, tokenizer, {"step": step})

    return save


async def test_a_halted_run_stays_so_until_its_settings_are_others(config: RunConfig) -> None:
    run = Run(config)
    await run.step(1)
    await run.step(2, alarm())
    run.guard.halted = "too many rollbacks"
    await run.step(3, alarm(Halt("too many rollbacks")))
    assert run.state.halted
    run.state.save_final()
    again = Run(config)
    assert again.state.halted
    assert again.state.step == 3
    more = config.model_copy(update={"learner": config.learner.model_copy(update={"steps": 99})})
    assert Run(more).state.halted, "more steps mend nothing"
    gentler = config.model_copy(update={"learner": config.learner.model_copy(update={"clip_epsilon": 0.1})})
    mended = Run(gentler)
    assert not mended.state.halted
    assert (mended.state.step, mended.state.branch) == (3, 1)
    assert [action for action, *_ in mended.guard.log if isinstance(action, RollBack)] == [RollBack(1)]


async def test_a_halted_run_goes_back_where_its_guard_was_switched_off(config: RunConfig) -> None:
    run = Run(config.model_copy(update={"guard": config.guard.model_copy(update={"enabled": True})}))
    await run.step(1)
    before = run.restored()
    run.guard.halted = "enough"
    await run.step(2, alarm(Halt("enough")))
    run.state.save_final()
    mended = LearnerState.build(
        config.model_copy(update={"guard": config.guard.model_copy(update={"enabled": False})}),
        run_dir=config.run_dir,
        streams=run.streams,
        channel=run.channel,
        guarded_by=lambda *_, **__: None,
    )
    assert not mended.halted
    assert (mended.step, mended.branch) == (2, 1)
    run.state = mended
    same(run.restored(), before)


async def test_a_rollback_on_resuming_is_saved_before_the_first_step(config: RunConfig) -> None:
    run = Run(config)
    await run.step(1)
    run.guard.halted = "enough"
    await run.step(2, alarm(Halt("enough")))
    run.state.save_final()
    gentler = config.model_copy(update={"learner": config.learner.model_copy(update={"clip_epsilon": 0.1})})
    mended = Run(gentler)
    assert mended.state.branch == 1
    mended.state.begin()
    again = Run(gentler)
    assert not again.state.halted
    assert (again.state.step, again.state.branch, again.state.version) == (2, 1, mended.state.version)
    assert not [action for action, *_ in again.guard.log if isinstance(action, RollBack)]
    same(again.restored(), mended.restored())


async def test_a_start_that_was_saved_without_being_good_is_saved_as_good(config: RunConfig) -> None:
    """A run that was stopped before its first step, and that may go back only since."""
    Run(config).state.save()
    resumed = Run(config)
    assert resumed.good() == []
    resumed.state.begin()
    assert resumed.good() == [0]
    assert CheckpointStore(config.run_dir / "checkpoints", keep_last=2).load(0).state["guard"]["good"] is True


async def test_what_a_dead_learner_left_pinned_is_not_kept_for_ever(config: RunConfig) -> None:
    run = Run(config)
    for seed in (1, 2):
        await run.step(seed)
    store = CheckpointStore(config.run_dir / "checkpoints", keep_last=2)
    run.state.good.forget(1)
    store.pin(1)  # It died before this one was unpinned.
    run.state._saved_step = -1
    run.state.save()
    resumed = Run(config)
    assert resumed.good() == [0, 2] == sorted(store.pinned())


def test_a_beta_that_was_set_anew_counts_for_a_resumed_run(config: RunConfig) -> None:
    fixed = config.model_copy(update={"learner": config.learner.model_copy(update={"kl": FixedKl(beta=0.0)})})
    run = Run(fixed)
    run.state.raise_beta(factor=2.0, floor=0.05)
    run.state.save()
    assert Run(fixed).state.kl.beta == 0.05
    other = config.model_copy(update={"learner": config.learner.model_copy(update={"kl": FixedKl(beta=0.3)})})
    assert Run(other).state.kl.beta == 0.3
