"""The real engine: vLLM's AsyncLLM, with Keel's weight transfer.

Consumes: requests and weight blobs, from one event loop. Produces: answers with log-probs and versions per token.
Waits for: vLLM's engine core, in another process or thread. Who unblocks a call: the core's answer, its death, or this
engine's end after a failed weight update (`_ended`), which every call watches.
Always holds: tokens are sampled with one version's weights each, and labelled with it, because the core is paused from
before the first tensor is loaded until after the label has changed; no cached key or value outlives its weights,
because the pause clears the cache; an engine whose update failed never generates again.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

from actors.engine import Generation, GenerationRequest, SyncTimings, check_newer_than_engine, merge_runs
from actors.landing import land_in_memory_file, land_in_process
from cluster.errors import EngineDeadError, KeelError, ModelError, WeightSyncError
from cluster.records import Float32s, Int32s
from cluster.weights import UNSYNCED, Bytes, WeightBlob
from configs.run import RolloutSection

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_PLUGIN: Final = "actors.vllm_worker.WorkerPlugin"
_BACKEND: Final = "keel"

_CPU_ENVIRONMENT: Final[Mapping[str, str]] = {
    "TORCH_COMPILE_DISABLE": "1",  # enforce_eager leaves one inductor compile of seconds in the log-prob helper
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the uni-process executor: one process less for each engine
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise every engine of a node binds itself to core 0
}


@dataclass(frozen=True)
class VllmSpec:
    """What an engine needs to know. `seed` must differ between engines, and between restarts of one: `engine_seed`."""

    model_path: str
    rollout: RolloutSection
    max_sequence_tokens: int
    seed: int
    eos_ids: tuple[int, ...] = ()
    """End-of-sequence tokens. Empty: those that the model directory names."""
    update_timeout_s: float = 300.0

    @property
    def on_gpu(self) -> bool:
        return self.rollout.gpus_per_actor > 0


def engine_seed(*, run_seed: int, actor_index: int, incarnation: int) -> int:
    """A seed of 31 bits for one life of one engine: equal seeds would sample equal tokens."""
    digest = hashlib.blake2s(f"{run_seed}/{actor_index}/{incarnation}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFF_FFFF


def model_eos_ids(model_path: str) -> tuple[int, ...]:
    """End-of-sequence ids from generation_config.json, else config.json. Raises ModelError when neither names one."""
    for name in ("generation_config.json", "config.json"):
        file = Path(model_path) / name
        eos = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        if eos is not None:
            return tuple(eos) if isinstance(eos, list) else (int(eos),)
    raise ModelError(
        "the model names no end-of-sequence token", got=model_path, do="set eos_token_id in its generation_config.json"
    )


class VllmEngine:
    """An `actors.engine.Engine`. Made by `start`, in the event loop that will use it."""

    def __init__(self, llm: Any, spec: VllmSpec, *, in_thread: bool) -> None:
        self._llm, self._spec = llm, spec
        self._eos_ids = list(spec.eos_ids or model_eos_ids(spec.model_path))
        self._checkpoint_shapes = _checkpoint_shapes(spec.model_path)
        self._land: Callable[[Bytes], AbstractContextManager[str]] = (
            land_in_process if in_thread else land_in_memory_file
        )
        self._version = UNSYNCED
        self._update = asyncio.Lock()
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._end_reason: str | None = None
        self._probes = 0
        self.core_in_thread = in_thread

    @classmethod
    async def start(cls, spec: VllmSpec) -> VllmEngine:
        """Boot the engine: 5 to 40 s. Raises EngineDeadError when vLLM does not come up, or not in time."""
        _prepare_environment(spec)
        try:
            async with asyncio.timeout(spec.rollout.boot_timeout_s):
                # Handed over in a box: a future's result would be kept by the executor beyond `shutdown`.
                box: list[tuple[Any, bool]] = []
                await asyncio.to_thread(lambda: box.append(_boot(spec)))
                llm, in_thread = box.pop()
                engine = cls(llm, spec, in_thread=in_thread)
                await llm.update_weight_version(str(UNSYNCED))
        except TimeoutError as error:
            raise EngineDeadError(
                "vLLM did not come up in time",
                got=f"more than {spec.rollout.boot_timeout_s:g} s",
                do="raise rollout.boot_timeout_s, or look at the actor's log",
            ) from error
        return engine

    @property
    def version(self) -> int:
        return self._version

    async def generate(self, request: GenerationRequest) -> Generation:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=request.max_new_tokens,
            temperature=request.temperature,
            logprobs=0,  # the sampled token's, and no others
            stop_token_ids=self._eos_ids,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        return _generation(await self._final_output(request.request_id, request.prompt_ids, params))

    async def load_weights(self, blob: WeightBlob) -> SyncTimings:
        async with self._update:
            self._ensure_alive()
            check_newer_than_engine(blob, engine_version=self._version)
            try:
                self._check_manifest(blob)
                async with asyncio.timeout(self._spec.update_timeout_s):
                    timings = await self._watched(self._replace_weights(blob))
            except BaseException as error:
                # Some tensors may be new and some old: nothing may be sampled from that mix, whatever went wrong.
                self._end(f"updating to version {blob.version} failed: {type(error).__name__}")
                if isinstance(error, WeightSyncError | asyncio.CancelledError | EngineDeadError):
                    raise
                raise WeightSyncError(
                    f"updating the engine to version {blob.version} failed",
                    got=f"{type(error).__name__}: {error}",
                    do="replace the engine; if it happens again, compare the learner's model with the engine's",
                ) from error
            self._version = blob.version
            return timings

    async def probe(self, token_ids: Int32s) -> Float32s:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if len(token_ids) >= self._spec.max_sequence_tokens:
            raise KeelError(
                "the probe sequence is too long for the engine",
                got=f"{len(token_ids)} tokens",
                do=f"probe with fewer than {self._spec.max_sequence_tokens}",
            )
        self._probes += 1
        # One token has to be sampled; prompt log-probs are always at temperature 1.
        params = SamplingParams(
            max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        output = await self._final_output(f"probe-{self._probes}", token_ids, params)
        positions = zip(token_ids[1:].tolist(), output.prompt_logprobs[1:], strict=True)
        return np.array([position[token].logprob for token, position in positions], dtype=np.float32)

    async def check_health(self) -> None:
        await self._watched(self._llm.check_health())

    async def shutdown(self) -> None:
        if self._llm is None:
            return
        llm, self._llm = self._llm, None
        self._end("shut down")
        if llm.output_handler is not None:
            llm.output_handler.cancel()  # else it reports the end that we ask for as an error
        await asyncio.to_thread(llm.shutdown)
        del llm
        gc.collect()  # now, in a cycle, or at interpreter exit, where vLLM's __del__ fails on modules already gone

    # ---------------------------------------------------------------- calls into vLLM

    async def _final_output(self, request_id: str, prompt_ids: Int32s, params: Any) -> Any:
        async def last() -> Any:
            final = None
            async for output in self._llm.generate({"prompt_token_ids": prompt_ids.tolist()}, params, request_id):
                final = output
            return final

        return await self._watched(last())

    async def _watched(self, call: Awaitable[_T]) -> _T:
        """The call's result, or EngineDeadError as soon as the engine ends. vLLM's errors become Keel's."""
        from vllm.v1.engine.exceptions import EngineDeadError as CoreDeadError

        task = asyncio.ensure_future(call)
        try:
            self._ensure_alive()
            await asyncio.wait((task, self._ended), return_when=asyncio.FIRST_COMPLETED)
            self._ensure_alive()
            return await task
        except KeelError:
            raise
        except CoreDeadError as error:
            self._end("vLLM's engine core died")
            raise self._dead_error() from error
        except Exception as error:
            if self._llm is not None and self._llm.errored:
                self._end("vLLM's engine core died")
                raise self._dead_error() from error
            cause = error.__cause__ or error
            raise KeelError(
                "vLLM refused or failed a call", got=f"{type(cause).__name__}: {cause}", do="see the actor's log"
            ) from error
        finally:
            if not task.done():
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task

    async def _replace_weights(self, blob: WeightBlob) -> SyncTimings:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        with self._land(blob.buffer) as location:
            request = WeightTransferUpdateRequest(update_info=_update_info(blob, location))
            paused_at = time.perf_counter()
            await self._llm.pause_generation(mode="keep", clear_cache=True)
            load_at = time.perf_counter()
            await self._llm.start_weight_update()
            await self._llm.update_weights(request)
            await self._llm.finish_weight_update(weight_version=str(blob.version))
            loaded_at = time.perf_counter()
        await self._llm.resume_generation()
        return SyncTimings(pause_s=time.perf_counter() - paused_at, load_s=loaded_at - load_at)

    def _check_manifest(self, blob: WeightBlob) -> None:
        """Names and shapes against the model directory's: a fused parameter hides a missing part from the worker."""
        if self._checkpoint_shapes is None:
            return
        published, own = dict(blob.shapes), self._checkpoint_shapes
        odd = sorted(set(published) ^ set(own)) or sorted(name for name in own if own[name] != published[name])
        if odd:
            raise WeightSyncError(
                "missing, unexpected or misshapen parameters",
                got=f"{len(odd)}: {', '.join(odd[:5])}",
                do="publish exactly the parameters of the model that the engine was started from",
            )

    def _end(self, reason: str) -> None:
        if self._end_reason is None:
            self._end_reason = reason
            self._ended.set_result(None)

    def _ensure_alive(self) -> None:
        if self._end_reason is not None:
            raise self._dead_error()

    def _dead_error(self) -> EngineDeadError:
        return EngineDeadError("the engine is dead", got=self._end_reason or "", do="replace its process")


def _generation(output: Any) -> Generation:
    completion = output.outputs[0]
    ids = list(completion.token_ids)
    spans = completion.weight_versions
    if not ids or not spans or spans[0].start != 0:
        raise KeelError("vLLM gave no tokens or no weight versions", got=f"{len(ids)} tokens, {spans}")
    logprobs = [position[token].logprob for token, position in zip(ids, completion.logprobs, strict=True)]
    return Generation(
        response_ids=np.array(ids, dtype=np.int32),
        logprobs=np.array(logprobs, dtype=np.float32),
        version_runs=merge_runs([(span.start, int(span.version)) for span in spans]),
        finish_reason="stop" if completion.finish_reason == "stop" else "length",
    )


def _update_info(blob: WeightBlob, location: str) -> dict[str, Any]:
    return {
        "location": location,
        "size_bytes": len(blob.buffer),
        "names": [entry.name for entry in blob.manifest],
        "dtypes": [entry.dtype for entry in blob.manifest],
        "shapes": [list(entry.shape) for entry in blob.manifest],
        "offsets_bytes": [entry.offset_bytes for entry in blob.manifest],
    }


def _checkpoint_shapes(model_path: str) -> dict[str, tuple[int, ...]] | None:
    """Parameter name → shape from the headers of the directory's safetensors; None where there are none. A tied LM
    head counts as absent, whether or not the files hold it."""
    files = sorted(Path(model_path).glob("*.safetensors"))
    if not files:
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        shapes.update({name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"})
    if json.loads((Path(model_path) / "config.json").read_text()).get("tie_word_embeddings"):
        shapes.pop("lm_head.weight", None)
    return shapes


# ---------------------------------------------------------------- start-up


def _prepare_environment(spec: VllmSpec) -> None:
    """Settings that vLLM and torch read when they are imported. A value that the user has set stays."""
    # On a CPU each start lists ten warnings that ask for libraries of another platform.
    settings = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING" if spec.on_gpu else "ERROR"}
    if Path(spec.model_path).is_dir():
        settings["HF_HUB_OFFLINE"] = "1"
    if not spec.on_gpu:
        settings |= {**_CPU_ENVIRONMENT, "OMP_NUM_THREADS": str(max(1, int(spec.rollout.cpus_per_actor)))}
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # whole GiB, and it would override rollout.kv_cache_gib
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _boot(spec: VllmSpec) -> tuple[Any, bool]:
    """(AsyncLLM, whether its core is a thread). Runs outside the event loop: it blocks for seconds."""
    from vllm.v1.engine.async_llm import AsyncLLM

    wanted = spec.rollout.engine_core
    if wanted != "process" and not spec.on_gpu:
        from actors.engine_core_thread import core_in_thread

        try:
            with core_in_thread():
                return AsyncLLM.from_engine_args(_engine_args(spec)), True
        except Exception as error:
            _log.warning("the engine core does not run in a thread, it gets a process: %s", error)
    try:
        return AsyncLLM.from_engine_args(_engine_args(spec)), False
    except Exception as error:
        raise EngineDeadError(
            "vLLM did not start", got=f"{type(error).__name__}: {error}", do="see the lines above in the actor's log"
        ) from error


def _engine_args(spec: VllmSpec) -> Any:
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    rollout = spec.rollout
    if spec.on_gpu:
        placement: dict[str, Any] = {
            "gpu_memory_utilization": rollout.gpu_memory_utilization,
            "tensor_parallel_size": rollout.tensor_parallel_size,
        }
    else:
        placement = {"kv_cache_memory_bytes": int(rollout.kv_cache_gib * (1 << 30)), "enforce_eager": True}
    return AsyncEngineArgs(
        model=spec.model_path,
        dtype=rollout.dtype,
        max_model_len=spec.max_sequence_tokens,
        max_num_seqs=rollout.max_concurrent_requests,
        seed=spec.seed,
        logprobs_mode="processed_logprobs",  # of the distribution sampled from: after the temperature
        generation_config="vllm",  # no sampling defaults of the model's: the learner does not know of them
        skip_tokenizer_init=True,
        enable_prefix_caching=True,
        trust_remote_code=False,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        enable_log_requests=False,
        weight_transfer_config=WeightTransferConfig(backend=_BACKEND),
        worker_extension_cls=_PLUGIN,
        **placement,
    )
