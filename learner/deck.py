"""The prompts of a run in a seeded, resumable order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.data_records import Prompt
from cluster.errors import DataError
from cluster.records import PromptTask, pack_ids


@dataclass(frozen=True)
class DeckPrompt:
    """A prompt as the policy sees it (`token_ids`) and as it was read (`prompt`)."""

    prompt_id: str
    token_ids: tuple[int, ...]
    prompt: Prompt


class PromptDeck:
    """Endless shuffled passes over the prompts. Its whole state is `position`, the count of prompts dealt."""

    def __init__(self, prompts: Sequence[DeckPrompt], *, seed: int, position: int = 0) -> None:
        if not prompts:
            raise DataError("no prompts to train on", got="0 usable prompts", do="see data/report.json for why")
        self._prompts = prompts
        self._by_id = {prompt.prompt_id: prompt for prompt in prompts}
        self._seed = seed
        self._pass = -1
        self._order: np.ndarray = np.empty(0, dtype=np.int64)
        self.position = position

    def deal(self) -> DeckPrompt:
        """The next prompt."""
        current, offset = divmod(self.position, len(self._prompts))
        if current != self._pass:
            self._pass = current
            self._order = np.random.default_rng((self._seed, current)).permutation(len(self._prompts))
        self.position += 1
        return self._prompts[int(self._order[offset])]

    def prompt(self, prompt_id: str) -> Prompt:
        """The prompt of this id, as it was read."""
        return self._by_id[prompt_id].prompt


@dataclass(frozen=True)
class TaskTemplate:
    """What every task of a run shares. `incarnation` tells this start of the run from earlier ones, whose late
    results must not pass for ours."""

    incarnation: str
    max_new_tokens: int
    temperature: float
    samples_per_prompt: int


def deal_tasks(deck: PromptDeck, groups: int, *, first: int, version: int, template: TaskTemplate) -> list[PromptTask]:
    """Tasks for the next `groups` prompts, `samples_per_prompt` each, numbered from `first` on."""
    tasks: list[PromptTask] = []
    for _ in range(groups):
        prompt = deck.deal()
        group_id = f"{template.incarnation}-{first + len(tasks):09d}"
        for _ in range(template.samples_per_prompt):
            tasks.append(
                PromptTask(
                    task_id=f"{template.incarnation}-{first + len(tasks):09d}",
                    prompt_id=prompt.prompt_id,
                    group_id=group_id,
                    prompt_ids_i32=pack_ids(prompt.token_ids),
                    max_new_tokens=template.max_new_tokens,
                    temperature=template.temperature,
                    issued_version=version,
                )
            )
    return tasks
