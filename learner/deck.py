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


Cut = tuple[int, int]
"""(position, branch): from this position on, the order is that branch's own."""


class PromptDeck:
    """Endless shuffled passes over the prompts, each of which is dealt once a pass. Its whole state is `position`, the
    count of prompts dealt, and `cuts`: where the run went back to an earlier checkpoint, and deals otherwise since."""

    def __init__(
        self, prompts: Sequence[DeckPrompt], *, seed: int, position: int = 0, cuts: Sequence[Cut] = ()
    ) -> None:
        if not prompts:
            raise DataError("no prompts to train on", got="0 usable prompts", do="see data/report.json for why")
        self._prompts = prompts
        self._by_id = {prompt.prompt_id: prompt for prompt in prompts}
        self._seed = seed
        self._pass = -1
        self._order: np.ndarray = np.empty(0, dtype=np.int64)
        self.position = position
        self.cuts: tuple[Cut, ...] = tuple(cuts)

    def deal(self) -> DeckPrompt:
        """The next prompt."""
        current, offset = divmod(self.position, len(self._prompts))
        if current != self._pass:
            self._pass = current
            self._order = self._order_of(current)
        self.position += 1
        return self._prompts[int(self._order[offset])]

    def branch_off(self, position: int, *, branch: int, cuts: Sequence[Cut]) -> None:
        """Back to an earlier `position`, with the `cuts` of that time; from there on in another order."""
        self.position, self._pass = position, -1
        self.cuts = (*cuts, (position, branch))

    def _order_of(self, number: int) -> np.ndarray:
        """The order of this pass: of the branch that it began in, and what was left at each cut shuffled anew."""
        begin, end = number * len(self._prompts), (number + 1) * len(self._prompts)
        began_in = [branch for position, branch in self.cuts if position <= begin][-1:]
        order = np.random.default_rng((self._seed, number, *began_in)).permutation(len(self._prompts))
        for position, branch in self.cuts:
            if begin < position < end:
                np.random.default_rng((self._seed, number, branch)).shuffle(order[position - begin :])
        return order

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
