"""What trained reward models say: their scores of answers, aggregated as the reward service will, in the type that it
serves; and from those a version's manifest.

Legend: N answers, M members.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cluster.errors import NonFiniteError
from cluster.reward_models import Calibration, RmManifest, StoredRm, version_of
from cluster.stored_models import load_stored
from configs.run import RewardSection, RunConfig
from reward_service.aggregate import MemberScales, aggregate, on_one_scale, spread
from reward_service.preferences import accuracy, length_only_accuracy, wilson_interval
from reward_service.rm.pairs import EncodedPair, PairSets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCORING_BATCH: Final = 64
"""Answers in a pass; cluster.footprint.MEASURED_ROWS."""


def load_for_scoring(directory: Path, *, dtype: str, device: Any) -> Any:
    """A stored reward model in the type that it serves in. Raises ModelError."""
    model = load_stored(directory, kind="reward model", dtype="float32" if dtype == "int8" else dtype)
    if dtype == "int8":
        from reward_service.rm.int8 import quantise

        quantise(model.base_model)
    return model.to(device).eval().requires_grad_(False)


def float32_head(model: Any) -> Any:
    """The score's head works in float32: in 16 bit, close scores would become equal ones."""
    return copy.deepcopy(model.score).float()


def trains_on_gpu(config: RunConfig) -> bool:
    """Reward models are trained on a GPU where the learner is, and this process has one."""
    import torch

    return config.learner.on_gpu and torch.cuda.is_available()


def scoring_device(config: RunConfig) -> str:
    """Where the rm stage scores: where it trained; int8 on the CPU."""
    return "cuda" if config.reward.dtype != "int8" and trains_on_gpu(config) else "cpu"


def score_sequences(model: Any, sequences: Sequence[Sequence[int]], *, pad_id: int) -> list[float]:
    """Raw score of each id sequence (prompt + answer), read at its last token by length, whatever that token is.

    Raises NonFiniteError.
    """
    import torch

    scores = [0.0] * len(sequences)
    head = float32_head(model)
    by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for start in range(0, len(by_length), SCORING_BATCH):
        picked = by_length[start : start + SCORING_BATCH]
        lengths = torch.tensor([len(sequences[i]) for i in picked])
        ids_BL = torch.full((len(picked), int(lengths.max())), pad_id)
        for row, i in enumerate(picked):
            ids_BL[row, : len(sequences[i])] = torch.tensor(sequences[i])
        mask_BL = torch.arange(ids_BL.shape[1])[None, :] < lengths[:, None]
        with torch.inference_mode():
            hidden_BLD = model.base_model(
                input_ids=ids_BL.to(model.device), attention_mask=mask_BL.long().to(model.device), use_cache=False
            ).last_hidden_state
            last_BD = hidden_BLD[torch.arange(len(picked)), (lengths - 1).to(hidden_BLD.device)]
            values: list[float] = head(last_BD.float())[:, 0].tolist()
        for i, value in zip(picked, values, strict=True):
            scores[i] = value
    if not all(map(math.isfinite, scores)):
        raise NonFiniteError("the reward model's scores are not finite", do="lower rm.learning_rate")
    return scores


class Ensemble:
    """The members of one version, and their discriminator, in memory. Scores are remembered: the same answers are asked
    for by the manifest and the card."""

    def __init__(
        self,
        member_dirs: Sequence[Path],
        *,
        discriminator_dir: Path | None = None,
        reward: RewardSection,
        tokenizer: PreTrainedTokenizerBase,
        device: str,
        dtype: str | None = None,
        scales: MemberScales = (),
    ) -> None:
        """`scales`: as the version's manifest has them; a version that is being made takes its own, by take_scales."""
        dtype = dtype or reward.dtype
        self.scales = tuple(scales)
        self._reward = reward
        self._pad_id = int(tokenizer.pad_token_id)
        self._members = [load_for_scoring(directory, dtype=dtype, device=device) for directory in member_dirs]
        self._discriminator = (
            None if discriminator_dir is None else load_for_scoring(discriminator_dir, dtype=dtype, device=device)
        )
        self._known: dict[tuple[int, ...], list[float]] = {}

    @classmethod
    def of(
        cls, stored: StoredRm, *, reward: RewardSection, tokenizer: PreTrainedTokenizerBase, device: str
    ) -> Ensemble:
        """A version as it serves."""
        return cls(
            stored.member_dirs,
            discriminator_dir=stored.discriminator_dir,
            reward=reward,
            tokenizer=tokenizer,
            device=device,
            scales=stored.manifest.member_scales,
        )

    def take_scales(self, pairs: Sequence[EncodedPair]) -> None:
        """From the pairs' answers, the calibration set. A single model keeps its own scale."""
        if len(self._members) > 1:
            scores_NM = self._raw_scores([ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)])
            scores_MN = zip(*scores_NM, strict=True)
            self.scales = tuple((statistics.fmean(scores_N), statistics.pstdev(scores_N)) for scores_N in scores_MN)

    def member_scores(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """[N][M] scores, on one scale."""
        return [on_one_scale(scores_M, self.scales) for scores_M in self._raw_scores(sequences)]

    def _raw_scores(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        keys = [tuple(sequence) for sequence in sequences]
        new = [key for key in dict.fromkeys(keys) if key not in self._known]
        columns = [score_sequences(model, new, pad_id=self._pad_id) for model in self._members]
        for index, key in enumerate(new):
            self._known[key] = [column[index] for column in columns]
        return [self._known[key] for key in keys]

    @property
    def discriminates(self) -> bool:
        """There is a discriminator."""
        return self._discriminator is not None

    def discriminator_scores(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """[N] raw scores of the model that is kept out of the reward."""
        return score_sequences(self._discriminator, sequences, pad_id=self._pad_id)

    def aggregate(self, scores_M: Sequence[float]) -> float:
        """Members → the score that serves."""
        return aggregate(scores_M, how=self._reward.aggregation, std_coefficient=self._reward.std_coefficient)

    def margins(self, pairs: Sequence[EncodedPair]) -> list[float]:
        """Aggregated score of the preferred answer less that of the other, of each pair."""
        return [self.aggregate(chosen) - self.aggregate(rejected) for chosen, rejected in self._sides(pairs)]

    def member_margins(self, pairs: Sequence[EncodedPair]) -> list[list[float]]:
        """[M][pairs] the same of each member alone."""
        rows = [[c - r for c, r in zip(chosen, rejected, strict=True)] for chosen, rejected in self._sides(pairs)]
        return [list(column) for column in zip(*rows, strict=True)]

    def _sides(self, pairs: Sequence[EncodedPair]) -> list[tuple[list[float], list[float]]]:
        chosen = self.member_scores([pair.chosen_ids for pair in pairs])
        return list(zip(chosen, self.member_scores([pair.rejected_ids for pair in pairs]), strict=True))


def calibrate(ensemble: Ensemble, pairs: Sequence[EncodedPair]) -> tuple[Calibration, tuple[float, ...]]:
    """(mean and deviation of the aggregated score over the pairs' answers, percentiles 0 to 100 of the members'
    spread: none for a single model)."""
    import numpy as np

    scores_NM = ensemble.member_scores([ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)])
    rewards = [ensemble.aggregate(scores_M) for scores_M in scores_NM]
    calibration = Calibration(mean=statistics.fmean(rewards), std=statistics.pstdev(rewards), count=len(rewards))
    if len(scores_NM[0]) == 1:
        return calibration, ()
    percentiles = np.percentile([spread(scores_M) for scores_M in scores_NM], range(101))
    return calibration, tuple(map(float, percentiles))


def manifest_of(draft: Path, *, ensemble: Ensemble, sets: PairSets, **facts: Any) -> RmManifest:
    """Everything that is measured; `facts`: the manifest's other fields."""
    held_out = sets.held_out
    share = accuracy(ensemble.margins(held_out))
    low, high = wilson_interval(share, n=len(held_out))
    by_member = [accuracy(margins) for margins in ensemble.member_margins(held_out)]
    calibration, percentiles = calibrate(ensemble, sets.calibration)
    discriminator = _discriminator_accuracy(ensemble, held_out) if ensemble.discriminates else None
    return RmManifest(
        version=version_of(draft),
        members=len(by_member),
        pairs_held_out=len(held_out),
        accuracy=share,
        accuracy_low=low,
        accuracy_high=high,
        length_only_accuracy=length_only_accuracy(
            [pair.answer_lengths for pair in sets.train], [pair.answer_lengths for pair in held_out]
        ),
        member_accuracies=tuple(by_member),
        calibration=calibration,
        member_scales=ensemble.scales,
        spread_percentiles=percentiles,
        discriminator=ensemble.discriminates,
        discriminator_accuracy=discriminator,
        **facts,
    )


@dataclass(frozen=True)
class PrecisionCost:
    """What serving in another type than float32 costs on held-out pairs: their accuracy in both, the share ordered
    otherwise, and the root mean square of the scores' change, in standard deviations of the score."""

    dtype: str
    accuracy: float
    float32_accuracy: float
    order_changed: float
    score_change: float

    def __str__(self) -> str:
        return (
            f"{self.dtype}: accuracy {self.accuracy:.3f}, in float32 {self.float32_accuracy:.3f}; "
            f"{self.order_changed:.1%} of pairs ordered otherwise, scores off by {self.score_change:.3f} deviations"
        )


def precision_cost(served: Ensemble, exact: Ensemble, pairs: Sequence[EncodedPair], *, dtype: str) -> PrecisionCost:
    """The same models in the type that serves and in float32."""
    margins, exact_margins = served.margins(pairs), exact.margins(pairs)
    sequences = [ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    scores, wanted = (
        [ensemble.aggregate(scores_M) for scores_M in ensemble.member_scores(sequences)] for ensemble in (served, exact)
    )
    square = statistics.fmean((a - b) ** 2 for a, b in zip(scores, wanted, strict=True))
    return PrecisionCost(
        dtype=dtype,
        accuracy=accuracy(margins),
        float32_accuracy=accuracy(exact_margins),
        order_changed=statistics.fmean((a > 0) != (b > 0) for a, b in zip(margins, exact_margins, strict=True)),
        score_change=math.sqrt(square) / (statistics.pstdev(wanted) or 1.0),
    )


def _discriminator_accuracy(ensemble: Ensemble, pairs: Sequence[EncodedPair]) -> float:
    chosen = ensemble.discriminator_scores([pair.chosen_ids for pair in pairs])
    rejected = ensemble.discriminator_scores([pair.rejected_ids for pair in pairs])
    return accuracy([c - r for c, r in zip(chosen, rejected, strict=True)])
