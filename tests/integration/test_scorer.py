"""The real scorer on tiny Hugging Face models, against each model's own forward pass on the unpadded sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.errors import ModelError, ScoringError
from cluster.records import PromptTask, Rollout, VersionRun, pack_floats, pack_ids
from cluster.reward_models import NO_MODEL, RmManifest, StoredRm
from reward_service.scorer_transformers import ScorerSettings, TransformersScorer, weights_id

PAD, BOS, EOS, UNK = 0, 1, 2, 3
WORDS = ["my", "router", "is", "broken", "reset", "it", "check", "the", "cable", "."]
POISON_ID = 13  # "."
SETTINGS = ScorerSettings(batch_size=8, token_budget=64)
Models = tuple[StoredRm, Path, list[Any], Any]


def save_tokenizer(directory: Path, words: Sequence[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: index for index, token in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(directory)


def llama_config(*, tied: bool = True, **extra: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        tie_word_embeddings=tied,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        initializer_range=0.3,
        **extra,
    )


def save_member(
    directory: Path, *, seed: int, words: Sequence[str] | None = WORDS, nan_token: int | None = None
) -> Any:
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(llama_config(num_labels=1)).eval()
    if nan_token is not None:
        with torch.no_grad():
            model.model.embed_tokens.weight[nan_token] = math.nan
    model.save_pretrained(directory)
    if words is not None:
        save_tokenizer(directory, words)
    return model


def save_reference(directory: Path, *, tied: bool = True, seed: int = 7) -> Any:
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama_config(tied=tied)).eval()
    model.save_pretrained(directory)
    save_tokenizer(directory, WORDS)
    return model


def stored_rm(directory: Path, *, members: int, version: str = "rm-abc") -> StoredRm:
    """A version whose members are in `directory`."""
    return StoredRm(directory, RmManifest(version=version, members=members))


@pytest.fixture(name="models")
def make_models(tmp_path: Path) -> Models:
    """(stored reward model, reference_dir, members, reference)."""
    members = [save_member(tmp_path / "rm" / f"member_{seed}", seed=seed) for seed in range(2)]
    return stored_rm(tmp_path / "rm", members=2), tmp_path / "ref", members, save_reference(tmp_path / "ref")


def rollout(
    prompt: Sequence[int], response: Sequence[int], *, temperature: float = 1.0, finish: str = "stop", name: str = "t"
) -> Rollout:
    task = PromptTask(
        task_id=name,
        prompt_id="p",
        group_id="g",
        prompt_ids_i32=pack_ids(prompt),
        max_new_tokens=16,
        temperature=temperature,
    )
    return Rollout(
        task=task,
        response_ids_i32=pack_ids(response),
        behaviour_logprobs_f32=pack_floats([-1.0] * len(response)),
        version_runs=(VersionRun(0, 0),),
        finish_reason=finish,
        actor="a",
        generate_s=0.0,
    )


BATCH = [
    rollout([4, 5, 6, 7], [8, 9, EOS], name="a"),
    rollout([4], [10, 11, 12, 4, 5, 6, 7, 8, 9, 10, EOS], temperature=0.6, name="b"),
    rollout([4, 5, 6, 7, 8, 9], [EOS], temperature=1.7, name="c"),
    rollout([5, 5], [8, 9, 10, 11], finish="length", name="d"),
    rollout([6, 4], [8, PAD, 9, PAD], finish="length", name="e"),  # ids of the pad token are ordinary tokens
]


@torch.no_grad()
def own_score(model: Any, ids: Sequence[int]) -> float:
    hidden = model.model(input_ids=torch.tensor([list(ids)])).last_hidden_state
    return float(hidden[0, -1] @ model.score.weight[0])


@torch.no_grad()
def own_logprobs(model: Any, item: Rollout) -> list[float]:
    prompt, response = item.task.prompt_ids.tolist(), item.response_ids.tolist()
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0].double() / item.task.temperature
    values = []
    for step, token in enumerate(response):
        row = logits[len(prompt) + step - 1]
        values.append(float(row[token] - torch.logsumexp(row, 0)))
    return values


def test_in_bfloat16_scores_stay_close(models: Models) -> None:
    """About 40 roundings to 8 significant bits, each by 0.2 % of a state's length, are 1 % together, the largest of ten
    some 3 %, and attention with weights as large as these doubles or triples it: within a tenth of the scores' spread.
    Both answers are float32."""
    stored, reference_dir, _, _ = models
    scores, logprobs = {}, {}
    for dtype in ("float32", "bfloat16"):
        settings = ScorerSettings(batch_size=8, token_budget=64, dtype=dtype)
        scorer = TransformersScorer(stored, reference_dir=reference_dir, settings=settings)
        answers = scorer.score(BATCH)
        scores[dtype] = np.array([answer.member_scores for answer in answers])
        logprobs[dtype] = np.concatenate([answer.ref_logprobs for answer in answers])
    assert scores["bfloat16"].std() > 0
    assert np.abs(scores["bfloat16"] - scores["float32"]).max() < 0.1 * scores["float32"].std()
    assert np.abs(logprobs["bfloat16"] - logprobs["float32"]).max() < 0.1
    assert logprobs["bfloat16"].dtype == np.float32
    # Not rounded to 16 bit: a float32 with the lower half of its bits zero.
    assert (scores["bfloat16"].astype(np.float32).view(np.uint32) & 0xFFFF).any()


def test_in_int8_scores_stay_close_and_company_changes_nothing(models: Models) -> None:
    """Each of some 14 products rounds activations to 7 bits and weights to 8, each by about 1 % of a state's length:
    4 % together, and attention with weights as large as these doubles or triples it."""
    stored, reference_dir, _, reference = models
    exact = TransformersScorer(stored, reference_dir=reference_dir, settings=SETTINGS)
    settings = ScorerSettings(batch_size=8, token_budget=64, dtype="int8")
    scorer = TransformersScorer(stored, reference_dir=reference_dir, settings=settings)
    scores = np.array(scorer.member_scores(BATCH))
    wanted = np.array(exact.member_scores(BATCH))
    assert (scores != wanted).any()
    assert np.abs(scores - wanted).max() < 0.2 * wanted.std()
    for item, in_batch in zip(BATCH, scores.tolist(), strict=True):
        assert list(scorer.member_scores([item])[0]) == pytest.approx(in_batch, abs=1e-5)
    # The reference model keeps float32: the KL penalty is made of its log-probs.
    assert scorer.reference_logprobs(BATCH[:1])[0].tolist() == pytest.approx(
        own_logprobs(reference, BATCH[0]), abs=1e-5
    )


def test_scores_and_reference_logprobs_equal_the_models_own(models: Models) -> None:
    stored, reference_dir, members, reference = models
    scorer = TransformersScorer(stored, reference_dir=reference_dir, settings=SETTINGS)
    assert (scorer.version, scorer.members) == ("rm-abc", 2)
    for item, scores in zip(BATCH, scorer.score(BATCH), strict=True):
        ids = [*item.task.prompt_ids.tolist(), *item.response_ids.tolist()]
        assert scores.member_scores == pytest.approx([own_score(member, ids) for member in members], abs=1e-5)
        assert scores.ref_logprobs.tolist() == pytest.approx(own_logprobs(reference, item), abs=1e-5)
        assert str(scores.ref_logprobs.dtype) == "float32"


def test_hugging_face_pools_the_same_token_where_no_pad_is_in_the_answer(
    models: Models,
) -> None:
    stored, reference_dir, members, _ = models
    scorer = TransformersScorer(stored, reference_dir=reference_dir, settings=SETTINGS)
    ids = torch.tensor([[4, 5, 6, 7, 8, 9, EOS]])
    with torch.no_grad():
        expected = [float(member(input_ids=ids).logits[0, 0]) for member in members]
    assert scorer.score(BATCH[:1])[0].member_scores == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("token_budget", [1, 20, 1000])
def test_company_in_the_batch_changes_nothing(models: Models, token_budget: int) -> None:
    stored, reference_dir, _, _ = models
    settings = ScorerSettings(batch_size=3, token_budget=token_budget)
    scorer = TransformersScorer(stored, reference_dir=reference_dir, settings=settings)
    together = scorer.score(BATCH)
    for item, in_batch in zip(BATCH, together, strict=True):
        (alone,) = scorer.score([item])
        assert in_batch.member_scores == pytest.approx(alone.member_scores, abs=1e-5)
        assert in_batch.ref_logprobs.tolist() == pytest.approx(alone.ref_logprobs.tolist(), abs=1e-5)
    for values_T, in_batch in zip(scorer.reference_logprobs(BATCH), together, strict=True):
        assert values_T.tolist() == in_batch.ref_logprobs.tolist()


def test_few_logits_at_a_time_give_the_same(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, reference_dir, _, reference = models
    monkeypatch.setattr("reward_service.scorer_transformers._LOGIT_ELEMENTS", 3 * 16)
    scorer = TransformersScorer(stored, reference_dir=reference_dir, settings=SETTINGS)
    for item, values_T in zip(BATCH, scorer.reference_logprobs(BATCH), strict=True):
        assert values_T.tolist() == pytest.approx(own_logprobs(reference, item), abs=1e-5)


def test_untied_output_embeddings_are_used(tmp_path: Path, models: Models) -> None:
    reference = save_reference(tmp_path / "untied", tied=False)
    scorer = TransformersScorer(models[0], reference_dir=tmp_path / "untied", settings=SETTINGS)
    assert scorer.reference_logprobs(BATCH[:1])[0].tolist() == pytest.approx(
        own_logprobs(reference, BATCH[0]), abs=1e-5
    )


def test_text_is_the_policys_without_special_tokens(models: Models) -> None:
    scorer = TransformersScorer(models[0], reference_dir=models[1], settings=SETTINGS)
    assert scorer.texts(BATCH[:1]) == [("my router is broken", "reset it")]


def test_a_reward_model_with_another_vocabulary_reads_the_text(tmp_path: Path) -> None:
    words = WORDS[::-1]
    member = save_member(tmp_path / "rm" / "member_0", seed=3, words=words)
    save_reference(tmp_path / "ref")
    scorer = TransformersScorer(
        stored_rm(tmp_path / "rm", members=1), reference_dir=tmp_path / "ref", settings=SETTINGS
    )
    # In the reversed vocabulary the word with policy id i has id 17 - i.
    stopped, cut = [13, 12, 11, 10, 9, 8, EOS], [12, 12, 9, 8, 7, 6]
    answers = scorer.score([BATCH[0], BATCH[3]])
    assert answers[0].member_scores == pytest.approx([own_score(member, stopped)], abs=1e-5)
    assert answers[1].member_scores == pytest.approx([own_score(member, cut)], abs=1e-5)


def test_a_member_without_tokenizer_shares_the_policys(tmp_path: Path) -> None:
    member = save_member(tmp_path / "rm" / "member_0", seed=3, words=None)
    save_reference(tmp_path / "ref")
    scorer = TransformersScorer(
        stored_rm(tmp_path / "rm", members=1), reference_dir=tmp_path / "ref", settings=SETTINGS
    )
    expected = own_score(member, [4, 5, 6, 7, 8, 9, EOS])
    assert scorer.score(BATCH[:1])[0].member_scores == pytest.approx([expected], abs=1e-5)


def test_a_score_that_is_not_finite_names_its_task_and_spares_the_others(tmp_path: Path) -> None:
    save_member(tmp_path / "rm" / "member_0", seed=0, nan_token=POISON_ID)
    save_reference(tmp_path / "ref")
    scorer = TransformersScorer(
        stored_rm(tmp_path / "rm", members=1), reference_dir=tmp_path / "ref", settings=SETTINGS
    )
    bad = rollout([4], [POISON_ID, EOS], name="bad-task")
    with pytest.raises(ScoringError, match="bad-task"):
        scorer.score([*BATCH, bad])
    assert all(math.isfinite(*scores.member_scores) for scores in scorer.score(BATCH))


def test_a_sequence_over_the_models_positions_names_its_task(models: Models) -> None:
    scorer = TransformersScorer(models[0], reference_dir=models[1], settings=SETTINGS)
    with pytest.raises(ScoringError, match=r"long-task.*\n.*25 tokens, at most 24"):
        scorer.score([rollout([4] * 20, [5] * 5, name="long-task")])


def test_a_text_that_is_empty_for_the_reward_model_has_no_score(tmp_path: Path) -> None:
    save_member(tmp_path / "rm" / "member_0", seed=0, words=WORDS[::-1])  # reads text
    save_reference(tmp_path / "ref")
    scorer = TransformersScorer(
        stored_rm(tmp_path / "rm", members=1), reference_dir=tmp_path / "ref", settings=SETTINGS
    )
    empty = rollout([BOS], [PAD], finish="length", name="empty-task")
    with pytest.raises(ScoringError, match=r"empty-task(.|\n)*no tokens"):
        scorer.member_scores([BATCH[0], empty])


def test_reference_id_follows_the_weights(tmp_path: Path) -> None:
    for name, seed in [("one", 1), ("same", 1), ("other", 2)]:
        save_reference(tmp_path / name, seed=seed)
    ids = [weights_id(tmp_path / name) for name in ("one", "same", "other")]
    assert ids[0] == ids[1] != ids[2]


def test_without_a_reward_model_there_are_no_member_scores(models: Models) -> None:
    scorer = TransformersScorer(None, reference_dir=models[1], settings=SETTINGS)
    assert (scorer.version, scorer.members) == (NO_MODEL, 0)
    scores = scorer.score(BATCH)
    assert [one.member_scores for one in scores] == [()] * len(BATCH)
    assert scores[0].ref_logprobs.tolist() == pytest.approx(own_logprobs(models[3], BATCH[0]), abs=1e-5)


def test_another_version_beside_the_first_changes_nothing_of_it(tmp_path: Path, models: Models) -> None:
    stored, reference_dir, members, reference = models
    first = TransformersScorer(stored, reference_dir=reference_dir, settings=SETTINGS)
    words = WORDS[::-1]  # with a vocabulary of its own, which the first has not
    member = save_member(tmp_path / "next" / "member_0", seed=9, words=words)
    second = first.with_reward_model(stored_rm(tmp_path / "next", members=1, version="rm-next"))
    assert (first.version, first.members, second.version, second.members) == ("rm-abc", 2, "rm-next", 1)
    assert second.reference_id == first.reference_id
    ids = [4, 5, 6, 7, 8, 9, EOS]
    assert first.score(BATCH[:1])[0].member_scores == pytest.approx([own_score(m, ids) for m in members], abs=1e-5)
    (scores,) = second.score(BATCH[:1])
    assert scores.member_scores == pytest.approx([own_score(member, [13, 12, 11, 10, 9, 8, EOS])], abs=1e-5)
    assert scores.ref_logprobs.tolist() == pytest.approx(own_logprobs(reference, BATCH[0]), abs=1e-5)


# ---------------------------------------------------------------- what does not fit


def test_missing_reference_and_empty_member(tmp_path: Path, models: Models) -> None:
    with pytest.raises(ModelError, match="model not found"):
        TransformersScorer(models[0], reference_dir=tmp_path / "nowhere", settings=SETTINGS)
    (tmp_path / "rm" / "member_1" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot load the model"):
        TransformersScorer(models[0], reference_dir=models[1], settings=SETTINGS)


def test_a_language_model_is_no_reward_model(tmp_path: Path) -> None:
    save_reference(tmp_path / "rm" / "member_0")
    save_reference(tmp_path / "ref")
    with pytest.raises(ModelError):
        TransformersScorer(stored_rm(tmp_path / "rm", members=1), reference_dir=tmp_path / "ref", settings=SETTINGS)


def test_an_architecture_that_caps_its_logits_is_refused(tmp_path: Path, models: Models) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        final_logit_softcapping=0.5,
        initializer_range=0.3,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    save_tokenizer(tmp_path / "gemma", WORDS)
    with pytest.raises(ModelError, match="more to its output"):
        TransformersScorer(models[0], reference_dir=tmp_path / "gemma", settings=SETTINGS)
