"""The driver's part of what the guard does: alerts to people, the reward model's refreshes, and which of its versions
scores after a rollback.

Consumes: guard.jsonl, as the learner writes it. Produces: log lines, progress notes, POSTs to guard.webhook, requests
to the refresher, announcements of reward-model versions. Waits: never; `step` is called from the driver's watch loop.
Always holds: what was written before this driver came is not done again, but for a freeze that lasts; nothing that goes
wrong here ends the run.

The webhook gets each action, alerts among them, as its line of guard.jsonl with two more fields:

    {"text": "keel RUN: …", "run": NAME, "time_s", "step", "version", "branch", "event": "action", "action": "alert", …}

`text` says it in one sentence; chat services that take {"text": …} show it as it is.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from cluster.errors import ModelError
from cluster.files import Json, JsonlTail
from cluster.reward_models import RewardModels, model_of
from configs.run import RunConfig
from keel.online.webhook import Webhook
from keel.rundir import append_progress
from keel.runtime import Runtime
from learner.guard.journal import GUARD_FILE

log = logging.getLogger(__name__)

_HEAD: Final = frozenset({"time_s", "step", "version", "branch", "event", "action", "signals", "why"})


class RefreshControl(Protocol):
    """What is asked of keel.online.refresh.Refresher."""

    def freeze_until(self, version: int) -> None: ...

    def ask(self, reason: str) -> None: ...


class GuardActions:
    """One a driver, made before the learner begins its steps. `announce`: called with (reward-model version, reason)
    when another version is to score; None `refresher` where nothing is refreshed."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        announce: Callable[[str, str], None],
        refresher: RefreshControl | None,
        webhook: Webhook | None = None,
    ) -> None:
        self.counts: Counter[str] = Counter()
        """By the action's name: seen since the start of this driver."""
        self.webhook = webhook or _webhook(runtime.config)
        self._runtime = runtime
        self._announce = announce
        self._refresher = refresher
        self._models = RewardModels(runtime.run.path / "rm")
        self._events = JsonlTail(runtime.run.path / GUARD_FILE)
        for event in self._events.read():
            if event.get("action") == "freeze_rm":
                self._freeze(event)

    def step(self, records: Sequence[Json] = ()) -> None:
        """One turn. `records`: steps of the learner that ended since the last; not needed here."""
        for event in self._events.read():
            if event.get("event") == "action":
                self._act(event)
            else:
                log.info("guard: %s at step %s: %s", event.get("event"), event.get("step"), event.get("why") or "-")

    @property
    def posts(self) -> Mapping[str, int]:
        """To the webhook, since the start of this driver: sent, failed."""
        return {} if self.webhook is None else self.webhook.counts

    def close(self) -> None:
        """Alerts that wait get a last try, for a short time."""
        if self.webhook is not None:
            self.webhook.close()

    def _act(self, event: Json) -> None:
        name, text = str(event.get("action")), sentence(event)
        self.counts[name] += 1
        log.warning("guard: %s", text)
        append_progress(self._runtime.run.path, {"role": "guard", "event": name, "note": text})
        if self.webhook is not None:
            run = self._runtime.config.name
            self.webhook.post({"text": f"keel {run}: {text}", "run": run, **event})
        match name:
            case "freeze_rm":
                self._freeze(event)
            case "refresh_rm" if self._refresher is not None:
                self._refresher.ask(str(event.get("reason")))
            case "roll_back":
                self._restore_scorer(event)

    def _freeze(self, event: Json) -> None:
        until = event.get("until_version")
        if self._refresher is not None and isinstance(until, int):
            self._refresher.freeze_until(until)

    def _restore_scorer(self, event: Json) -> None:
        """The reward model of the checkpoint scores again."""
        named = event.get("rm_version")
        version = model_of(named) if isinstance(named, str) else None
        if version is None:
            return
        try:
            if self._models.current().version == version:
                return
            self._models.make_current(version)
        except (ModelError, OSError) as error:
            log.exception("the reward model of the checkpoint cannot score again")
            self._note("failed", f"the reward model stays: {error}")
            return
        self._announce(version, f"rollback to step {event.get('to_step')}")
        self._note("restored", f"the reward model is {version} again, that of step {event.get('to_step')}")

    def _note(self, event: str, text: str) -> None:
        append_progress(self._runtime.run.path, {"role": "refresh", "event": event, "note": text})


def sentence(event: Mapping[str, object]) -> str:
    """An action's line of guard.jsonl, for people.

    >>> sentence({"action": "raise_beta", "step": 40, "factor": 2.0, "floor": 0.05, "beta": 0.1, "why": "…"})
    'raise_beta at step 40 (factor 2, floor 0.05, beta 0.1): …'
    """
    why = str(event.get("why") or event.get("reason") or "")
    if event.get("action") == "alert":
        return why
    own = [f"{key} {_shown(value)}" for key, value in event.items() if key not in _HEAD and key != "reason"]
    fields = f" ({', '.join(own)})" if own else ""
    reason = str(event.get("reason") or why)
    return f"{event.get('action')} at step {event.get('step')}{fields}: {reason}"


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _webhook(config: RunConfig) -> Webhook | None:
    url = config.guard.webhook
    return None if url is None else Webhook(url, timeout_s=config.guard.webhook_timeout_s)
