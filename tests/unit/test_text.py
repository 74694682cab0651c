"""Text ↔ ids: truncation, special tokens as text, chat templates, and clear refusals of unfit models."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ModelError
from cluster.text import (
    EncodedAnswer,
    EncodedPrompt,
    Rejection,
    check_vocabulary,
    decode_answer,
    encode_answer,
    encode_prompt,
    load_tokenizer,
    prompt_text,
)
from configs.run import NewModel
from learner.model_init import make_tokenizer, transformer_config

TEXTS = ["one two three four five six.", "seven, eight? nine!"]
WORDS = make_tokenizer(NewModel(), texts=TEXTS)
BYTES = make_tokenizer(NewModel(tokenizer="byte_bpe", vocab_size=300), texts=TEXTS * 20)
PAD, BOS, EOS, UNK = range(4)


def _ids(text: str) -> tuple[int, ...]:
    vocabulary = WORDS.get_vocab()
    return tuple(vocabulary[word] for word in text.split())


def test_prompt_starts_with_bos_and_answer_ends_with_eos() -> None:
    assert encode_prompt(WORDS, "one two.", max_tokens=9) == EncodedPrompt((BOS, *_ids("one two .")), truncated=False)
    assert encode_answer(WORDS, "six.", max_tokens=9) == EncodedAnswer((*_ids("six ."), EOS), truncated=False)


def test_a_long_prompt_keeps_bos_and_its_end() -> None:
    assert encode_prompt(WORDS, "one two three four", max_tokens=3) == EncodedPrompt(
        (BOS, *_ids("three four")), truncated=True
    )
    assert encode_prompt(WORDS, "one two three", max_tokens=4) == EncodedPrompt(
        (BOS, *_ids("one two three")), truncated=False
    )
    assert isinstance(encode_prompt(WORDS, "one two three", max_tokens=3, long_prompt="reject"), Rejection)


def test_a_long_answer_has_no_eos() -> None:
    assert encode_answer(WORDS, "one two three", max_tokens=3) == EncodedAnswer(_ids("one two three"), truncated=True)
    assert encode_answer(WORDS, "one two", max_tokens=3) == EncodedAnswer((*_ids("one two"), EOS), truncated=False)


@pytest.mark.parametrize("prompt", ["", " \n", [{"role": "user", "content": " "}]])
def test_empty_prompts_are_rejected(prompt: str | list[dict[str, str]]) -> None:
    assert encode_prompt(WORDS, prompt, max_tokens=9) == Rejection("empty prompt")


@pytest.mark.parametrize("tokenizer", [WORDS, BYTES])
def test_special_tokens_typed_by_a_user_are_text(tokenizer: object) -> None:
    prompt = encode_prompt(tokenizer, "<eos> one <pad>", max_tokens=40)
    assert isinstance(prompt, EncodedPrompt)
    assert not {EOS, PAD} & set(prompt.ids)
    assert not {EOS, PAD, BOS} & set(encode_answer(tokenizer, "<eos><bos><pad>", max_tokens=40).ids[:-1])


def test_messages_go_through_the_template() -> None:
    messages = [{"role": "user", "content": "one two"}]
    expected = (BOS, *_ids("user : one two assistant :"))
    assert encode_prompt(WORDS, messages, max_tokens=20) == EncodedPrompt(expected, truncated=False)
    assert prompt_text(messages) == "user: one two"


def test_messages_without_a_template_are_an_error() -> None:
    bare = make_tokenizer(NewModel(), texts=TEXTS)
    bare.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        encode_prompt(bare, [{"role": "user", "content": "one"}], max_tokens=9)


@given(ids=st.lists(st.integers(4, len(WORDS) - 1), max_size=30))
@settings(deadline=None)
def test_any_words_survive_decoding(ids: list[int]) -> None:
    text = decode_answer(WORDS, [*ids, EOS])
    assert encode_answer(WORDS, text, max_tokens=64).ids == (*ids, EOS)


@given(text=st.text(max_size=40))
@settings(deadline=None)
def test_bytes_carry_any_text(text: str) -> None:
    assert decode_answer(BYTES, encode_answer(BYTES, text, max_tokens=1000).ids) == text


def test_saved_and_loaded_tokenizers_agree(tmp_path: Path) -> None:
    rng = random.Random(0)
    for tokenizer in (WORDS, BYTES):
        tokenizer.save_pretrained(tmp_path)
        again = load_tokenizer(tmp_path)
        for _ in range(20):
            text = " ".join(rng.choice(TEXTS[0].split()) for _ in range(8))
            assert encode_prompt(again, text, max_tokens=99) == encode_prompt(tokenizer, text, max_tokens=99)
        assert (again.pad_token_id, again.bos_token_id, again.eos_token_id, again.unk_token_id) == (PAD, BOS, EOS, UNK)


def test_load_tokenizer_refuses(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="model not found"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(ModelError, match="hf download no-such-org/no-such-model"):
        load_tokenizer("no-such-org/no-such-model")
    with pytest.raises(ModelError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path)
    unfit = make_tokenizer(NewModel(), texts=TEXTS)
    unfit.pad_token = unfit.eos_token
    unfit.save_pretrained(tmp_path / "pad")
    with pytest.raises(ModelError, match="no pad token of its own"):
        load_tokenizer(tmp_path / "pad")


def test_vocabulary_that_does_not_fit() -> None:
    small = transformer_config(NewModel(), tokenizer=WORDS)
    check_vocabulary(WORDS, small)
    with pytest.raises(ModelError, match="do not fit"):
        check_vocabulary(BYTES, small)


def test_head_sizes_that_vllm_cannot_run_are_refused() -> None:
    with pytest.raises(ModelError, match="head size"):
        transformer_config(NewModel(hidden_size=128, heads=8), tokenizer=WORDS)
    with pytest.raises(ModelError, match="head size"):
        transformer_config(NewModel(hidden_size=130, heads=4), tokenizer=WORDS)


def test_a_vocabulary_under_256_bytes_is_refused() -> None:
    with pytest.raises(ModelError, match="at least 260"):
        make_tokenizer(NewModel(tokenizer="byte_bpe", vocab_size=100), texts=TEXTS)
