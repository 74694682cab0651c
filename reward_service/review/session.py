"""Who may use the review page: one token for all, and a signed cookie that holds an annotator's name.

Consumes and produces: texts; no waiting. Always holds: the token is compared in constant time and is in no cookie; a
cookie is worth nothing under another token or after SESSION_S.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
import unicodedata
from collections import deque
from dataclasses import dataclass
from typing import Final

from cluster.errors import ConfigError
from cluster.stores import Clock

SESSION_S: Final = 7 * 24 * 3600.0
MIN_TOKEN: Final = 12
"""Characters; a token that people choose is guessed at."""
MAX_NAME: Final = 40
_GUESSES: Final = 10
_GUESSES_S: Final = 60.0


def annotator_name(given: str) -> str | None:
    """The name as it is stored: one form of each letter, single spaces. None where it is empty, too long or holds
    anything that cannot be seen."""
    name = " ".join(unicodedata.normalize("NFC", given).split())
    return name if 0 < len(name) <= MAX_NAME and name.isprintable() else None


@dataclass(frozen=True)
class Access:
    """Raises ConfigError for a token that is too short."""

    token: str
    clock: Clock = time.time
    """Seconds since the epoch."""

    def __post_init__(self) -> None:
        if len(self.token) < MIN_TOKEN:
            raise ConfigError(
                "the token of the review page is too short",
                got=f"{len(self.token)} characters",
                do=f"write at least {MIN_TOKEN} into the file, or leave it out for a random one",
            )

    def __repr__(self) -> str:
        return "Access(token=***)"

    def matches(self, given: str) -> bool:
        return hmac.compare_digest(_digest(given), _digest(self.token))

    def cookie_for(self, annotator: str) -> str:
        name = base64.urlsafe_b64encode(annotator.encode()).decode().rstrip("=")
        text = f"{name}.{int(self.clock() + SESSION_S)}"
        return f"{text}.{self._sign(text)}"

    def annotator_of(self, cookie: str) -> str | None:
        """None for a cookie that is not ours, or has expired."""
        text, _, signature = cookie.rpartition(".")
        if not hmac.compare_digest(self._sign(text).encode(), signature.encode("utf-8", "replace")):
            return None
        name, _, until_s = text.partition(".")
        if int(until_s) < self.clock():
            return None
        return base64.urlsafe_b64decode(name + "=" * (-len(name) % 4)).decode()

    def _sign(self, text: str) -> str:
        return hmac.new(_digest(f"session {self.token}"), text.encode("utf-8", "replace"), hashlib.sha256).hexdigest()


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


class Guesses:
    """Wrong tokens: after ten in a minute nobody is let in until some of them are a minute old. For all callers
    together, since an address behind a proxy says nothing."""

    def __init__(self, *, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._wrong: deque[float] = deque(maxlen=_GUESSES)

    @property
    def too_many(self) -> bool:
        return len(self._wrong) == _GUESSES and self._clock() - self._wrong[0] < _GUESSES_S

    def wrong(self) -> None:
        self._wrong.append(self._clock())


def is_swapped(item_id: str, annotator: str) -> bool:
    """Whether this annotator sees the second answer of a pair first. As good as random over pairs and people, and the
    same after a reload, so that a verdict on what was shown can be mapped back."""
    return bool(_digest(f"{item_id}\0{annotator}")[0] & 1)
