"""Text ↔ token ids: the one place that says how a prompt and an answer become tokens.

Every stage (SFT, RM, rollouts, scoring) goes through these functions, so a sequence has the same ids everywhere:
prompt ids, then answer ids, then the end-of-sequence token when the answer ended by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.data_records import Prompt
from cluster.dialogues import Rejection
from cluster.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "EncodedAnswer",
    "EncodedPrompt",
    "Rejection",
    "check_vocabulary",
    "decode_answer",
    "encode_answer",
    "encode_prompt",
    "load_tokenizer",
    "prompt_text",
    "resolve_model_dir",
]


@dataclass(frozen=True)
class EncodedPrompt:
    """[P] token ids of a prompt, 1 ≤ P ≤ max_tokens. `truncated`: its beginning was cut off."""

    ids: tuple[int, ...]
    truncated: bool


@dataclass(frozen=True)
class EncodedAnswer:
    """[T] token ids of an answer, 1 ≤ T ≤ max_tokens, ending with the end-of-sequence token unless `truncated`."""

    ids: tuple[int, ...]
    truncated: bool


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    *,
    max_tokens: int,
    long_prompt: Literal["truncate_left", "reject"] = "truncate_left",
) -> EncodedPrompt | Rejection:
    """Prompt → ids, or why it cannot be used.

    Text goes through the tokenizer with the special tokens it adds itself (its own beginning-of-sequence token, if
    any); messages through its chat template with the opening of the assistant's turn. A prompt over `max_tokens` keeps
    its beginning-of-sequence token and its end. Raises ModelError for messages and a tokenizer without a template.
    """
    if not prompt_text(prompt).strip():
        return Rejection("empty prompt")
    ids = _plain_ids(tokenizer, prompt) if isinstance(prompt, str) else _chat_ids(tokenizer, prompt)
    if not ids:
        return Rejection("empty prompt")
    if len(ids) <= max_tokens:
        return EncodedPrompt(tuple(ids), truncated=False)
    if long_prompt == "reject":
        return Rejection("prompt longer than max_prompt_tokens")
    head = ids[:1] if ids[0] == tokenizer.bos_token_id and max_tokens > 1 else []
    return EncodedPrompt(tuple(head + ids[len(ids) - (max_tokens - len(head)) :]), truncated=True)


def encode_answer(tokenizer: PreTrainedTokenizerBase, answer: str, *, max_tokens: int) -> EncodedAnswer:
    """Answer → ids and the end-of-sequence token; over `max_tokens` (that token counted) cut, without it."""
    ids: list[int] = tokenizer(answer, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    if len(ids) + 1 > max_tokens:
        return EncodedAnswer(tuple(ids[:max_tokens]), truncated=True)
    return EncodedAnswer((*ids, int(tokenizer.eos_token_id)), truncated=False)


def decode_answer(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Ids → text without special tokens; for text of a closed vocabulary, the inverse of `encode_answer`."""
    text: str = tokenizer.decode(
        [int(token) for token in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one readable text: itself, or "role: content" lines."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt if message["content"].strip())


def _plain_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    # split_special_tokens: "<eos>" typed by a user is text, not the end of the sequence.
    ids: list[int] = tokenizer(prompt, split_special_tokens=True, verbose=False)["input_ids"]
    return ids


def _chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    if not tokenizer.chat_template:
        raise ModelError(
            "the prompts are chat messages but the tokenizer has no chat template",
            got=str(tokenizer.name_or_path),
            do="use a chat model's tokenizer, or map `prompt` to a text column",
        )
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # The template writes the special tokens itself, so none are added here.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def resolve_model_dir(path: str | Path) -> Path:
    """A directory, or a Hugging Face name whose files are already in the local cache → its directory.

    Never downloads: a run that starts by fetching gigabytes should be asked to. Raises ModelError.
    """
    directory = Path(path)
    if directory.is_dir():
        return directory
    text = str(path)
    if text.count("/") == 1 and not text.startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(text, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError) as error:
            raise ModelError(
                "model not found",
                got=f"{text!r}: no such directory, and not in the Hugging Face cache",
                do=f"correct the path, or fetch it first: hf download {text}",
            ) from error
    raise ModelError("model not found", got=f"{text!r}: no such directory", do="correct the model's path")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model directory, fit for training: an end-of-sequence token and another, dedicated pad token.

    Raises ModelError: missing or unreadable; no end-of-sequence token; no pad token, or one that is the
    end-of-sequence token (reward models find an answer's last token by the first pad, so EOS cannot serve as both).
    """
    from transformers import AutoTokenizer

    directory = resolve_model_dir(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"cannot read the tokenizer in {directory}",
            got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            do="the directory needs tokenizer.json and tokenizer_config.json",
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer in {directory} has no end-of-sequence token",
            do="set eos_token in its tokenizer_config.json",
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ModelError(
            f"the tokenizer in {directory} has no pad token of its own",
            got="none" if tokenizer.pad_token_id is None else f"pad = end of sequence = {tokenizer.eos_token!r}",
            do="set pad_token in its tokenizer_config.json to a reserved token that is not the end-of-sequence token",
        )
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model_config: Any) -> None:
    """Every id that the tokenizer can produce must have a row in the model's embedding. Raises ModelError."""
    largest = max(tokenizer.get_vocab().values())
    vocab_size = int(model_config.get_text_config().vocab_size)
    if largest >= vocab_size:
        raise ModelError(
            "tokenizer and model do not fit",
            got=f"token ids up to {largest} from {tokenizer.name_or_path}, {vocab_size} embeddings in the model",
            do="use the model's own tokenizer, or resize the model's embeddings",
        )
