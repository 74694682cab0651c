"""The real scorer: a reward-model ensemble and the reference policy, as Hugging Face models in this process.

Legend: B rollouts in a forward pass, L padded length, P prompt tokens, T response tokens, H hidden size, V vocabulary,
N response tokens of a whole pass, M ensemble members.

Every sequence is prompt + response, padded on the right, with an explicit attention mask. Models are causal, so what
stands right of a token cannot change it: a rollout scores the same alone and in any batch. Positions come from lengths,
never from comparing ids with the pad token, which may be a token that answers use.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from cluster.errors import ModelError, ScoringError
from cluster.records import Float32s, Rollout
from cluster.reward_models import NO_MODEL, StoredRm
from cluster.stored_models import load_stored
from cluster.text import load_tokenizer
from reward_service.batcher import forward_groups
from reward_service.rm.measure import float32_head, load_for_scoring
from reward_service.scorer import Scores

log = logging.getLogger(__name__)

_LOGIT_ELEMENTS: Final = 2**26
"""Most logits at a time: 256 MiB of float32."""
_PROBE_TOKENS: Final = 5
_PROBE_TOLERANCE: Final = 1e-3


@dataclass(frozen=True)
class ScorerSettings:
    """batch_size and token_budget bound one forward pass. threads: compute threads of this process; None leaves them.
    device: a torch device. dtype: of the weights; scores and log-probs are float32 regardless."""

    batch_size: int = 64
    token_budget: int = 8192
    threads: int | None = None
    device: str = "cpu"
    dtype: str = "float32"


@dataclass(frozen=True, eq=False)
class _Headed:
    """A decoder and what turns its last hidden state [.., H] into scores [.., 1] or logits [.., V]."""

    base: nn.Module
    head: nn.Module
    max_positions: int

    def hidden(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """[B, L, H]"""
        hidden: Tensor = self.base(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).last_hidden_state
        return hidden


class TransformersScorer:
    """`Scorer` over one stored reward model and the model in `reference_dir`.

    The policy's tokenizer is that of `tokenizer_dir` (default: `reference_dir`). Reward models with another vocabulary
    get the decoded text encoded with their own tokenizer. Without a reward model (None) every answer has no member
    scores. Raises ModelError when anything is missing or does not fit.
    """

    def __init__(
        self,
        stored: StoredRm | None,
        *,
        reference_dir: Path,
        settings: ScorerSettings,
        tokenizer_dir: Path | None = None,
    ) -> None:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self._settings = settings
        self._device = torch.device(settings.device)
        self._policy_tokenizer: Any = load_tokenizer(tokenizer_dir or reference_dir)
        self._take(stored)
        self._reference = self._load(reference_dir, classifier=False)
        self.reference_id = weights_id(reference_dir)

    def with_reward_model(self, stored: StoredRm) -> TransformersScorer:
        """Another version beside this one, which goes on unchanged; both share the reference model. May run in another
        thread than `score`. Raises ModelError."""
        other = copy.copy(self)
        other._take(stored)
        return other

    def _take(self, stored: StoredRm | None) -> None:
        directories = [] if stored is None else stored.member_dirs
        self.version = NO_MODEL if stored is None else stored.version
        self._members = [self._load(directory, classifier=True) for directory in directories]
        self._rm_tokenizer: Any = _other_tokenizer(directories[0], self._policy_tokenizer) if directories else None

    @property
    def members(self) -> int:
        """M."""
        return len(self._members)

    @property
    def eos_id(self) -> int:
        """The policy's end-of-sequence token."""
        return int(self._policy_tokenizer.eos_token_id)

    def texts(self, batch: Sequence[Rollout]) -> list[tuple[str, str]]:
        decode = self._policy_tokenizer.batch_decode
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        prompts: list[str] = decode([rollout.task.prompt_ids.tolist() for rollout in batch], **options)
        answers: list[str] = decode([rollout.response_ids.tolist() for rollout in batch], **options)
        return list(zip(prompts, answers, strict=True))

    def score(self, batch: Sequence[Rollout]) -> list[Scores]:
        members, references = self.member_scores(batch), self.reference_logprobs(batch)
        return [Scores(scores_M, values_T) for scores_M, values_T in zip(members, references, strict=True)]

    @torch.inference_mode()
    def member_scores(self, batch: Sequence[Rollout]) -> list[tuple[float, ...]]:
        if not self._members:
            return [()] * len(batch)
        sequences = [_sequence(rollout) for rollout in batch] if self._rm_tokenizer is None else self._reencode(batch)
        names = [rollout.task.task_id for rollout in batch]
        limit = min(member.max_positions for member in self._members)
        _check_lengths(sequences, names=names, limit=limit, model="the reward model")
        # float32 by name: while another model loads beside this one, Transformers changes torch's default type.
        scores_BM = torch.empty(len(batch), len(self._members), dtype=torch.float32)
        for group in self._groups(sequences):
            ids_BL, mask_BL, lengths_B = self._padded([sequences[index] for index in group])
            for number, member in enumerate(self._members):
                hidden_BLH = member.hidden(ids_BL, mask_BL)
                last_BH = hidden_BLH[torch.arange(len(group), device=self._device), lengths_B - 1]
                scores_BM[group, number] = member.head(last_BH.float()).squeeze(-1).cpu()
        answers = [tuple(scores_M) for scores_M in scores_BM.tolist()]
        for name, scores_M in zip(names, answers, strict=True):
            if not all(map(math.isfinite, scores_M)):
                raise _not_finite(name, f"reward model scores {scores_M}")
        return answers

    @torch.inference_mode()
    def reference_logprobs(self, batch: Sequence[Rollout]) -> list[Float32s]:
        sequences = [_sequence(rollout) for rollout in batch]
        names = [rollout.task.task_id for rollout in batch]
        _check_lengths(sequences, names=names, limit=self._reference.max_positions, model="the reference model")
        logprobs: list[Float32s] = [np.empty(0, dtype=np.float32)] * len(batch)
        for group in self._groups(sequences):
            rollouts = [batch[index] for index in group]
            per_rollout = self._reference_group(rollouts, [sequences[index] for index in group])
            for index, values_T in zip(group, per_rollout, strict=True):
                logprobs[index] = values_T
        for name, values_T in zip(names, logprobs, strict=True):
            if not np.isfinite(values_T).all():
                raise _not_finite(name, "reference log-probs with NaN or infinity")
        return logprobs

    def _reference_group(self, rollouts: Sequence[Rollout], sequences: Sequence[list[int]]) -> list[Float32s]:
        ids_BL, mask_BL, _ = self._padded(sequences)
        hidden_BLH = self._reference.hidden(ids_BL, mask_BL)
        prompt_lengths = [len(rollout.task.prompt_ids) for rollout in rollouts]
        counts = [len(rollout.response_ids) for rollout in rollouts]
        rows_N = torch.repeat_interleave(torch.arange(len(rollouts)), torch.tensor(counts))
        # The state at position p predicts the token at p + 1: response token t is predicted at P + t − 1.
        at_N = torch.cat([torch.arange(p - 1, p - 1 + t) for p, t in zip(prompt_lengths, counts, strict=True)])
        rows_N, at_N = rows_N.to(self._device), at_N.to(self._device)
        temperatures = [rollout.task.temperature for rollout in rollouts]
        temperatures_N = torch.tensor(temperatures, dtype=torch.float32, device=self._device)[rows_N]
        values_N = _chosen_logprobs(
            self._reference.head,
            hidden_NH=hidden_BLH[rows_N, at_N],
            chosen_N=ids_BL[rows_N, at_N + 1],
            temperatures_N=temperatures_N,
        ).cpu()
        return [part.numpy() for part in torch.split(values_N, counts)]

    def _groups(self, sequences: Sequence[list[int]]) -> list[list[int]]:
        lengths = [len(sequence) for sequence in sequences]
        return forward_groups(lengths, count=self._settings.batch_size, token_budget=self._settings.token_budget)

    def _padded(self, sequences: Sequence[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Right-padded ids [B, L], attention mask [B, L], lengths [B]. Padding is id 0: masked, so any id would do."""
        lengths_B = torch.tensor([len(sequence) for sequence in sequences])
        width = int(lengths_B.max())
        ids_BL = torch.zeros(len(sequences), width, dtype=torch.long)
        for row, sequence in enumerate(sequences):
            ids_BL[row, : len(sequence)] = torch.tensor(sequence)
        mask_BL = (torch.arange(width) < lengths_B[:, None]).long()
        return ids_BL.to(self._device), mask_BL.to(self._device), lengths_B.to(self._device)

    def _reencode(self, batch: Sequence[Rollout]) -> list[list[int]]:
        """Ids of the reward model's own tokenizer: its beginning-of-sequence token if it adds one, prompt, answer, and
        its end-of-sequence token where the answer ended by itself: what the reward model was trained on."""
        tokenizer = self._rm_tokenizer
        sequences = []
        for (prompt, answer), rollout in zip(self.texts(batch), batch, strict=True):
            ids: list[int] = tokenizer(prompt, split_special_tokens=True, verbose=False)["input_ids"]
            ids = (
                ids + tokenizer(answer, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
            )
            sequences.append([*ids, tokenizer.eos_token_id] if rollout.finish_reason == "stop" else ids)
        return sequences

    def _load(self, directory: Path, *, classifier: bool) -> _Headed:
        dtype = self._settings.dtype
        if classifier:
            model = load_for_scoring(directory, dtype=dtype, device=self._device)
            head = float32_head(model)
        else:
            model = load_stored(directory, kind="language model", dtype="float32" if dtype == "int8" else dtype)
            model = model.to(self._device).eval().requires_grad_(False)
            head = model.get_output_embeddings()
        headed = _Headed(model.base_model, head, int(model.config.get_text_config().max_position_embeddings))
        self._probe(model, headed, directory)
        return headed

    @torch.inference_mode()
    def _probe(self, model: Any, headed: _Headed, directory: Path) -> None:
        """Applying the head to the hidden state must give the model's own output: not so where an architecture scales
        or caps its logits. Better refused here than wrong for a whole run."""
        pad = model.config.get_text_config().pad_token_id
        ids = [token for token in range(_PROBE_TOKENS + 1) if token != pad][:_PROBE_TOKENS]
        ids_BL, mask_BL, _ = self._padded([ids])
        expected = model(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).logits.float()
        state_BH = headed.hidden(ids_BL, mask_BL)[:, -1]
        actual = headed.head(state_BH.to(next(headed.head.parameters()).dtype)).float()
        wanted = expected[:, -1] if expected.dim() == 3 else expected
        tolerance = _PROBE_TOLERANCE if self._settings.dtype == "float32" else 0.1
        if not torch.allclose(actual, wanted, rtol=tolerance, atol=tolerance):
            raise ModelError(
                f"{type(model).__name__} does more to its output than apply its head",
                got=f"{directory}: differs by {(actual - wanted).abs().max().item():.3g} from the model's own output",
                do="use an architecture with a plain linear head, such as Llama, Mistral or Qwen",
            )


def weights_id(directory: Path) -> str:
    """16 hex digits naming the weights in a model directory: name, size and first MiB of each file, and the
    configuration. (All bytes of a large model would take longer than loading it.)"""
    digest = hashlib.sha256()
    for path in sorted([*directory.glob("*.safetensors"), *directory.glob("config.json")]):
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(2**20))
    return digest.hexdigest()[:16]


def _other_tokenizer(member_dir: Path, policy_tokenizer: Any) -> Any | None:
    """The reward model's tokenizer if it numbers tokens differently from the policy's; None if ids can be shared."""
    if not (member_dir / "tokenizer_config.json").is_file():
        return None
    tokenizer: Any = load_tokenizer(member_dir)
    if tokenizer.get_vocab() == policy_tokenizer.get_vocab():
        return None
    log.info("reward model and policy have different vocabularies: answers are decoded and encoded again")
    return tokenizer


def _sequence(rollout: Rollout) -> list[int]:
    return [*rollout.task.prompt_ids.tolist(), *rollout.response_ids.tolist()]


def _chosen_logprobs(head: nn.Module, *, hidden_NH: Tensor, chosen_N: Tensor, temperatures_N: Tensor) -> Tensor:
    """[N] float32 log softmax(head(hidden) / temperature) at the chosen ids, a bounded number of logits at a time."""
    rows = max(1, _LOGIT_ELEMENTS // int(head(hidden_NH[:1]).shape[-1]))
    parts: list[Tensor] = []
    for start in range(0, len(chosen_N), rows):
        piece = slice(start, start + rows)
        logits_NV = head(hidden_NH[piece]).float() / temperatures_N[piece, None]
        parts.append(logits_NV.log_softmax(-1).gather(-1, chosen_N[piece, None]).squeeze(-1))
    return torch.cat(parts)


def _check_lengths(sequences: Sequence[list[int]], *, names: Sequence[str], limit: int, model: str) -> None:
    for name, sequence in zip(names, sequences, strict=True):
        if not sequence:  # beside others it would be scored by what is padding
            raise ScoringError(f"task {name} has nothing that {model} can read", got="no tokens after decoding")
        if len(sequence) > limit:
            raise ScoringError(
                f"task {name} is longer than {model} can read",
                got=f"{len(sequence)} tokens, at most {limit}",
                do="lower data.max_prompt_tokens or data.max_response_tokens",
            )


def _not_finite(task_id: str, got: str) -> ScoringError:
    return ScoringError(f"task {task_id} has no finite score", got=got, do="check the model's weights and dtype")
