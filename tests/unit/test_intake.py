from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import StallError, StreamError
from cluster.records import DeadLetter, PromptTask, decode, encode
from cluster.streams import StreamName
from cluster.streams_memory import MemoryStreams
from learner.deck import DeckPrompt, PromptDeck, TaskTemplate
from learner.intake import Intake, IntakeSettings
from learner.ledger import Gate, Ledger
from tests.unit.helpers import scored


class Clock:
    """Seconds set by the test; each reading moves it on, so that waiting loops end."""

    def __init__(self, *, per_reading_s: float = 0.0) -> None:
        self.now_s = 0.0
        self._per_reading_s = per_reading_s

    def __call__(self) -> float:
        self.now_s += self._per_reading_s
        return self.now_s


class ImpatientStreams(MemoryStreams):
    """Never waits, and may be told to fail its next calls to publish."""

    failures = 0

    async def claim(self, stream: StreamName, *, consumer: str, max_count: int, wait_s: float):  # type: ignore[no-untyped-def]
        await asyncio.sleep(0)
        return await super().claim(stream, consumer=consumer, max_count=max_count, wait_s=0.0)

    async def publish(self, stream: StreamName, payloads: Sequence[bytes]) -> None:
        if self.failures > 0:
            self.failures -= 1
            raise StreamError("server away")
        await super().publish(stream, payloads)


def make_intake(
    streams: MemoryStreams, clock: Clock, *, staleness: int = 0, steps: int = 10, samples_per_prompt: int = 1
) -> Intake:
    prompts = [DeckPrompt(f"p{number}", (1, number + 3), f"prompt {number}") for number in range(5)]
    return Intake(
        streams,
        deck=PromptDeck(prompts, seed=1),
        ledger=Ledger(task_deadline_s=100.0),
        gate=Gate(batch_size=2, max_staleness=staleness, total_steps=steps),
        template=TaskTemplate(
            incarnation="a", max_new_tokens=4, temperature=1.0, samples_per_prompt=samples_per_prompt
        ),
        settings=IntakeSettings(batch_size=2, max_staleness=staleness, stall_timeout_s=50.0),
        clock=clock,
    )


async def issued(streams: MemoryStreams) -> list[PromptTask]:
    entries = await streams.claim(StreamName.PROMPTS, consumer="actor", max_count=100, wait_s=0.0)
    await streams.settle(StreamName.PROMPTS, [entry.entry_id for entry in entries])
    return [decode(entry.payload, PromptTask) for entry in entries]


async def next_issued(streams: MemoryStreams) -> list[PromptTask]:
    """What is issued next, letting the other tasks run meanwhile."""
    tasks: list[PromptTask] = []
    for _ in range(1000):
        await asyncio.sleep(0)
        tasks = tasks or await issued(streams)
    return tasks


async def test_issues_what_the_gate_allows_and_trains_on_what_comes_back() -> None:
    streams, stop = ImpatientStreams(), asyncio.Event()
    intake = make_intake(streams, Clock(), staleness=1)
    assert await intake.issue(step=0, version=0) == 4
    tasks = await issued(streams)
    await streams.publish(StreamName.SCORED, [encode(scored(task)) for task in reversed(tasks[:2])])
    batch = await intake.take_batch(step=0, version=0, stop=stop)
    assert batch is not None
    assert [result.rollout.task.task_id for result in batch] == [task.task_id for task in tasks[:2]]
    assert (await streams.depth(StreamName.SCORED)).in_flight == 0
    assert await intake.issue(step=1, version=1) == 2


async def test_a_dead_letter_is_counted_and_replaced() -> None:
    streams, stop = ImpatientStreams(), asyncio.Event()
    intake = make_intake(streams, Clock(), steps=1)
    await intake.issue(step=0, version=0)
    first, second = await issued(streams)
    letter = DeadLetter(task=first, stage="reward", reason="NaN", deliveries=3)
    await streams.publish(StreamName.DEAD, [encode(letter)])
    await streams.publish(StreamName.SCORED, [encode(scored(second))])
    taking = asyncio.create_task(intake.take_batch(step=0, version=0, stop=stop))
    replacement = await next_issued(streams)
    await streams.publish(StreamName.SCORED, [encode(scored(replacement[0]))])
    batch = await taking
    assert batch is not None
    counts = intake.ledger.counts
    assert (counts.issued, counts.trained, counts.dead) == (3, 2, 1)


async def test_a_group_whose_last_member_comes_late_is_replaced_too() -> None:
    """One member dies while its sibling is out: only when the sibling comes is there room for a whole new group."""
    streams, stop = ImpatientStreams(), asyncio.Event()
    intake = make_intake(streams, Clock(), steps=1, samples_per_prompt=2)
    await intake.issue(step=0, version=0)
    first, second = await issued(streams)
    letter = DeadLetter(task=first, stage="reward", reason="NaN", deliveries=3)
    await streams.publish(StreamName.DEAD, [encode(letter)])
    taking = asyncio.create_task(intake.take_batch(step=0, version=0, stop=stop))
    assert await next_issued(streams) == []
    await streams.publish(StreamName.SCORED, [encode(scored(second))])
    again = await next_issued(streams)
    assert len({task.group_id for task in again}) == 1
    await streams.publish(StreamName.SCORED, [encode(scored(task)) for task in again])
    assert len(await taking or []) == 2
    counts = intake.ledger.counts
    assert (counts.issued, counts.trained, counts.dropped) == (4, 2, 2)


async def test_overdue_tasks_are_issued_again_and_a_silent_service_ends_the_run() -> None:
    streams, clock = ImpatientStreams(), Clock(per_reading_s=1.0)
    intake = make_intake(streams, clock)
    await intake.issue(step=0, version=0)
    clock.now_s += 100.0
    with pytest.raises(StallError, match="no rollout was scored for 50 s"):
        await intake.take_batch(step=0, version=0, stop=asyncio.Event())
    assert [task.attempt for task in await issued(streams)] == [0, 0, 1, 1]


async def test_tasks_wait_for_a_server_that_is_away() -> None:
    streams = ImpatientStreams()
    intake = make_intake(streams, Clock())
    streams.failures = 1
    await intake.issue(step=0, version=0)
    assert await issued(streams) == []
    await intake.issue(step=0, version=0)
    assert len(await issued(streams)) == 2


async def test_a_stop_ends_the_wait() -> None:
    stop = asyncio.Event()
    intake = make_intake(ImpatientStreams(), Clock())
    taking = asyncio.create_task(intake.take_batch(step=0, version=0, stop=stop))
    await asyncio.sleep(0)
    stop.set()
    assert await taking is None


async def test_a_held_learner_gets_no_batch_of_that_version_but_results_are_received() -> None:
    streams, stop, clock = ImpatientStreams(), asyncio.Event(), Clock()
    intake = make_intake(streams, clock)
    intake.hold_from = 1
    for version in (0, 1):
        await intake.issue(step=version, version=version)
        tasks = await issued(streams)
        await streams.publish(StreamName.SCORED, [encode(scored(task, version=version)) for task in tasks])
        taking = asyncio.create_task(intake.take_batch(step=version, version=version, stop=stop))
        await next_issued(streams)
        assert taking.done() is (version == 0)
    assert intake.ledger.held == 2
    clock.now_s += 49.0  # Short of the stall time-out, and no stall: nobody is at fault.
    await next_issued(streams)
    assert not taking.done()
    intake.hold_from = None
    assert len(await taking or []) == 2


async def test_a_hold_that_nobody_lifts_ends_with_the_stall_timeout() -> None:
    streams, clock = ImpatientStreams(), Clock(per_reading_s=1.0)
    intake = make_intake(streams, clock)
    intake.hold_from = 0
    await intake.issue(step=0, version=0)
    await streams.publish(StreamName.SCORED, [encode(scored(task)) for task in await issued(streams)])
    assert len(await intake.take_batch(step=0, version=0, stop=asyncio.Event()) or []) == 2
    assert clock.now_s > 50.0
    assert intake.hold_from is None


async def test_stale_samples_are_replaced() -> None:
    streams, stop = ImpatientStreams(), asyncio.Event()
    intake = make_intake(streams, Clock())
    await intake.issue(step=0, version=0)
    old = await issued(streams)
    await streams.publish(StreamName.SCORED, [encode(scored(task, version=3)) for task in old])
    taking = asyncio.create_task(intake.take_batch(step=0, version=5, stop=stop))
    fresh = await next_issued(streams)
    await streams.publish(StreamName.SCORED, [encode(scored(task, version=5)) for task in fresh])
    batch = await taking
    assert batch is not None
    assert intake.ledger.counts.stale_dropped == 2


def test_the_deck_deals_every_prompt_once_a_pass_and_resumes_anywhere() -> None:
    prompts = [DeckPrompt(f"p{number}", (1,), "") for number in range(7)]
    whole = PromptDeck(prompts, seed=3)
    dealt = [whole.deal().prompt_id for _ in range(14)]
    assert sorted(dealt[:7]) == sorted(dealt[7:]) == [f"p{number}" for number in range(7)]
    assert dealt[:7] != dealt[7:]
    resumed = PromptDeck(prompts, seed=3, position=9)
    assert [resumed.deal().prompt_id for _ in range(5)] == dealt[9:]


def dealt(deck: PromptDeck, count: int) -> list[str]:
    return [deck.deal().prompt_id for _ in range(count)]


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 9), moves=st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=8))
def test_a_deck_that_branched_off_still_deals_every_prompt_once_a_pass(
    size: int, moves: list[tuple[bool, int]]
) -> None:
    """Along the line that leads to where it stands; and the same again from its state."""
    prompts = [DeckPrompt(f"p{number}", (1,), "") for number in range(size)]
    deck, line, branch = PromptDeck(prompts, seed=3), list[str](), 0
    kept = [(0, deck.cuts)]
    for back, number in moves:
        if back:
            branch += 1
            kept = kept[: 1 + number % len(kept)]
            position, cuts = kept[-1]
            deck.branch_off(position, branch=branch, cuts=cuts)
            del line[position:]
        else:
            line += dealt(deck, number)
        kept.append((deck.position, deck.cuts))
    resumed = PromptDeck(prompts, seed=3, position=deck.position, cuts=deck.cuts)
    rest = dealt(deck, 3 * size - len(line) % size)
    assert dealt(resumed, len(rest)) == rest
    line += rest
    for begin in range(0, len(line), size):
        assert len(set(line[begin : begin + size])) == size


def test_a_branch_has_an_order_of_its_own_from_the_cursor_on() -> None:
    prompts = [DeckPrompt(f"p{number}", (1,), "") for number in range(40)]
    straight = dealt(PromptDeck(prompts, seed=3), 120)
    decks = []
    for branch in (1, 2):
        deck = PromptDeck(prompts, seed=3)
        dealt(deck, 60)
        deck.branch_off(30, branch=branch, cuts=())
        decks.append(straight[:30] + dealt(deck, 90))
    for part in (slice(30, 40), slice(40, 80), slice(80, 120)):
        assert len({tuple(order[part]) for order in (straight, *decks)}) == 3
        assert len({tuple(sorted(order[part])) for order in (straight, *decks)}) == 1


async def test_tasks_that_were_not_sent_yet_are_abandoned_too() -> None:
    streams = ImpatientStreams()
    intake = make_intake(streams, Clock())
    streams.failures = 1
    await intake.issue(step=0, version=0)
    assert intake.abandon() == 2
    assert await intake.issue(step=0, version=0) == 2
    assert [task.task_id for task in await issued(streams)] == ["a-000000002", "a-000000003"]


class Rejecting(ImpatientStreams):
    """Every answer is too uncertain for the reward service."""

    async def publish(self, stream: StreamName, payloads: Sequence[bytes]) -> None:
        if stream is StreamName.PROMPTS:
            tasks = [decode(payload, PromptTask) for payload in payloads]
            letters = [DeadLetter(task=one, stage="reward", reason="r", deliveries=1, rejected=True) for one in tasks]
            await super().publish(StreamName.DEAD, [encode(letter) for letter in letters])


@pytest.mark.timeout(30)
async def test_a_reward_service_that_rejects_everything_ends_the_run() -> None:
    intake = make_intake(Rejecting(), Clock(per_reading_s=1.0))
    with pytest.raises(StallError, match="rejected as uncertain"):
        await intake.take_batch(step=0, version=0, stop=asyncio.Event())
    assert intake.ledger.counts.rejected > 2
