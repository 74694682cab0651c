"""What every reward source does: order, one outcome a sample, failures that are errors and never numbers, time limits.

One contract on a plain function, a coroutine, and a reward server on a real socket. Each reads what it is to do from
the answer's text: a number is the reward, "nan", "text" and "none" come back as they are, "boom" fails, "hang" hangs.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest

from cluster.errors import ScoringError
from configs.reward import HttpReward
from reward_service.forward_thread import StuckError
from reward_service.rewards.http import HttpSource
from reward_service.rewards.sources import FunctionSource, RewardSource, TextSample
from reward_service.rewards.text_function import TextFunction
from tests.reward_server import RewardServer, reward_server

LIMIT_S = 0.3
NO_NUMBERS = {"nan": math.nan, "text": "0.5", "none": None, "inf": math.inf, "list": [1.0, 2.0]}


@dataclass
class World:
    """A source; `hold` lets hanging calls end, `fails_alone`: a failing sample takes no other with it."""

    source: RewardSource
    fails_alone: bool


def sample(answer: str, *, prompt: str = "how? ") -> TextSample:
    return TextSample(task_id=answer, prompt=prompt, answer=answer, finish_reason="stop", response_tokens=3)


def reward_of(prompt: str, answer: str) -> object:
    if answer in NO_NUMBERS:
        return NO_NUMBERS[answer]
    if answer == "boom":
        raise KeyError("boom")
    return float(answer) + 100.0 * prompt.count("!")


@contextlib.asynccontextmanager
async def function_world() -> AsyncIterator[World]:
    end = threading.Event()

    def function(prompt: str, answer: str) -> object:
        if answer == "hang":
            end.wait(20.0)
        return reward_of(prompt, answer)

    source = FunctionSource(TextFunction(function, name="m:f", timeout_s=LIMIT_S))
    try:
        yield World(source, fails_alone=True)
    finally:
        end.set()
        await source.aclose()


@contextlib.asynccontextmanager
async def coroutine_world() -> AsyncIterator[World]:
    async def function(prompt: str, answer: str) -> object:
        if answer == "hang":
            await asyncio.Event().wait()
        await asyncio.sleep(0.01 if answer == "1" else 0.0)  # the first to be asked is the last to answer
        return reward_of(prompt, answer)

    source = FunctionSource(TextFunction(function, name="m:f", timeout_s=LIMIT_S))
    try:
        yield World(source, fails_alone=True)
    finally:
        await source.aclose()


@contextlib.asynccontextmanager
async def http_world() -> AsyncIterator[World]:
    with reward_server(reward_of) as server:
        config = HttpReward(url=server.url, timeout_s=LIMIT_S, retries=0, batch_size=3)
        source = HttpSource(config, name="http")
        try:
            yield World(source, fails_alone=False)
        finally:
            await source.aclose()


@pytest.fixture(params=[function_world, coroutine_world, http_world], ids=["function", "coroutine", "http"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    async with request.param() as opened:
        yield opened


@pytest.mark.timeout(60)
async def test_one_reward_a_sample_in_order(world: World) -> None:
    samples = [sample("1"), sample("-2.5"), sample("3", prompt="how!"), sample("0"), sample("5")]

    assert await world.source.rewards(samples) == [1.0, -2.5, 103.0, 0.0, 5.0]
    assert await world.source.rewards([]) == []


@pytest.mark.timeout(60)
@pytest.mark.parametrize("answer", NO_NUMBERS)
async def test_what_is_no_number_is_that_samples_error_alone(world: World, answer: str) -> None:
    outcomes = await world.source.rewards([sample("1"), sample(answer), sample("2")])

    assert [outcomes[0], outcomes[2]] == [1.0, 2.0]
    assert isinstance(outcomes[1], ScoringError)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("answer", ["boom", "hang"])
async def test_a_failure_is_an_error_and_passes(world: World, answer: str) -> None:
    """A server's failure is that of its whole request; other requests and later calls are not touched."""
    outcomes = await world.source.rewards([sample("1"), sample(answer), sample("2"), sample("3")])

    assert isinstance(outcomes[1], ScoringError)
    assert outcomes[3] == 3.0
    if world.fails_alone:
        assert [outcomes[0], outcomes[2]] == [1.0, 2.0]
    else:
        assert all(isinstance(outcome, ScoringError) for outcome in outcomes[:3])
    assert await world.source.rewards([sample("4")]) == [4.0]


@pytest.mark.timeout(60)
async def test_closing_is_repeatable_and_the_source_still_answers_others(world: World) -> None:
    await world.source.aclose()
    await world.source.aclose()
    assert await world.source.rewards([sample("1")]) == [1.0]


# ---------------------------------------------------------------- functions alone


async def values(function: Callable[[str, str], object], answers: Sequence[str]) -> list[float | ScoringError]:
    source = FunctionSource(TextFunction(function, name="m:f", timeout_s=5.0))
    try:
        return await source.rewards([sample(answer) for answer in answers])
    finally:
        await source.aclose()


async def test_a_check_may_return_a_bool_and_a_tensor_is_a_number() -> None:
    import numpy as np
    import torch

    returned = iter([True, False, np.float32(0.5), torch.tensor(2.0), torch.tensor([1.0, 2.0])])
    found = await values(lambda prompt, answer: next(returned), list("abcde"))

    assert found[:4] == [1.0, 0.0, 0.5, 2.0]
    assert isinstance(found[4], ScoringError)


async def test_a_function_that_wants_to_end_the_process_does_not() -> None:
    def leave(prompt: str, answer: str) -> float:
        raise SystemExit(3)

    (outcome,) = await values(leave, ["a"])
    assert isinstance(outcome, ScoringError)
    assert "SystemExit" in str(outcome)


async def test_a_functions_own_timeout_error_is_not_taken_for_the_limit() -> None:
    def impatient(prompt: str, answer: str) -> float:
        raise TimeoutError("the checker's")

    (outcome,) = await values(impatient, ["a"])
    assert isinstance(outcome, ScoringError)
    assert "failed" in outcome.what


async def test_a_coroutine_of_other_arguments_is_an_error_a_sample() -> None:
    async def narrow(answer: str) -> float:
        return 1.0

    assert all(isinstance(outcome, ScoringError) for outcome in await values(narrow, ["a", "b"]))  # type: ignore[arg-type]


async def test_a_function_that_never_ends_gives_the_process_up_in_the_end() -> None:
    end = threading.Event()

    def hang(prompt: str, answer: str) -> float:
        end.wait(20.0)
        return 1.0

    source = FunctionSource(TextFunction(hang, name="m:f", timeout_s=0.02))
    try:
        with pytest.raises(StuckError, match="m:f is stuck"):
            await source.rewards([sample(str(number)) for number in range(20)])
    finally:
        end.set()


# ---------------------------------------------------------------- HTTP alone


@pytest.fixture
def server() -> Iterator[RewardServer]:
    with reward_server(reward_of) as running:
        yield running


async def test_the_request_is_the_common_form_and_carries_the_token(server: RewardServer) -> None:
    source = HttpSource(HttpReward(url=server.url, batch_size=2), name="http", token="s3cret")
    await source.rewards([sample("1", prompt="p"), sample("2", prompt="q"), sample("3", prompt="r")])
    await source.aclose()

    assert sorted(server.bodies, key=lambda body: str(body["prompts"])) == [
        {"query": ["p1", "q2"], "prompts": ["p", "q"], "labels": ["", ""]},
        {"query": ["r3"], "prompts": ["r"], "labels": [""]},
    ]
    assert set(server.authorizations) == {"Bearer s3cret"}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("error", [asyncio.CancelledError(), SystemExit(3)], ids=["cancelled", "exit"])
async def test_a_coroutine_that_ends_as_a_task_does_ends_no_task_of_ours(error: BaseException) -> None:
    async def function(prompt: str, answer: str) -> float:
        if answer == "boom":
            raise error
        return 1.0

    source = FunctionSource(TextFunction(function, name="m:f", timeout_s=5.0))
    first, second = await source.rewards([sample("boom"), sample("1")])
    assert isinstance(first, ScoringError)
    assert repr(error) in str(first)
    assert second == 1.0


@pytest.mark.timeout(60)
async def test_a_cancelled_caller_cancels_the_coroutine() -> None:
    entered, cancelled = asyncio.Event(), asyncio.Event()

    async def function(prompt: str, answer: str) -> float:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        return 1.0

    source = FunctionSource(TextFunction(function, name="m:f", timeout_s=20.0))
    call = asyncio.create_task(source.rewards([sample("1")]))
    await entered.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert cancelled.is_set()
