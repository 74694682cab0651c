"""The directory of one run: who owns it, which stages are done, and the progress that the display reads.

config.yaml  data/  sft/  rm/  checkpoints/  policy/  eval/  logs/
progress.jsonl  metrics.jsonl  samples.jsonl  stages.json  summary.json  report.html
"""

from __future__ import annotations

import fcntl
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from cluster.errors import ConfigError, RunExistsError
from cluster.files import atomic_write_text
from configs.load import dump_config
from configs.run import RunConfig, Stage

_OFFLINE: tuple[Stage, ...] = ("sft", "collect", "rm", "dpo")
_ONLINE_KEYS: dict[str, tuple[str, ...]] = {"rm": ("refresh", "accept_red")}
"""Keys of an offline stage's section that may change after it: other stages read them."""


class RunDirectory:
    """Open with `open_run`. `emit` may be called from the driver only; stages elsewhere append for themselves."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stages_path = path / "stages.json"
        self.stage_seconds: dict[str, float] = {}
        if self._stages_path.exists():
            self.stage_seconds = json.loads(self._stages_path.read_text())

    def done(self, stage: Stage) -> bool:
        return stage in self.stage_seconds

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """Time a stage; it counts as done only when the body ends without an error."""
        started_s = time.monotonic()
        self.emit(stage=stage, event="start")
        yield
        self.stage_seconds[stage] = round(time.monotonic() - started_s, 2)
        atomic_write_text(self._stages_path, json.dumps(self.stage_seconds))
        self.emit(stage=stage, event="end", seconds=self.stage_seconds[stage])

    def reopen(self, *stages: Stage) -> None:
        """Take stages for not done."""
        for stage in stages:
            self.stage_seconds.pop(stage, None)
        atomic_write_text(self._stages_path, json.dumps(self.stage_seconds))

    def emit(self, **fields: Any) -> None:
        """Append one record to progress.jsonl."""
        append_progress(self.path, fields)


def append_progress(run_dir: Path, fields: dict[str, Any]) -> None:
    """Append one progress record. One short write in append mode, so records of several processes do not mix."""
    with (run_dir / "progress.jsonl").open("a") as file:
        file.write(json.dumps({"t": round(time.time(), 3)} | fields) + "\n")


@contextmanager
def open_run(config: RunConfig, *, resume: bool, fresh: bool) -> Iterator[RunDirectory]:
    """Take ownership of the run's directory.

    Raises RunExistsError when another process runs there, or when it holds a run and neither `resume` nor `fresh` was
    asked for; ConfigError when resuming with another configuration. `fresh` moves the old directory aside.
    """
    path = config.run_dir
    if path.exists() and (path / "config.yaml").exists() and not resume:
        if not fresh:
            raise RunExistsError(
                f"a run named {config.name} exists",
                got=str(path),
                do="go on with --resume, start over with --fresh (the old one is moved aside), or --set name=OTHER",
            )
        with _locked(path):
            pass  # Nobody lives there: it may be moved.
        aside = next(p for n in range(1, 10_000) if not (p := path.with_name(f"{path.name}.old-{n}")).exists())
        path.rename(aside)
    path.mkdir(parents=True, exist_ok=True)
    (path / "logs").mkdir(exist_ok=True)
    with _locked(path):
        text = dump_config(_without_secrets(config))
        resolved = path / "config.yaml"
        if resume and resolved.exists() and resolved.read_text() != text:
            _reconcile(RunDirectory(path), resolved.read_text(), text)
        atomic_write_text(resolved, text)
        yield RunDirectory(path)


def _without_secrets(config: RunConfig) -> RunConfig:
    """The configuration as it may lie on disk: no password in the server's URL, and of the webhook's only the host."""
    url, webhook = config.redis.url, config.guard.webhook
    if webhook is not None:
        parts = urlsplit(webhook)
        host = parts.netloc.rpartition("@")[2]
        guard = config.guard.model_copy(update={"webhook": f"{parts.scheme}://{host}/***"})
        config = config.model_copy(update={"guard": guard})
    if url is None:
        return config
    scheme, _, rest = url.partition("://")
    rest = f"***@{rest.rpartition('@')[2]}" if "@" in rest else rest
    rest = re.sub(r"(?<=[?&]password=)[^&]*", "***", rest)
    return config.model_copy(update={"redis": config.redis.model_copy(update={"url": f"{scheme}://{rest}"})})


def _reconcile(run: RunDirectory, old_text: str, new_text: str) -> None:
    """What made the finished stages must be the same; how far and where the run goes on may change. More PPO steps
    than were asked for, or another KL budget, reopen that stage and those after it."""
    import yaml

    old, new = yaml.safe_load(old_text), yaml.safe_load(new_text)
    finished = [stage for stage in _OFFLINE if run.done(stage)]
    keys = ("name", "seed", "model", "data", *finished)
    changed = [key for key in keys if _fixed(old, key) != _fixed(new, key)]
    fixed = ("batch_size", "samples_per_prompt")  # The ledger of issued tasks counts in these.
    changed += [f"learner.{key}" for key in fixed if old["learner"][key] != new["learner"][key]]
    if changed:
        raise ConfigError(
            "a run is resumed with another configuration",
            got=f"different: {', '.join(changed)}",
            do="resume with the configuration that the run was started with, or start a run of another name",
        )
    more_steps = new["learner"]["steps"] > old["learner"]["steps"]
    if more_steps or new["learner"].get("kl_budget") != old["learner"].get("kl_budget"):
        run.reopen("ppo", "dpo", "evaluate")


def _fixed(config: dict[str, Any], key: str) -> Any:
    section, free = config.get(key), _ONLINE_KEYS.get(key, ())
    return {name: value for name, value in section.items() if name not in free} if free and section else section


@contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    with (path / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunExistsError(
                f"another process runs {path.name}", got=str(path), do="wait for it, stop it, or --set name=OTHER"
            ) from error
        yield lock
