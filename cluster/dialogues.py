"""Whole dialogues → prompt and answers, for preference sets that repeat the dialogue in both columns.

Two forms: hh-style text ("\\n\\nHuman: … \\n\\nAssistant: …") and lists of chat messages. Pure functions; what cannot
be used comes back as a Rejection with its reason, for the caller to count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from cluster.data_records import Prompt

HUMAN: Final = "\n\nHuman:"
ASSISTANT: Final = "\n\nAssistant:"


@dataclass(frozen=True)
class Rejection:
    """Why a record is left out. The reason is a counter's name: few distinct values, no data in it."""

    reason: str


@dataclass(frozen=True)
class Comparison:
    """One prompt, the preferred answer and the other one; answers stripped of surrounding white space."""

    prompt: Prompt
    chosen: str
    rejected: str


def check_prompt(value: Any) -> Prompt | Rejection:
    """A prompt as it came from a file → str, or [{"role", "content"}], or why not."""
    if isinstance(value, str):
        return value if value.strip() else Rejection("empty prompt")
    if not isinstance(value, list):
        return Rejection("prompt is neither text nor messages")
    messages: list[dict[str, str]] = []
    for message in value:
        if not isinstance(message, dict):
            return Rejection("prompt is neither text nor messages")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            return Rejection("message without role or text content")
        messages.append({"role": role, "content": content})
    if not any(message["content"].strip() for message in messages):
        return Rejection("empty prompt")
    return messages


def check_answer(value: Any) -> str | Rejection:
    """An answer as it came from a file (text, or messages that end with the assistant's) → text, or why not."""
    if isinstance(value, list):
        if not value or not isinstance(value[-1], dict) or value[-1].get("role") != "assistant":
            return Rejection("messages do not end with an assistant's answer")
        value = value[-1].get("content")
    if not isinstance(value, str):
        return Rejection("answer is not text")
    return value.strip() or Rejection("empty answer")


def compare(prompt: Any, chosen: Any, rejected: Any) -> Comparison | Rejection:
    """A row with its own prompt column."""
    checked = check_prompt(prompt)
    if isinstance(checked, Rejection):
        return checked
    answers = check_answer(chosen), check_answer(rejected)
    return _ordered(checked, *answers)


def compare_dialogues(chosen: Any, rejected: Any) -> Comparison | Rejection:
    """A row of two whole dialogues. The prompt is all that precedes the last answer, and must be the same in both."""
    if chosen == rejected:
        return Rejection("tie")
    first, second = _split(chosen), _split(rejected)
    if isinstance(first, Rejection):
        return first
    if isinstance(second, Rejection):
        return second
    if first[0] != second[0]:
        return Rejection("dialogues differ before the last answer")
    return _ordered(first[0], first[1], second[1])


def _ordered(prompt: Prompt, chosen: str | Rejection, rejected: str | Rejection) -> Comparison | Rejection:
    if isinstance(chosen, Rejection):
        return chosen
    if isinstance(rejected, Rejection):
        return rejected
    if chosen == rejected:
        return Rejection("tie")
    return Comparison(prompt, chosen, rejected)


def _split(dialogue: Any) -> tuple[Prompt, str | Rejection] | Rejection:
    """Dialogue → (all before the last answer, the last answer)."""
    if isinstance(dialogue, list):
        prompt = check_prompt(dialogue[:-1])
        return prompt if isinstance(prompt, Rejection) else (prompt, check_answer(dialogue))
    if not isinstance(dialogue, str):
        return Rejection("dialogue is neither text nor messages")
    end = dialogue.rfind(ASSISTANT)
    if end < 0 or HUMAN not in dialogue[:end]:
        return Rejection("not a dialogue")
    end += len(ASSISTANT)
    if HUMAN in dialogue[end:]:
        return Rejection("dialogue ends with a human turn")
    return dialogue[:end], check_answer(dialogue[end:])
