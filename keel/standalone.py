"""Roles started by hand, outside Ray."""

from __future__ import annotations

from pathlib import Path

from configs.load import load_config
from reward_service.reward_actor import RewardSpec, serve


def run_reward_worker(run_dir: Path, *, redis_url: str, index: int) -> int:
    """Score rollouts of the run until SIGTERM or SIGINT. Returns the exit code."""
    config = load_config(str(run_dir / "config.yaml"))
    return serve(
        RewardSpec(config=config, redis_url=redis_url, run_dir=str(run_dir.resolve()), index=index, incarnation=0)
    )
