"""The ppo stage: rollout actors, reward workers and the learner, brought up, watched, and wound down."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from cluster.errors import KeelError
from cluster.files import Json, JsonlTail, atomic_write_text, read_jsonl
from cluster.reward_models import RewardModels, model_of
from cluster.supervise import RolePool
from keel.evaluate import evaluate_policy
from keel.interrupt import InterruptedRun
from keel.living import config_of
from keel.online.guard_actions import GuardActions
from keel.online.overseer import Overseer
from keel.online.refresh import make_refresher
from keel.online.scaler import ActorIdleness, Scaler
from keel.online.watch import make_watch
from keel.roles import Roles
from keel.runtime import Runtime
from keel.trackers import Trackers, open_trackers
from learner.guard.journal import GUARD_FILE

log = logging.getLogger(__name__)

_STATUS_TIMEOUT_S = 5.0


class HaltedRun(KeelError):
    """The guard has ended the run; its checkpoints are kept."""


def run_online(runtime: Runtime, roles: Roles) -> None:
    """Run PPO to its end. On a stop request the learner finishes its step and saves; raises InterruptedRun then, and
    HaltedRun when the guard gives the run up."""
    config = runtime.config
    # As it lies on disk: a tracker may be another's server, and redis.url may hold a password.
    shown = config_of(runtime.run.path).model_dump(mode="json")
    trackers = open_trackers(config.metrics.trackers, run_dir=runtime.run.path, config=shown)
    runtime.on_exit(trackers.close)
    runtime.run.emit(stage="ppo", event="progress", note="starting roles")
    started_s = time.monotonic()
    sft_model = runtime.run.path / "sft" / "model"
    # Room for the learner first: Ray gives a single process the emptiest node, which is the one that the ranks fit on
    # together, and would then spread them over what is left.
    assert roles.channel is not None  # There before the roles that use it, and so closed after them.
    learner = roles.learner()
    learner.wait_placed(runtime.tick)
    rollout, reward = roles.rollout(sft_model), roles.reward()
    for pool in (rollout, reward):
        pool.wait_placed(runtime.tick)
    for pool in (rollout, reward):
        pool.wait_ready(runtime.tick)
    if not (runtime.run.path / "eval" / "sft.json").exists():
        evaluate_policy(runtime, roles, tag="sft", model_dir=sft_model)
    info = learner.wait_ready(runtime.tick)[0]
    scaler = _make_scaler(runtime, roles)
    with ExitStack() as stack:
        url, pools = runtime.redis_url, lambda: roles.running
        overseer = Overseer(config, run_dir=runtime.run.path, redis_url=url, pools=pools, scaler=scaler)
        stack.enter_context(overseer)
        _announce_scorer(runtime, overseer, found=info.get("rm_version"))
        followers = [scaler.step]
        refresher = make_refresher(runtime, roles, announced=overseer.announce)
        if refresher is not None:
            stack.callback(refresher.close)
            overseer.refreshes = refresher.counts
            followers.append(refresher.step)
        guard = GuardActions(runtime, announce=overseer.announce, refresher=refresher)
        stack.callback(guard.close)
        if guard.webhook is not None:
            overseer.posts = guard.webhook.counts
        followers.append(guard.step)
        if (watch := make_watch(runtime, roles)) is not None:
            stack.callback(watch.close)
            overseer.measurements = watch.counts
            followers.append(watch.step)
        runtime.run.emit(stage="ppo", event="progress", note=f"Prometheus targets: {overseer.discovery_url}")
        for pool in (rollout, reward, learner):
            pool.run()
        _watch(runtime, roles, overseer=overseer, trackers=trackers, followers=followers, started_s=started_s)
        guard.step()  # What the learner did last.
    ending = learner.results[0]
    roles.stop("learner")
    log.info("learner: from step %s, ended: %s", info.get("step"), ending)
    if ending == "stopped":
        raise InterruptedRun("stopped on request; a checkpoint is saved", do="go on with keel train CONFIG --resume")
    if ending == "halted":
        raise _halted(runtime)


def _halted(runtime: Runtime) -> HaltedRun:
    path = runtime.run.path
    events = read_jsonl(path / GUARD_FILE) if (path / GUARD_FILE).exists() else []
    reasons = [str(event.get("reason")) for event in events if event.get("action") == "halt"]
    return HaltedRun(
        "the guard has halted the run; a checkpoint is saved",
        got=reasons[-1] if reasons else "no reason on record",
        do=f"see `keel diagnose {path}` for why; change what it names (guard, learner, reward, rm or rollout), then "
        "--resume: it goes on from the last good checkpoint. With the same settings it halts again",
    )


def _make_scaler(runtime: Runtime, roles: Roles) -> Scaler:
    pool = roles.rollout(runtime.run.path)
    return Scaler(
        pool,
        config=runtime.config,
        idle_of_actors=ActorIdleness(lambda: pool.handles, ray=runtime.ray),
        note=lambda event, text: roles.note("rollout", event=event, text=text),
    )


def _announce_scorer(runtime: Runtime, overseer: Overseer, *, found: str | None) -> None:
    """Tell the reward workers which version scores: that of the learner's checkpoint, where it resumes one. Newer ones
    stay in the registry."""
    models = RewardModels(runtime.run.path / "rm")
    if not models.exists():
        return
    version, resumed = models.current().version, model_of(found)
    if resumed is not None and resumed != version:
        version = resumed
        models.make_current(version)
        note = f"the reward model is {version} again, that of the checkpoint"
        runtime.run.emit(role="refresh", event="restored", note=note)
    overseer.announce(version, "start of the run")


def _watch(
    runtime: Runtime,
    roles: Roles,
    *,
    overseer: Overseer,
    trackers: Trackers,
    followers: Sequence[Callable[[Sequence[Json]], None]],
    started_s: float,
) -> None:
    """Until the learner has ended. `followers` get each step's record."""
    learner = roles.learner()
    metrics = JsonlTail(runtime.run.path / "metrics.jsonl")
    asked: set[Any] = set()
    first_rollout_seen = False

    def finished() -> bool:
        nonlocal first_rollout_seen
        if overseer.error is not None:
            raise overseer.error
        if runtime.stop.requested:
            _ask_to_stop(learner, asked)
        if not first_rollout_seen:
            first_rollout_seen = _note_first_rollout(runtime, roles, started_s=started_s)
        records = metrics.read()
        for record in records:
            trackers.log(record)
        for follow in followers:
            follow(records)
        return learner.finished

    roles.watch(finished)


def _ask_to_stop(learner: RolePool, asked: set[Any]) -> None:
    """Ask each process of the learner once; one that replaces another is asked as well."""
    for handle in learner.handles:
        if handle not in asked:
            asked.add(handle)
            handle.stop.remote()


def _note_first_rollout(runtime: Runtime, roles: Roles, *, started_s: float) -> bool:
    """Write down how long the online roles took to their first rollout. True once that is known."""
    path = runtime.run.path / "online.json"
    if path.exists():
        return True
    ray = runtime.ray
    asked = [handle.status.remote() for handle in roles.rollout(runtime.run.path).handles]
    try:
        statuses: list[dict[str, Any]] = ray.get(asked, timeout=_STATUS_TIMEOUT_S)
    except ray.exceptions.RayError:
        return False  # A dying actor is the supervisor's business.
    if not any(status["samples"] for status in statuses):
        return False
    seconds = round(time.monotonic() - started_s, 2)
    atomic_write_text(path, json.dumps({"seconds_to_first_rollout": seconds}))
    return True
