"""Every Redis key of a run, with its type and lifetime.

All keys share the prefix `keel:{<run>}:`. The braces are literal: they are a Redis Cluster hash tag, so that one run
lives in one slot and a Lua script may touch several of its keys.

| key                                    | type   | lifetime                                                         |
|----------------------------------------|--------|------------------------------------------------------------------|
| keel:{run}:stream:prompts              | stream | the run; an entry until a rollout replaces it                    |
| keel:{run}:stream:rollouts             | stream | the run; an entry until its score replaces it                    |
| keel:{run}:stream:scored               | stream | the run; an entry until the learner settles it                   |
| keel:{run}:stream:dead                 | stream | the run; an entry until the learner has counted it               |
| keel:{run}:token:<id>                  | string | TOKEN_TTL_S; answer of a call already made, for re-sent calls    |
| keel:{run}:score:<rm_version>:<digest> | string | reward.cache_ttl_s                                               |
| keel:{run}:targets                     | hash   | the longest time to live of its members                          |
| keel:{run}:lock                        | string | the lock's time to live; owner and token                         |
| keel:{run}:learner:<group>             | string | the collective time-out; deleted when all ranks have met         |
| keel:{run}:control                     | hash   | until the next driver of the run clears it; request and report   |
| keel:{run}:rm                          | string | the run; the newest announcement of a reward model               |
| keel:{run}:review:items                | hash   | the run; every item ever queued for people, by its id            |
| keel:{run}:review:waiting:<kind>       | zset   | the run; ids of items that wait, in the order of their coming    |
| keel:{run}:review:votes, leases        | hashes | the run; item → who judged it; item → who has it, and until when |
| keel:{run}:review:held                 | hash   | the run; annotator → the item before them                        |
| keel:{run}:review:log                  | list   | the run; every judgement, in order                               |
| keel:{run}:review:seen                 | hash   | the run; ids of judgements in the log                            |
| keel:{run}:review:done:<annotator>     | list   | the run; what this annotator judged and can take back            |

Each stream has one consumer group, GROUP, created from id 0. Streams carry no MAXLEN: it would drop entries that
nobody has read; the staleness gate bounds them.
"""

from __future__ import annotations

import re
from typing import Final

from cluster.errors import ConfigError
from cluster.streams import StreamName

GROUP: Final = "keel"
"""The consumer group of every stream."""

PAYLOAD_FIELD: Final = "p"
"""The one field of a stream entry."""

TOKEN_TTL_S: Final = 120.0
"""How long a call's answer is remembered. Re-sent copies of a call queue up at a stalled server and run back to back
when it resumes, so this only has to cover the client's own retries."""

_RUN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class Keys:
    """The key names of one run. Raises ConfigError for a run name that could break the hash tag or an ACL pattern."""

    def __init__(self, run: str) -> None:
        if not _RUN.fullmatch(run):
            raise ConfigError(
                "a run name must be letters, digits, '.', '_' or '-', at most 63, starting with a letter or digit",
                got=repr(run),
                do="choose another `name`",
            )
        self.run: Final = run
        self.prefix: Final = f"keel:{{{run}}}:"

    @property
    def targets(self) -> str:
        return self.prefix + "targets"

    @property
    def lock(self) -> str:
        return self.prefix + "lock"

    def learner(self, group: int) -> str:
        """Where the first rank of this incarnation of the learner is."""
        return f"{self.prefix}learner:{group}"

    @property
    def control(self) -> str:
        return self.prefix + "control"

    @property
    def reward_model(self) -> str:
        return self.prefix + "rm"

    def review(self, part: str) -> str:
        """Of the review queue; parts as in the table above."""
        return f"{self.prefix}review:{part}"

    def stream(self, name: StreamName) -> str:
        return f"{self.prefix}stream:{name.value}"

    def token(self, token: str) -> str:
        return f"{self.prefix}token:{token}"

    def score(self, key: str) -> str:
        """`key` as made by `score_key`."""
        return f"{self.prefix}score:{key}"


def score_key(rm_version: str, digest: str) -> str:
    """What a ScoreStore is asked for: a score belongs to one reward-model version and one content digest."""
    return f"{rm_version}:{digest}"
