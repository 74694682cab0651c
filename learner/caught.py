"""Answers that a rule caught, kept for the next refresh of the reward model, which learns to like them less."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from cluster.data_records import Prompt
from cluster.files import JsonlWriter, read_jsonl
from cluster.records import ScoredRollout

CAUGHT_FILE: Final = "caught_by_rules.jsonl"
_MOST_PER_STEP: Final = 8
_ACTIONS: Final = ("penalise", "override")
"""A rule that only flags leaves the judgement to people, who add what they find bad themselves."""


class CaughtAnswers:
    """Appends to `<run>/caught_by_rules.jsonl`. A text is written once a run, and at most a few a step."""

    def __init__(self, run_dir: Path) -> None:
        path = run_dir / CAUGHT_FILE
        self._writer = JsonlWriter(path)
        self._known: set[str] = {line["answer"] for line in read_jsonl(path)}

    def keep(self, answers: Iterable[tuple[ScoredRollout, Prompt, str]]) -> int:
        """(scored, prompt, answer's text) of a step. Returns how many were caught, written or not."""
        caught = written = 0
        for scored, prompt, text in answers:
            rules = [verdict.rule for verdict in scored.verdicts if verdict.action in _ACTIONS]
            if not rules:
                continue
            caught += 1
            if text not in self._known and written < _MOST_PER_STEP:
                self._known.add(text)
                written += 1
                line = {"prompt": prompt, "answer": text, "reason": ", ".join(rules)}
                self._writer.write(line | {"policy_version": scored.rollout.oldest_version})
        return caught
