"""Reward models trained elsewhere (rm.models), taken as they are: checked against the policy, and copied.

What comes of it is what training gives: a member's directory. Scores are read where training here reads them, at the
last token of prompt + answer, end-of-sequence token included.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cluster.errors import ModelError
from cluster.stored_models import load_stored, stored_dtype
from cluster.text import resolve_model_dir

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REMEDY: Final = "name a reward model that was trained from this policy's base model, with its tokenizer"


def take_member(
    source: Path,
    *,
    target: Path,
    policy_dir: Path,
    tokenizer: PreTrainedTokenizerBase,
    max_sequence_tokens: int,
) -> None:
    """Copy the model in `source` to `target`, its weights bit for bit, with the policy's tokenizer.

    It must read the policy's tokens, and the critic starts from it: raises ModelError for another head than one label,
    another vocabulary, or a context shorter than a prompt and its answer.
    """
    directory = resolve_model_dir(source)
    _check_tokenizer(directory, tokenizer)
    model = load_stored(directory, kind="reward model", dtype=stored_dtype(directory))
    embeddings, wanted = model.get_input_embeddings().num_embeddings, _vocab_size(policy_dir)
    if embeddings < wanted:
        raise ModelError(
            "the reward model has another vocabulary than the policy",
            got=f"{embeddings} embeddings in {directory}, {wanted} in the policy",
            do=_REMEDY,
        )
    context = int(model.config.get_text_config().max_position_embeddings)
    if context < max_sequence_tokens:
        raise ModelError(
            "a prompt and its answer do not fit the reward model's context",
            got=f"max_prompt_tokens + max_response_tokens = {max_sequence_tokens}, context {context} in {directory}",
            do="lower data.max_prompt_tokens or data.max_response_tokens, or name another reward model",
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    save_member(model, target=target, tokenizer=tokenizer)


def save_member(model: Any, *, target: Path, tokenizer: Any) -> None:
    """A member's directory: weights in their type, the policy's tokenizer. Raises ModelError when the disk refuses."""
    from safetensors import SafetensorError  # what a full disk raises while weights are written

    try:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"cannot write {target}", got=str(error), do="free some disk space or choose another runs_dir"
        ) from error


def _check_tokenizer(directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A directory without a tokenizer is believed. One with a tokenizer need not have a pad token: it is not used."""
    if not (directory / "tokenizer_config.json").is_file():
        return
    from transformers import AutoTokenizer

    try:
        own = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False).get_vocab()
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"cannot read the tokenizer in {directory}", got=repr(error), do="the directory needs tokenizer.json"
        ) from error
    policy = tokenizer.get_vocab()
    if own != policy:
        differ = len(own.items() ^ policy.items())
        raise ModelError(
            "the reward model has another tokenizer than the policy",
            got=f"{len(own)} tokens in {directory}, {len(policy)} in the policy; {differ} entries differ",
            do=_REMEDY,
        )


def _vocab_size(policy_dir: Path) -> int:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(policy_dir, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise ModelError(f"cannot read the policy's configuration in {policy_dir}", got=repr(error)) from error
    return int(config.get_text_config().vocab_size)
