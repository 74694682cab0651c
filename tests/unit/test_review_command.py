"""`keel review` as a process: over a run that goes on, from a file, and where there is nothing to review."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.data_records import PreferencePair, read_rows
from cluster.errors import ConfigError, DataError, KeelError
from cluster.redis_server import EmbeddedServer
from cluster.review_queue import Judgement, MemoryReviewQueue, ReviewItem
from cluster.run_redis import RunRedis
from configs.load import dump_config
from configs.run import DataSection, FileSource, RedisSection, ReviewSection, RunConfig
from keel.living import redis_url_of
from keel.review_command import PageAddress, review
from keel.review_queue import RunQueue, queue_from, read_pairs

pytestmark = pytest.mark.timeout(120)
TOKEN = "a-token-for-tests"
OWN = {"x-keel-review": "1"}
COMMAND = """
import sys
from pathlib import Path
from keel.review_command import PageAddress, review
run, pairs, token = (Path(given) if given else None for given in sys.argv[1:])
review(run, pairs=pairs, address=PageAddress(port=0, token_file=token), say=lambda line: print(line, flush=True))
"""
ROWS: list[dict[str, Any]] = [
    {"prompt": "why?", "answer_a": "one", "answer_b": "two"},
    {"prompt": "why?", "answer_a": "two", "answer_b": "one"},
    {"prompt": [{"role": "user", "content": "how?"}], "chosen": "yes", "rejected": "no", "confidence": 0.8},
]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "my-run"
    path.mkdir()
    data = DataSection(preferences=FileSource(path=Path("preferences.jsonl")))
    config = RunConfig(name="my-run", runs_dir=tmp_path, data=data, review=ReviewSection(enabled=True))
    (path / "config.yaml").write_text(dump_config(config))
    return path


@contextmanager
def started(run_dir: Path | None, pairs: Path | None, directory: Path) -> Iterator[tuple[httpx.Client, list[str]]]:
    """The command in a process, somebody logged in, and what was printed until it served. Ends by SIGINT, with 0."""
    (directory / "token").write_text(TOKEN + "\n")
    arguments = [str(run_dir or ""), str(pairs or ""), str(directory / "token")]
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line.rstrip())
            if "judgements so far" in line:
                break
        found = re.search(r"review page: (http://\S+/)$", "\n".join(lines), flags=re.MULTILINE)
        assert found, lines
        # The socket listens before the page does, so a request waits for it.
        with httpx.Client(base_url=found[1], headers=OWN, timeout=30.0) as http:
            answer = http.post("/api/login", json={"token": TOKEN, "annotator": "ann"})
            assert answer.status_code == 200, answer.text
            yield http, lines
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 0, output
        assert "stopped. What people said is in" in output
        assert "Traceback" not in output
    finally:
        process.kill()
        process.wait()


def judge_next(http: httpx.Client) -> str:
    """Say that what is shown first is better; returns it."""
    item = http.post("/api/next", json={"kinds": ["pair"]}).json()["item"]
    said = {"item_id": item["item_id"], "verdict": "left", "judgement_id": secrets.token_hex(8)}
    assert http.post("/api/judge", json=said).json()["stored"]
    return str(item["answers"][0])


def test_pairs_of_a_file_are_reviewed_without_a_run_and_gone_on_with(tmp_path: Path) -> None:
    pairs = write_lines(tmp_path / "pairs.jsonl", ROWS)
    with started(None, pairs, tmp_path) as (http, lines):
        assert "2 pairs waiting, 0 judgements so far." in lines, "the same pair in the other order is one"
        assert TOKEN not in "".join(lines)
        first = judge_next(http)
    with started(None, pairs, tmp_path) as (http, lines):
        assert "1 pairs waiting, 1 judgements so far." in lines
        second = judge_next(http)
        assert http.post("/api/next", json={"kinds": ["pair"]}).json()["item"] is None
        assert http.post("/api/undo", json={}).json()["undone"]
        judge_next(http)
    stored = read_rows(tmp_path / "pairs.jsonl.review" / "preferences.jsonl", PreferencePair)
    assert [pair.chosen for pair in stored] == [first, second]
    assert {pair.annotators for pair in stored} == {("ann",)}
    assert len((tmp_path / "pairs.jsonl.review" / "reviews.jsonl").read_text().splitlines()) == 4


async def push(url: str, *items: ReviewItem) -> None:
    async with RunRedis(url, run="my-run") as redis:
        assert await redis.review.push(items, limit=10) == len(items)


async def count(url: str) -> int:
    async with RunRedis(url, run="my-run") as redis:
        return len(await redis.review.judgements())


def test_a_run_that_goes_on_is_reviewed(run_dir: Path, tmp_path: Path) -> None:
    item = ReviewItem(item_id="a", kind="pair", prompt="why?", answers=("one", "two"))
    with EmbeddedServer(run_dir / "redis") as server:
        asyncio.run(push(server.url, item))
        with started(run_dir, None, tmp_path) as (http, lines):
            assert "1 pairs waiting, 0 judgements so far." in lines
            chosen = judge_next(http)
            asyncio.run(push(server.url, ReviewItem(item_id="b", kind="pair", prompt="q", answers=("x", "y"))))
            judge_next(http)
        assert asyncio.run(count(server.url)) == 2
    stored = read_rows(run_dir / "preferences.jsonl", PreferencePair)
    assert (stored[0].chosen, len(stored)) == (chosen, 2)


def test_a_run_that_stops_and_is_resumed_is_found_again(run_dir: Path) -> None:
    found: list[int] = []

    async def go() -> None:
        queue = RunQueue(run_dir, config, on_connect=lambda: found.append(1))
        with EmbeddedServer(run_dir / "redis"):
            await queue.open()
            await queue.push([ReviewItem(item_id="a", kind="pair", prompt="q", answers=("x", "y"))], limit=1)
            await queue.judge(Judgement(item_id="a", annotator="ann", verdict="first"))
        with pytest.raises(KeelError):
            await queue.judgements()
        with pytest.raises(ConfigError, match="does not run on this machine"):
            await queue.judgements()
        with EmbeddedServer(run_dir / "redis"):
            assert len(await queue.judgements()) == 1
            assert (await queue.progress()).judged["pair"] == 1
            await queue.close()

    config = RunConfig(name="my-run", data=DataSection(), redis=RedisSection(command_timeout_s=1.0))
    asyncio.run(go())
    assert len(found) == 2
    with pytest.raises(ConfigError):
        redis_url_of(run_dir, config)


def test_nothing_to_review_is_said(run_dir: Path, tmp_path: Path) -> None:
    address = PageAddress(port=0)
    with pytest.raises(ConfigError, match="nothing to review: my-run has no queue"):
        review(run_dir, address=address, say=lambda _: None)
    with pytest.raises(ConfigError, match="nothing to review"):
        review(None, address=address)
    with pytest.raises(ConfigError, match="not a run directory"):
        review(tmp_path / "none", address=address)


def test_a_run_that_has_ended_and_a_file(run_dir: Path, tmp_path: Path) -> None:
    pairs = write_lines(tmp_path / "pairs.jsonl", ROWS)
    with started(run_dir, pairs, tmp_path) as (http, lines):
        assert "my-run does not go on: only the pairs of the file are reviewed" in lines
        judge_next(http)
    assert len(read_rows(run_dir / "preferences.jsonl", PreferencePair)) == 1


def test_what_cannot_be_served_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = write_lines(tmp_path / "pairs.jsonl", ROWS)
    with pytest.raises(ConfigError, match="cannot serve the review page"):
        review(None, pairs=pairs, address=PageAddress(host="192.0.2.1", port=0), say=lambda _: None)
    with pytest.raises(ConfigError, match="cannot read"):
        review(None, pairs=pairs, address=PageAddress(port=0, token_file=tmp_path / "none"))
    for host, port in (("127.0.0.1", 70_000), ("\0", 0)):
        with pytest.raises(ConfigError, match="cannot serve"):
            review(None, pairs=pairs, address=PageAddress(host, port))
    (tmp_path / "token").write_text("short")
    with pytest.raises(ConfigError, match="too short"):
        review(None, pairs=pairs, address=PageAddress(port=0, token_file=tmp_path / "token"))
    monkeypatch.setenv("KEEL_REVIEW_TOKEN", "short too")
    with pytest.raises(ConfigError, match="too short"):
        review(None, pairs=pairs, address=PageAddress(port=0))


def test_pairs_are_read_from_lines_zipped_lines_and_with_clear_errors(tmp_path: Path) -> None:
    items = read_pairs(write_lines(tmp_path / "pairs.jsonl", ROWS))
    assert [item.answers for item in items] == [("one", "two"), ("yes", "no")]
    zipped = tmp_path / "pairs.jsonl.gz"
    zipped.write_bytes(gzip.compress((tmp_path / "pairs.jsonl").read_bytes()))
    assert [item.item_id for item in read_pairs(zipped)] == [item.item_id for item in items]
    bad: list[dict[str, Any]] = [
        {"prompt": "p", "answer_a": "x"},
        {"answer_a": "x", "answer_b": "y"},
        {**ROWS[0], "prompt": 3},
        {**ROWS[0], "prompt": [{"text": "not content"}]},  # the page would show nothing, or break
        {**ROWS[0], "answer_a": "\ud83d"},
    ]
    for row in bad:
        path = write_lines(tmp_path / "bad.jsonl", [ROWS[0], row])
        with pytest.raises(DataError, match=r"bad\.jsonl:2"):
            read_pairs(path)


async def test_a_queue_goes_on_where_a_log_ended() -> None:
    before = MemoryReviewQueue()
    items = [ReviewItem(item_id=name, kind="pair", prompt="q", answers=("x", "y")) for name in "abc"]
    await before.push(items, limit=10)
    for name in "ab":
        await before.judge(Judgement(item_id=name, annotator="ann", verdict="first"))
    await before.undo("ann", lease_s=1.0)
    after = await queue_from(await before.judgements(), votes=1)
    assert await after.push(items, limit=10) == 1
    assert (await after.progress()).by_annotator == {"ann": 1}
    assert {(await after.next(who, lease_s=9.0) or items[0]).item_id for who in ("ann", "bob")} == {"b", "c"}
