"""What the signals compare with: the answers of the policy before training, the SFT data, each reward model's scale.

All of it is read from the run's own files, again at each start, and none of it is in a checkpoint. A file that is not
there leaves its part empty, and the signals that need it absent.

| part | file |
|---|---|
| answers | eval/sft.rows.jsonl; of data/preferences.jsonl and preferences_unclear.jsonl pairs of the first policy |
| rewards | eval/sft.rows.jsonl, on the scale of the version that eval/sft.json names |
| SFT data | data/sft.jsonl |
| scales | rm/versions/*/manifest.json |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import numpy as np

from cluster.data_records import (
    PREFERENCES_FILE,
    SFT_FILE,
    UNCLEAR_FILE,
    PreferencePair,
    Prompt,
    SftExample,
    data_dir,
    read_rows,
    stable_prompt_id,
)
from cluster.errors import DataError, ModelError
from cluster.files import read_jsonl
from cluster.reward_models import RewardModels
from learner.guard.reward_signals import Floats
from learner.guard.spans import TokenIds

MAX_ANSWERS: Final = 8192
MAX_SFT_TEXTS: Final = 20_000
"""Of more than these, as many are taken, evenly spread."""

Encode = Callable[[str], Sequence[int]]
"""Answer → token ids, as rollouts have them: with the end-of-sequence token."""

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Reference:
    """`prompts`: what each answer answers, by any name. `rewards`: raw, of some of the answers, on the scale of
    `rewards_version`."""

    answers: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    token_ids: tuple[TokenIds, ...] = ()
    rewards: Floats = field(default_factory=lambda: np.zeros(0))
    rewards_version: str | None = None
    sft_ids: tuple[TokenIds, ...] = ()


@dataclass(frozen=True)
class RewardScale:
    """Of one reward-model version: mean and standard deviation of its calibration, and the mean spread between its
    members there; None for a single model."""

    mean: float
    std: float
    spread: float | None


class RewardScales:
    """Scale by version, read when first asked for. None for a mix of sources, which has no calibration, and for a
    version that is not on disk."""

    def __init__(self, rm_dir: Path) -> None:
        self._models = RewardModels(rm_dir)
        self._known: dict[str, RewardScale | None] = {}

    def __call__(self, rm_version: str) -> RewardScale | None:
        if rm_version not in self._known:
            self._known[rm_version] = self._read(rm_version)
        return self._known[rm_version]

    def _read(self, rm_version: str) -> RewardScale | None:
        try:
            manifest = self._models.get(rm_version).manifest
        except ModelError:
            return None
        calibration = manifest.calibration
        if calibration is None or calibration.std <= 0:
            return None
        percentiles = manifest.spread_percentiles
        return RewardScale(calibration.mean, calibration.std, float(np.mean(percentiles)) if percentiles else None)


def load_reference(run_dir: Path, *, encode: Encode) -> Reference:
    """What a run's files tell; an empty part for a file that is not there. Raises DataError for a damaged one."""
    rows = _rows(run_dir)
    found = [(stable_prompt_id(row.prompt), row.answer) for row in rows]
    for name in (PREFERENCES_FILE, UNCLEAR_FILE):
        path = data_dir(run_dir) / name
        for pair in read_rows(path, PreferencePair) if path.exists() else ():
            # Only where the run's own first policy wrote both; pairs that were imported have no version.
            if pair.policy_version == 0 and pair.rejected_version in (None, 0):
                prompt = stable_prompt_id(pair.prompt)
                found += [(prompt, pair.chosen), (prompt, pair.rejected)]
    found = _spread(found, at_most=MAX_ANSWERS)
    sft_path = data_dir(run_dir) / SFT_FILE
    sft = _spread(read_rows(sft_path, SftExample) if sft_path.exists() else [], at_most=MAX_SFT_TEXTS)
    version = _rewards_version(run_dir)
    rewards = [row.reward for row in rows if row.reward is not None] if version else []
    return Reference(
        answers=tuple(answer for _, answer in found),
        prompts=tuple(prompt for prompt, _ in found),
        token_ids=tuple(_encoded(answer, encode) for _, answer in found),
        rewards=np.array(rewards, dtype=np.float64),
        rewards_version=version,
        sft_ids=tuple(_encoded(example.answer, encode) for example in sft),
    )


class _Row(msgspec.Struct):
    """Of eval/*.rows.jsonl, as far as it matters here."""

    prompt: Prompt
    answer: str
    reward: float | None = None


def _rows(run_dir: Path) -> list[_Row]:
    """The first policy's answers to the held-out prompts."""
    path = run_dir / "eval" / "sft.rows.jsonl"
    try:
        return msgspec.convert(read_jsonl(path) if path.exists() else [], list[_Row])
    except msgspec.ValidationError as error:
        raise DataError(f"{path} holds no answers", got=str(error), do="evaluate the SFT policy again") from error


def _rewards_version(run_dir: Path) -> str | None:
    path = run_dir / "eval" / "sft.json"
    try:
        version = json.loads(path.read_text(encoding="utf-8")).get("rm_version") if path.exists() else None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}", got=str(error), do="evaluate the SFT policy again") from error
    return version if isinstance(version, str) else None


def _encoded(answer: str, encode: Encode) -> TokenIds:
    return np.asarray(encode(answer), dtype=np.int32)


def _spread(items: list[_Item], *, at_most: int) -> list[_Item]:
    """All, or `at_most` of them at even distances."""
    if len(items) <= at_most:
        return items
    return [items[place] for place in np.linspace(0, len(items) - 1, at_most).astype(int).tolist()]
