"""The learner over ranks as it runs: rank 0 leads, the others follow; checkpoints fit any number of ranks."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import learner.critic
import learner.policy
from cluster.checkpoint_tensors import read_whole
from cluster.errors import KeelError, NonFiniteError, StreamError, SupervisionError
from cluster.rendezvous import MemoryRendezvous
from cluster.streams_memory import MemoryStreams
from cluster.weights import MemoryWeightChannel, unpack
from configs.run import LoraSection, RunConfig
from learner.follow import Follower
from learner.meet import Place, find_store, meet, open_store
from learner.models import load_trainable
from learner.ranks import Ranks
from learner.state import LearnerState
from learner.team import Team
from learner.trainer import Trainer
from tests.ranks_support import RankGroup, alone, on_ranks
from tests.run_support import prepare_run, random_rollouts

Outcome = dict[str, Any]
SHORT_TIMEOUT_S = 5.0


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return prepare_run(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def config(prepared: RunConfig, tmp_path: Path) -> RunConfig:
    """A run directory of this test's own over the same models."""
    run_dir = tmp_path / prepared.name
    run_dir.mkdir()
    for name in ("sft", "rm", "data", "model"):
        if (prepared.run_dir / name).exists():
            (run_dir / name).symlink_to(prepared.run_dir / name)
    return prepared.model_copy(update={"runs_dir": tmp_path})


def train(ranks: Ranks, config: RunConfig, seeds: list[int], save: bool = True) -> Outcome | str:
    """Build or resume, one step a seed, publish, save. Rank 0: what came out; the others: how they ended."""
    trainer = Trainer(config, run_dir=config.run_dir, ranks=ranks)
    if ranks.rank > 0:
        follower = Follower(trainer, beat=lambda: None)
        follower.until_ready()
        return follower.until_end()
    channel = MemoryWeightChannel()
    state = LearnerState.build(
        config, run_dir=config.run_dir, streams=MemoryStreams(), channel=channel, team=Team(trainer)
    )
    resumed_at = state.step
    for seed in seeds:
        experience = state.make_experience(random_rollouts(seed=seed))
        state.advance(experience, state.update(experience))
    asyncio.run(state.publish_weights())
    blob = asyncio.run(channel.latest())
    assert blob is not None
    assert blob.probe is not None
    if save:
        state.save_final()
    if ranks.size > 1:
        state.team.end("steps_done")
    return {
        "resumed_at": resumed_at,
        "weights": {name: tensor.numpy().copy() for name, tensor in unpack(blob)},
        "probe": (blob.probe.token_ids.copy(), blob.probe.logprobs.copy()),
        "beta": state.kl.beta,
    }


def on(size: int, config: RunConfig, seeds: list[int], save: bool = True) -> Outcome:
    if size == 1:
        outcome: Outcome = alone(train, config, seeds, save)
        return outcome
    outcome, *others = on_ranks(train, config, seeds, save, size=size)
    assert others == ["steps_done"] * (size - 1)
    return outcome


def close(ours: Outcome, theirs: Outcome) -> None:
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, expected in theirs["weights"].items():
        distance = np.linalg.norm(ours["weights"][name] - expected) / np.linalg.norm(expected)
        assert distance < 1e-5, f"{name}: {distance:.2e}"
    np.testing.assert_allclose(ours["probe"][1], theirs["probe"][1], atol=1e-5)
    assert ours["beta"] == pytest.approx(theirs["beta"], rel=1e-6)


def saved_tensors(directory: Path) -> dict[str, torch.Tensor]:
    groups = read_whole(directory)
    return {f"{group}/{name}": tensor for group, named in groups.items() for name, tensor in named.items()}


def test_two_ranks_train_publish_and_hand_over_as_one_does(config: RunConfig) -> None:
    whole = on(1, config, [1, 2], save=False)
    sharded = on(2, config, [1, 2])
    close(sharded, whole)
    model = AutoModelForCausalLM.from_pretrained(config.run_dir / "policy" / "final")
    assert type(model).__name__ == model.config.architectures[0] == "LlamaForCausalLM"
    written = dict(model.named_parameters())
    assert written.keys() == sharded["weights"].keys()
    for name, expected in sharded["weights"].items():
        np.testing.assert_array_equal(written[name].detach().numpy(), expected)
    names = sorted(path.suffix for path in (config.run_dir / "checkpoints" / "step-00000002").iterdir())
    assert names == [".json", ".json", ".safetensors", ".safetensors"], "a file of each rank, nothing pickled"


def copy_checkpoint(ranks: Ranks, config: RunConfig, source: Path, target: Path) -> None:
    """Load and save again, on these ranks."""
    trainer = Trainer(config, run_dir=config.run_dir, ranks=ranks)
    trainer.load(source)
    trainer.save(target)


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 3), (3, 2)])
def test_a_checkpoint_fits_any_number_of_ranks(config: RunConfig, tmp_path: Path, first: int, then: int) -> None:
    """Bit for bit: weights, optimisers and random state."""
    on(first, config, [1, 2])
    source, target = config.run_dir / "checkpoints" / "step-00000002", tmp_path / "again"
    target.mkdir()
    if then == 1:
        alone(copy_checkpoint, config, source, target)
    else:
        on_ranks(copy_checkpoint, config, source, target, size=then)
    assert (len(list(source.glob("*.safetensors"))), len(list(target.glob("*.safetensors")))) == (first, then)
    saved, again = saved_tensors(source), saved_tensors(target)
    assert {"policy", "policy_optimiser", "critic", "critic_optimiser", "rng"} == {n.partition("/")[0] for n in saved}
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[name], again[name]) for name in saved)


def test_a_learner_goes_on_the_same_on_another_number_of_ranks(config: RunConfig) -> None:
    on(1, config, [1, 2])
    straight = on(1, config, [3], save=False)
    moved = on(2, config, [3], save=False)
    assert straight["resumed_at"] == moved["resumed_at"] == 2
    close(moved, straight)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"lora": LoraSection(rank=4, alpha=8.0)},
        {"advantages": "group_relative", "samples_per_prompt": 2},
    ],
    ids=["gradient_checkpointing", "lora", "no critic"],
)
def test_two_ranks_are_as_one_under(config: RunConfig, changes: dict[str, Any]) -> None:
    learner = config.learner.model_copy(update=changes)
    config = config.model_copy(update={"learner": learner})
    whole = on(1, config, [1, 2], save=False)
    close(on(2, config, [1, 2]), whole)
    assert on(1, config, [], save=False)["resumed_at"] == 2


def test_bfloat16_keeps_float32_masters(config: RunConfig) -> None:
    whole = on(1, config, [1, 2], save=False)
    learner = config.learner.model_copy(update={"dtype": "bfloat16"})
    outcome = on(2, config.model_copy(update={"learner": learner}), [1, 2])
    assert {array.dtype for array in outcome["weights"].values()} == {np.dtype("float32")}
    saved = saved_tensors(config.run_dir / "checkpoints" / "step-00000002")
    assert {str(tensor.dtype) for name, tensor in saved.items() if "exp_avg" in name} == {"torch.float32"}
    np.testing.assert_allclose(outcome["probe"][1], whole["probe"][1], atol=0.1)


# ---------------------------------------------------------------- loading


def load_slowly(ranks: Ranks, config: RunConfig) -> list[bool]:
    """Rank 0 reads for longer than the collective time-out, and then finds that its model cannot be packed: the others,
    whose weights are zeros until they get rank 0's, could not tell. Whether policy and critic pack."""

    def packs(model: nn.Module, decoder: nn.Module) -> bool:
        del model, decoder
        if ranks.rank == 0:
            time.sleep(SHORT_TIMEOUT_S + 1.0)
        return ranks.rank > 0

    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch.object(learner.policy, "attend_packed", packs),
        mock.patch.object(learner.critic, "attend_packed", packs),
    ):
        trainable = load_trainable(config, run_dir=config.run_dir, ranks=ranks)
    assert trainable.critic is not None
    return [trainable.policy.packing, trainable.critic.packing]


def test_the_others_wait_while_the_first_rank_reads_and_take_its_word(config: RunConfig) -> None:
    group = RankGroup(load_slowly, config, size=2, timeout_s=SHORT_TIMEOUT_S)
    try:
        assert group.results() == [[False, False]] * 2
    finally:
        group.kill()


# ---------------------------------------------------------------- losses


def lead_and_lose(ranks: Ranks, how: str) -> str:
    """Rank 1 fails in the way named; what rank 0, and a third rank, make of it."""
    if ranks.rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        ranks.abort(MemoryError("on purpose") if how == "aborted" else NonFiniteError("bad loss", got="nan", do="stop"))
        return "aborted"
    try:
        while True:
            if ranks.rank == 0:
                ranks.tell(b"order")
            else:
                ranks.listen()
            ranks.sum(torch.ones(3))
    except KeelError as error:
        ranks.abort(error)
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("killed", "SupervisionError: the learner lost a rank"),
        ("stopped", "SupervisionError: the learner's ranks did not meet within 4 s"),
        ("aborted", "SupervisionError: rank 1 of the learner failed"),
        ("raised", "NonFiniteError: bad loss"),
    ],
)
def test_a_lost_rank_is_an_error_on_the_others_not_a_hang(how: str, says: str) -> None:
    group = RankGroup(lead_and_lose, how, size=2, timeout_s=4.0)
    started_s = time.monotonic()
    try:
        leading = group.result(0)
    finally:
        group.kill()
    assert says in leading
    assert time.monotonic() - started_s < 40.0, "boot and all; the collective time-out is 4 s"


def leader_dies(ranks: Ranks) -> str:
    if ranks.rank == 0:
        ranks.tell(b"one")
        os.kill(os.getpid(), signal.SIGKILL)
    assert ranks.listen() == b"one"
    try:
        ranks.listen()
    except SupervisionError as error:
        ranks.abort(error)
        return str(error)
    return "heard more"


def test_a_follower_notices_the_death_of_the_first_rank() -> None:
    """The store that orders come from lives in the first rank."""
    group = RankGroup(leader_dies, size=2, timeout_s=30.0)
    try:
        assert "lost a rank" in group.result(1)
    finally:
        group.kill()


def order_twice(ranks: Ranks, told: Path) -> list[bytes] | None:
    """Rank 0 is two orders ahead before the last rank begins to listen: of this many, a broadcast's leaves are far from
    its root."""
    if ranks.rank == 0:
        for order in (b"one", b"two"):
            ranks.tell(order)
        told.touch()
        return None
    if ranks.rank == ranks.size - 1:
        deadline_s = time.monotonic() + 20.0
        while not told.exists() and time.monotonic() < deadline_s:
            time.sleep(0.01)
    return [ranks.listen(), ranks.listen()]


def test_a_slow_listener_misses_no_order(tmp_path: Path) -> None:
    size = 8
    assert on_ranks(order_twice, tmp_path / "told", size=size) == [None] + [[b"one", b"two"]] * (size - 1)


# ---------------------------------------------------------------- meeting


async def test_a_group_stands_although_its_address_could_not_be_taken_back() -> None:
    """Otherwise the other ranks, which have met it already, would wait for a first rank that gave up."""
    rendezvous = MemoryRendezvous()
    place = Place(rank=0, size=1, group=5, host="127.0.0.1")
    with mock.patch.object(rendezvous, "withdraw", side_effect=StreamError("the server is away", got="nothing")):
        ranks = await meet(rendezvous, place=place, device=torch.device("cpu"), timeout_s=20.0)
    ranks.close()
    assert ranks.size == 1


async def test_a_rank_finds_its_group_past_an_address_that_is_left_over() -> None:
    """An earlier first rank died before it took its address back; now another group's store is at its port."""
    rendezvous = MemoryRendezvous()
    _others, address = open_store("127.0.0.1", timeout_s=5.0)
    await rendezvous.announce(3, address=f"{address}-before", ttl_s=60.0)
    finding = asyncio.create_task(find_store(rendezvous, group=3, deadline_s=time.monotonic() + 20.0))
    done, _ = await asyncio.wait({finding}, timeout=1.0)
    assert not done
    ours, address = open_store("127.0.0.1", timeout_s=5.0)
    await rendezvous.announce(3, address=address, ttl_s=60.0)
    found = await finding
    ours.set("hello", "there")
    assert found.get("hello") == b"there"


async def test_a_rank_that_finds_nobody_says_so() -> None:
    rendezvous = MemoryRendezvous()
    await rendezvous.announce(0, address="127.0.0.1:9/gone", ttl_s=60.0)
    with pytest.raises(SupervisionError, match="not found in time") as caught:
        await find_store(rendezvous, group=0, deadline_s=time.monotonic() + 1.0)
    assert "127.0.0.1:9" in caught.value.got
