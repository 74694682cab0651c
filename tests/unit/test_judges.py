"""Labels for fresh pairs, from a function and from people."""

from __future__ import annotations

import asyncio
import random

import pytest

from cluster.data_records import Prompt
from cluster.errors import ConfigError, StreamError
from cluster.review_queue import Judgement, MemoryReviewQueue, Recorded, Verdict
from configs.load import load_config
from keel.online import judges
from keel.online.judges import NO_PREFERENCE, NOT_JUDGED, FunctionJudge, People, ask_people, make_judge
from reward_service.preferences import EMPTY, IDENTICAL, LOW_CONFIDENCE, Candidate, Collected

REFRESH = "rm.refresh={every_versions: 4}"


def longer(prompt: Prompt, a: str, b: str, rng: random.Random) -> dict[str, bool]:
    return {"one": len(a) > len(b), "two": len(a) > len(b), "three": False}


def candidates() -> list[Candidate]:
    return [
        Candidate("p", "long answer", "short", version_a=7, version_b=3),
        Candidate("p", "same", "same"),
        Candidate("p", "x", "much longer", version_a=7, version_b=7),
        Candidate("p", "", "something"),
    ]


def test_a_function_labels_with_versions_and_annotators() -> None:
    collected = FunctionJudge(longer).label(candidates(), name="refresh-0003", seed=1)
    first, second = collected.pairs
    assert collected.places == [0, 2]
    assert (first.pair_id, first.chosen, first.policy_version, first.rejected_version) == (
        "refresh-0003-0000000", "long answer", 7, 3,
    )  # fmt: skip
    assert (second.chosen, second.policy_version, second.rejected_version) == ("much longer", 7, None)
    assert second.annotators == ("one", "two", "three")
    assert collected.report.rejected == {IDENTICAL: 1, EMPTY: 1}


async def people(verdicts: dict[str, list[Verdict]], *, timeout_s: float = 30.0, votes: int = 1) -> Collected:
    """What comes of it when each annotator gives these verdicts, in the order in which the items come."""
    queue = MemoryReviewQueue()
    asked = asyncio.create_task(ask_people(queue, candidates(), name="refresh-0001", votes=votes, timeout_s=timeout_s))
    await asyncio.sleep(0)
    for annotator, given in verdicts.items():
        for verdict in given:
            item = await queue.next(annotator, lease_s=60.0, votes=votes)
            assert item is not None
            assert item.kind == "pair"
            judgement = Judgement(item_id=item.item_id, annotator=annotator, verdict=verdict)
            assert await queue.judge(judgement, votes=votes)
    return await asked


async def test_people_label_and_usable_pairs_alone_are_put_before_them() -> None:
    collected = await people({"ann": ["second", "second"]})
    assert [(pair.pair_id, pair.chosen, pair.annotators) for pair in collected.pairs] == [
        ("refresh-0001-0000000", "short", ("ann",)),
        ("refresh-0001-0000002", "much longer", ("ann",)),
    ]
    assert [pair.source for pair in collected.pairs] == ["review", "review"]
    assert (collected.pairs[0].policy_version, collected.pairs[0].rejected_version) == (3, 7)
    assert collected.report.rejected == {IDENTICAL: 1, EMPTY: 1}
    assert collected.places == [0, 2]


async def test_ties_and_disagreement_are_counted_not_used() -> None:
    collected = await people({"ann": ["tie", "first"], "bob": ["skip", "second"]}, votes=2)
    assert collected.pairs == []
    assert collected.report.rejected == {IDENTICAL: 1, EMPTY: 1, NO_PREFERENCE: 1, LOW_CONFIDENCE: 1}


async def test_when_the_time_is_up_what_was_judged_has_to_do() -> None:
    collected = await people({"ann": ["first"]}, timeout_s=0.0)
    assert len(collected.pairs) + collected.report.rejected.get(NOT_JUDGED, 0) == 2
    assert collected.report.rejected.get(NOT_JUDGED, 0) >= 1


class Blinking(MemoryReviewQueue):
    """A server that is away at the first reading; Ann judges a pair before each other one."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[int] = []

    async def judgements(self, *, after: int = 0) -> list[Recorded]:
        self.reads.append(after)
        if len(self.reads) == 1:
            raise StreamError("away")
        item = await self.next("ann", lease_s=60.0)
        assert item is not None
        await self.judge(Judgement(item_id=item.item_id, annotator="ann", verdict="first"))
        return await super().judgements(after=after)


async def test_a_server_that_is_away_is_asked_again_and_what_was_read_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges, "_POLL_S", 0.0)
    queue = Blinking()
    collected = await ask_people(queue, candidates(), name="refresh-0001", votes=1, timeout_s=30.0)
    assert len(collected.pairs) == 2
    assert queue.reads == [0, 0, 1]


def test_who_judges_is_configured() -> None:
    demo = load_config("demo_ci", overrides=[REFRESH])
    assert isinstance(make_judge(demo, redis_url="redis://x"), FunctionJudge)
    reviewed = load_config("demo_ci", overrides=[REFRESH, "rm.refresh.judge=review"])
    assert isinstance(make_judge(reviewed, redis_url="redis://x"), People)
    missing = load_config("demo_ci", overrides=[REFRESH, "rm.refresh.judge=no.such.module:judge"])
    with pytest.raises(ConfigError, match=r"rm\.refresh\.judge"):
        make_judge(missing, redis_url="redis://x")
