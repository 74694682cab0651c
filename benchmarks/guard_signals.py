"""What the guard's signals cost a step: a batch of 128 answers of 60 tokens, and one of 512 answers of 1,000.

    python -m benchmarks.guard_signals [--repeat 5]

Answers are random words with Zipf's frequencies, one a token, from vocabularies of 500 and 32,000. Printed: seconds
of CPU time of reading a step (median), of each part, and of building the reader from the reference, which a start pays
once. Decoding the answers is not counted: the learner needs their texts anyway.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import numpy as np

from learner.guard import text_signals
from learner.guard.copying import RunIndex
from learner.guard.overuse import Overuse
from learner.guard.reading import SignalReader, StepView
from learner.guard.reference import Reference, RewardScale
from learner.guard.spans import TokenIds

SIZES = ((128, 60, 500), (512, 1000, 32_000))
"""(Answers, tokens of each, vocabulary)."""
REFERENCE_ANSWERS = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    for answers, tokens, vocabulary in SIZES:
        print(json.dumps(measure(answers, tokens=tokens, vocabulary=vocabulary, repeat=repeat), indent=1))


def measure(answers: int, *, tokens: int, vocabulary: int, repeat: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    words = np.array([f"word{number}" for number in range(vocabulary)])
    weights = 1.0 / np.arange(1, vocabulary + 1)

    def some(count: int) -> tuple[tuple[TokenIds, ...], tuple[str, ...]]:
        ids = rng.choice(vocabulary, size=(count, tokens), p=weights / weights.sum()).astype(np.int32)
        return tuple(ids), tuple(" ".join(words[row]) for row in ids)

    reference_ids, reference_texts = some(REFERENCE_ANSWERS)
    reference = Reference(
        answers=reference_texts,
        prompts=tuple(str(place) for place in range(REFERENCE_ANSWERS)),
        token_ids=reference_ids,
        rewards=rng.normal(size=REFERENCE_ANSWERS),
        rewards_version="rm",
        sft_ids=reference_ids,
    )
    readers: list[SignalReader] = []
    build = seconds(lambda: readers.append(_reader(reference)), repeat=1)
    batches = [some(answers) for _ in range(repeat)]
    steps = iter(range(1, repeat + 1))

    def read() -> None:
        step = next(steps)
        ids, texts = batches[step - 1]
        readers[0].read(
            StepView(
                step=step,
                prompts=texts,
                texts=texts,
                response_ids=ids,
                prompt_ids=tuple(str(place) for place in range(answers)),
                rewards=tuple(rng.normal(size=answers).tolist()),
                spreads=(0.1,) * answers,
                rm_versions=("rm",) * answers,
                truncated=(False,) * answers,
                record={"kl_nats_per_sequence": 1.0, "grad_norm_policy": 1.0},
            )
        )

    ids, texts = batches[0]
    words_of, index = Overuse(reference_texts, prompts=reference.prompts), RunIndex(reference_ids)
    compression = text_signals.Compression(reference_texts)
    parts = {
        "words_s": lambda: words_of.observe(texts, prompts=texts),
        "longest_repeat_s": lambda: text_signals.longest_repeat_fraction(ids),
        "distinct_bigrams_s": lambda: text_signals.distinct_bigrams(ids, repeated_B=text_signals.repeated_bigrams(ids)),
        "compression_s": lambda: compression.ratio(texts),
        "copies_s": lambda: index.copied_share(ids),
    }
    figures: dict[str, float] = {"answers": answers, "tokens": tokens, "read_s": seconds(read, repeat=repeat)}
    figures |= {name: seconds(part, repeat=repeat) for name, part in parts.items()}
    figures |= {"build_s": build, "state_bytes": len(json.dumps(readers[0].to_state()))}
    return figures


def seconds(work: Callable[[], object], *, repeat: int) -> float:
    """CPU time, so that other processes do not count; median."""
    taken = []
    for _ in range(repeat):
        before = time.process_time()
        work()
        taken.append(time.process_time() - before)
    return round(median(taken), 4)


def _reader(reference: Reference) -> SignalReader:
    return SignalReader(reference, scales=lambda _: RewardScale(0.0, 1.0, 0.1), ceiling=0.8)


if __name__ == "__main__":
    main()
