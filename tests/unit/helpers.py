"""Small things for tests: records, a directory's names, a disk that is full."""

from __future__ import annotations

import errno
from pathlib import Path

from cluster.records import PromptTask, Rollout, ScoredRollout, VersionRun, pack_floats, pack_ids


def task(task_id: str = "a-0", *, group_id: str | None = None, attempt: int = 0) -> PromptTask:
    return PromptTask(
        task_id=task_id,
        prompt_id="p",
        group_id=group_id or task_id,
        prompt_ids_i32=pack_ids([1, 2, 3]),
        max_new_tokens=4,
        temperature=1.0,
        attempt=attempt,
    )


def scored(of: PromptTask, *, version: int = 0, reward: float = 1.0) -> ScoredRollout:
    rollout = Rollout(
        task=of,
        response_ids_i32=pack_ids([4, 2]),
        behaviour_logprobs_f32=pack_floats([-1.0, -0.5]),
        version_runs=(VersionRun(0, version),),
        finish_reason="stop",
        actor="rollout-0",
        generate_s=0.1,
    )
    return ScoredRollout(
        rollout=rollout,
        member_scores=(reward,),
        reward=reward,
        uncertainty=0.0,
        ref_logprobs_f32=pack_floats([-1.0, -0.5]),
        rm_version="rm-1",
    )


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def refuse(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
