"""vLLM by itself: tokens/s for one batch of equal requests, printed as JSON. Run by benchmarks/gpu.py."""

from __future__ import annotations

import argparse
import json
import os
import time

PROMPT_TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if arguments.dtype == "float32":  # On a CPU: as the rollout actor sets it.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    from vllm import LLM, SamplingParams

    on_cpu = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20} if arguments.dtype == "float32" else {}
    engine = LLM(
        arguments.model,
        dtype=arguments.dtype,
        max_num_seqs=256,
        max_model_len=PROMPT_TOKENS + arguments.tokens,
        gpu_memory_utilization=0.35,
        **on_cpu,
    )
    limits = SamplingParams(max_tokens=arguments.tokens, ignore_eos=True, temperature=1.0, logprobs=0)
    prompts = [{"prompt_token_ids": [4 + (number + place) % 64 for place in range(PROMPT_TOKENS)]}
               for number in range(arguments.requests)]  # fmt: skip
    engine.generate(prompts, limits, use_tqdm=False)  # Warm.
    started_s = time.perf_counter()
    outputs = engine.generate(prompts, limits, use_tqdm=False)
    seconds = time.perf_counter() - started_s
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    print(json.dumps({"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds}))


if __name__ == "__main__":
    main()
