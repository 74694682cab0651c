"""A reward model behind HTTP, in the JSON form that OpenRLHF's and many others' reward servers speak.

    POST url   {"query": [prompt + answer…], "prompts": [prompt…], "labels": [""…]}
    200        {"rewards": [number…]}          each may also stand in a list of its own, [[0.3], [-1.2]]

Consumes: samples as text. Produces: a reward each, in order, or a ScoringError. Waits for: the server, at most
`timeout_s` a try, and a growing pause between tries. Who unblocks it: the server, or the limits.
Always holds: an answer that does not fit the question is an error for all whom it was asked for, never 0; while the
breaker is open nothing is asked, and each sample's outcome is SourceDownError.

Tried again: no connection, time-outs, status 408, 425, 429 and 5xx. Not: other statuses and malformed answers. All but
400, 413 and 422, which speak of the samples sent, count as failures of the service.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

from cluster.errors import ConfigError, ScoringError
from configs.reward import HttpReward
from reward_service.rewards.breaker import Breaker
from reward_service.rewards.sources import SourceDownError, TextSample, number, public_url, shortened

_AT_A_TIME: Final = 4
"""Requests."""
_BACKOFF_S: Final = (0.25, 8.0)
"""First and longest pause between tries; each is drawn between half and all of it."""
_URL: Final = "write http://host:port/get_reward"
_TRANSIENT: Final = frozenset({408, 425, 429})
_OF_THE_SAMPLES: Final = frozenset({400, 413, 422})


@dataclass(frozen=True)
class HttpTime:
    """Time and chance as the source sees them; tests replace them."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    rng: random.Random = field(default_factory=random.Random)


class _Retry(Exception):
    """This try failed; another may succeed."""


class HttpSource:
    """`token`: sent as a bearer token. Raises ConfigError for a URL that is not http or https."""

    def __init__(
        self, config: HttpReward, *, name: str, token: str | None = None, time: HttpTime | None = None
    ) -> None:
        self.name = name
        self._config = config
        self._time = time or HttpTime()
        self._shown = public_url(config.url)
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._client: httpx.AsyncClient | None = None
        self._turns = asyncio.Semaphore(_AT_A_TIME)
        self.breaker = Breaker(failures=config.breaker_failures, pause_s=config.breaker_pause_s, now=self._time.now)
        self._problem = "it kept failing"
        """Of the last try that failed."""
        _check_url(config.url)
        # It logs each request with its whole URL, in which there may be a password or a key.
        logging.getLogger("httpx").setLevel(logging.WARNING)

    async def rewards(self, samples: Sequence[TextSample]) -> list[float | ScoringError]:
        size = self._config.batch_size
        pieces = [samples[start : start + size] for start in range(0, len(samples), size)]
        answers = await asyncio.gather(*(self._piece(piece) for piece in pieces))
        return [outcome for answer in answers for outcome in answer]

    async def aclose(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def _piece(self, samples: Sequence[TextSample]) -> list[float | ScoringError]:
        """One request's samples: all fail together, apart from single values that are no numbers."""
        try:
            async with self._turns:
                return await self._asked(samples)
        except ScoringError as error:
            return [error] * len(samples)

    async def _asked(self, samples: Sequence[TextSample]) -> list[float | ScoringError]:
        pause_s, longest_s = _BACKOFF_S
        for tries_left in range(self._config.retries, -1, -1):
            if not self.breaker.admits():
                raise self._away(f"{self._problem}; not asked for another {self.breaker.opens_in_s:.1f} s")
            try:
                return await self._once(samples)
            except _Retry as problem:
                self._problem = str(problem)
                if not tries_left:
                    raise self._away(self._problem) from problem
            await self._time.sleep(pause_s * self._time.rng.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, longest_s)
        raise AssertionError("unreachable")

    async def _once(self, samples: Sequence[TextSample]) -> list[float | ScoringError]:
        """One request; the breaker hears how it went. Raises _Retry; ScoringError where another try is of no use."""
        tell = self.breaker.abandoned  # cancelled on the way
        try:
            response = await self._post(samples)
            tell = self.breaker.abandoned if response.status_code in _OF_THE_SAMPLES else self.breaker.failed
            values = self._values(response, count=len(samples))
            tell = self.breaker.succeeded
        except _Retry:
            tell = self.breaker.failed
            raise
        finally:
            tell()
        return values

    async def _post(self, samples: Sequence[TextSample]) -> httpx.Response:
        body = {
            "query": [sample.prompt + sample.answer for sample in samples],
            "prompts": [sample.prompt for sample in samples],
            "labels": ["" for _ in samples],
        }
        client = self._client = self._client or httpx.AsyncClient(headers=self._headers)
        try:
            # The limit is on the whole exchange: httpx's own starts anew with every byte.
            async with asyncio.timeout(self._config.timeout_s):
                return await client.post(self._config.url, json=body, timeout=self._config.timeout_s)
        except (TimeoutError, httpx.TimeoutException) as error:
            raise _Retry(f"no answer within {self._config.timeout_s:g} s") from error
        except httpx.HTTPError as error:
            raise _Retry(repr(error)) from error

    def _values(self, response: httpx.Response, *, count: int) -> list[float | ScoringError]:
        status = response.status_code
        if status in _TRANSIENT or status >= 500:
            raise _Retry(f"status {status}: {shortened(response.text)}")
        if status != 200:
            raise self._refused(f"status {status}: {shortened(response.text)}")
        try:
            answer = response.json()
        except ValueError as error:
            raise self._refused(f"no JSON: {shortened(response.text)}") from error
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list):
            raise self._refused(f"no list `rewards`: {shortened(answer)}")
        if len(rewards) != count:
            raise self._refused(f"{len(rewards)} rewards for {count} samples")
        return [self._value(reward) for reward in rewards]

    def _value(self, reward: Any) -> float | ScoringError:
        if isinstance(reward, list) and len(reward) == 1:
            reward = reward[0]
        if isinstance(reward, bool):
            return self._refused(f"{reward} in place of a number")
        return number(reward, source=f"reward server {self._shown}")

    def _away(self, problem: str) -> SourceDownError:
        return SourceDownError(
            f"the reward server {self._shown} is away",
            got=problem,
            do="see to it; the samples come again meanwhile",
        )

    def _refused(self, problem: str) -> ScoringError:
        return ScoringError(
            f"the reward server {self._shown} gave no usable answer",
            got=problem,
            do='it must answer {"rewards": [number…]}, one for each text of "query"',
        )


def _check_url(url: str) -> None:
    """Raises ConfigError."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigError("reward.sources: no url", got=f"{public_url(url)}: {error}", do=_URL) from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError("reward.sources: no url of a server", got=public_url(url), do=_URL)
