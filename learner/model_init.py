"""Where a run's weights start: a small new transformer with its own tokenizer, or a pretrained directory, checked.

`make_model` saves a new one to `<run_dir>/init` as an ordinary Hugging Face directory. Its special tokens (pad, bos,
eos, unk) are four different ones, so that a pad can never be taken for the end of an answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cluster.data_records import (
    PREFERENCES_FILE,
    PROMPTS_FILE,
    SFT_FILE,
    PreferencePair,
    PromptRecord,
    SftExample,
    data_dir,
    read_rows,
)
from cluster.errors import ModelError
from cluster.hf_training import silence_progress_bars, whole_directory
from cluster.text import check_vocabulary, load_tokenizer, prompt_text, resolve_model_dir
from configs.run import NewModel, PretrainedModel, RunConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

PAD, BOS, EOS, UNK = SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
HEAD_SIZES: Final = (32, 64, 80, 96, 112, 128, 192, 256)
"""Head sizes that vLLM's attention kernels take; with 16 or 24 the engine dies at its first forward."""

CHAT_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }} : {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
_TEMPLATE_WORDS: Final = ("system", "user", "assistant", ":")


@dataclass(frozen=True)
class InitialModel:
    """Directories of the weights and of the tokenizer that training starts from."""

    model_dir: Path
    tokenizer_dir: Path


def make_model(config: RunConfig, run_dir: Path) -> InitialModel:
    """Make the new model of a run (seeded; needs the canonical data files), or check the pretrained one.

    An `init` that is already there is kept. Raises ModelError: nothing at the path, no or unfit tokenizer, vocabulary
    that does not fit the model, context shorter than a prompt and its answer, sizes that vLLM cannot run.
    """
    if isinstance(config.model, PretrainedModel):
        initial = InitialModel(
            model_dir=resolve_model_dir(config.model.path),
            tokenizer_dir=resolve_model_dir(config.model.tokenizer or config.model.path),
        )
    else:
        initial = InitialModel(model_dir=run_dir / "init", tokenizer_dir=run_dir / "init")
        if not initial.model_dir.is_dir():
            _save_new(config.model, texts=_texts(run_dir), seed=config.seed, target=initial.model_dir)
    check_model(initial, max_sequence_tokens=config.max_sequence_tokens)
    return initial


def check_model(initial: InitialModel, *, max_sequence_tokens: int) -> PreTrainedTokenizerBase:
    """Read configuration and tokenizer (no weights), see that they fit each other and the run; gives the tokenizer."""
    from transformers import AutoConfig

    tokenizer = load_tokenizer(initial.tokenizer_dir)
    try:
        model_config = AutoConfig.from_pretrained(initial.model_dir, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"cannot read the model configuration in {initial.model_dir}",
            got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            do="point model.path at a Hugging Face model directory (config.json and safetensors)",
        ) from error
    check_vocabulary(tokenizer, model_config)
    context: int | None = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if context is not None and context < max_sequence_tokens:
        raise ModelError(
            "a prompt and its answer do not fit the model's context",
            got=f"max_prompt_tokens + max_response_tokens = {max_sequence_tokens}, context {context}",
            do="lower data.max_prompt_tokens or data.max_response_tokens, or use a model with a longer context",
        )
    return tokenizer


def _texts(run_dir: Path) -> list[str]:
    """All training text of the run, evaluation prompts left out."""
    directory = data_dir(run_dir)
    texts: list[str] = []
    if (directory / SFT_FILE).is_file():
        for example in read_rows(directory / SFT_FILE, SftExample):
            texts += prompt_text(example.prompt), example.answer
    if (directory / PREFERENCES_FILE).is_file():
        for pair in read_rows(directory / PREFERENCES_FILE, PreferencePair):
            texts += prompt_text(pair.prompt), pair.chosen, pair.rejected
    texts += (prompt_text(record.prompt) for record in read_rows(directory / PROMPTS_FILE, PromptRecord))
    return texts


def _save_new(model: NewModel, *, texts: list[str], seed: int, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    silence_progress_bars()
    tokenizer = make_tokenizer(model, texts=texts)
    model_config = transformer_config(model, tokenizer=tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = AutoModelForCausalLM.from_config(model_config)
    network.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    with whole_directory(target, error=ModelError) as directory:
        network.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def transformer_config(model: NewModel, *, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The Hugging Face configuration of a new model: one embedding a token of `tokenizer`. Raises ModelError."""
    from transformers import LlamaConfig, Qwen2Config

    head_size = model.hidden_size // model.heads
    if model.hidden_size % model.heads or head_size not in HEAD_SIZES:
        raise ModelError(
            "the new model's head size does not run in vLLM",
            got=f"hidden_size {model.hidden_size} / heads {model.heads} = {model.hidden_size / model.heads:g}",
            do=f"choose heads so that hidden_size / heads is one of {', '.join(map(str, HEAD_SIZES))}",
        )
    kind: Any = {"llama": LlamaConfig, "qwen2": Qwen2Config}[model.architecture]
    return kind(
        vocab_size=len(tokenizer),
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.heads,
        max_position_embeddings=model.max_position_embeddings,
        tie_word_embeddings=model.tie_word_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def make_tokenizer(model: NewModel, *, texts: list[str]) -> PreTrainedTokenizerBase:
    """A tokenizer trained on `texts`: of words and punctuation, or of bytes and merges. Deterministic.

    It puts the beginning-of-sequence token before what is encoded with special tokens, and has a plain chat template.
    Word level: decoding puts no space before `. , ! ?`, so decode(encode(x)) == x for text written that way in single
    spaces, all of whose words were in `texts`. Raises ModelError for a vocabulary too small for bytes.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    core = _word_level(model, texts) if model.tokenizer == "word" else _byte_bpe(model, texts)
    core.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="right",
        model_max_length=model.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _word_level(model: NewModel, texts: list[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    split = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(behavior="isolated")])
    counts: dict[str, int] = {}
    for text in texts:
        for word, _ in split.pre_tokenize_str(text):
            counts[word] = counts.get(word, 0) + 1
    fixed = list(dict.fromkeys((*SPECIAL_TOKENS, *_TEMPLATE_WORDS)))
    frequent = sorted((word for word in counts if word not in fixed), key=lambda word: (-counts[word], word))
    words = (fixed + frequent)[: model.vocab_size]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNK))
    core.pre_tokenizer = split
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return core


def _byte_bpe(model: NewModel, texts: list[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if model.vocab_size < len(alphabet) + len(SPECIAL_TOKENS):
        raise ModelError(
            "the vocabulary is too small for bytes",
            got=f"vocab_size {model.vocab_size}",
            do=f"set model.vocab_size to at least {len(alphabet) + len(SPECIAL_TOKENS)}",
        )
    core = Tokenizer(models.BPE(unk_token=None))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=model.vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer=trainer)
    return core
