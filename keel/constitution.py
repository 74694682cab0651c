"""A run's own copy of its rules: they stay the same while it runs and when it is resumed, and workers on other nodes or
outside Ray find them."""

from __future__ import annotations

from pathlib import Path

from cluster.errors import ConfigError
from cluster.files import atomic_write_bytes
from configs.run import RunConfig
from reward_service.rewards.constitution_file import CONSTITUTION_FILE


def keep_constitution(config: RunConfig, run_dir: Path) -> None:
    """Copy reward.constitution to the run. Raises ConfigError when a resumed run has other rules, or none."""
    given, kept = config.reward.constitution, run_dir / CONSTITUTION_FILE
    if given is None:
        if kept.exists():
            raise ConfigError(
                "a run is resumed without its constitution",
                got=f"reward.constitution is not set, and {kept} is there",
                do=f"resume with reward.constitution={kept}, or start a run of another name",
            )
        return
    rules = given.read_bytes()
    if not kept.exists():
        atomic_write_bytes(kept, rules)
    elif kept.read_bytes() != rules:
        raise ConfigError(
            "a run is resumed with another constitution",
            got=f"{given} is not {kept}",
            do="resume with the rules that the run was started with, or start a run of another name",
        )
