"""The real engine: vLLM's AsyncLLM, with Keel's weight transfer.

Consumes: requests and weight blobs, from one event loop. Produces: answers with log-probs and versions per token.
Waits for: vLLM's engine core, in another process or thread. Who unblocks a call: the core's answer, its death, or this
engine's end after a failed weight update (`_ended`), which every call watches.
Always holds: tokens are sampled with one version's weights each, and labelled with it, because the core is paused from
before the first tensor is loaded until after the label has changed; no cached key or value outlives its weights,
because every pause to load clears the cache, prefixes included; an engine whose update failed never generates again,
while one that only failed to receive goes on with the weights that it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from typing import Any, Final, TypeVar

import numpy as np

from actors.adapter_files import landed_adapter
from actors.engine import Generation, GenerationRequest, SyncTimings, check_newer_than_engine, merge_runs
from actors.landing import land_in_memory_file, land_in_process
from actors.vllm_spec import (
    BACKEND,
    VllmSpec,
    checkpoint_shapes,
    engine_options,
    model_eos_ids,
    prepare_environment,
)
from cluster.errors import ConfigError, EngineDeadError, KeelError, WeightSyncError
from cluster.records import Float32s, Int32s
from cluster.weight_group import GroupBrokenError, GroupPlan, GroupUpdate
from cluster.weights import UNSYNCED, Bytes, WeightBlob

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_JOB_POLL_S: Final = 0.01
_LEAVE_S: Final = 10.0
_ADAPTER: Final = "policy"


class VllmEngine:
    """An `actors.engine.Engine`. Made by `start`, in the event loop that will use it."""

    def __init__(self, llm: Any, spec: VllmSpec, *, in_thread: bool) -> None:
        self._llm, self._spec = llm, spec
        self._eos_ids = list(spec.eos_ids or model_eos_ids(spec.model_path))
        self._checkpoint_shapes = checkpoint_shapes(spec.model_path)
        self._land: Callable[[Bytes], AbstractContextManager[str]] = (
            land_in_process if in_thread else land_in_memory_file
        )
        self._version = UNSYNCED
        self._update = asyncio.Lock()
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._end_reason: str | None = None
        self._probes = 0
        self._plan: GroupPlan | None = None
        """Of the weight group that the workers are connected in."""
        self._adapter: Any = None
        """The LoRARequest that every request carries, once there is an adapter."""
        self.core_in_thread = in_thread

    @classmethod
    async def start(cls, spec: VllmSpec) -> VllmEngine:
        """Boot the engine: 5 to 40 s. Raises EngineDeadError when vLLM does not come up, or not in time."""
        prepare_environment(spec)
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
            if blob.adapter is None:
                return await self._change_to(blob, lambda: self._load_landed(blob))
            return await self._change_to(blob, lambda: self._load_adapter(blob))

    async def receive_weights(self, update: GroupUpdate) -> SyncTimings:
        async with self._update:
            self._ensure_alive()
            check_newer_than_engine(update.version, engine_version=self._version)
            plan = self._plan
            if plan is None or plan.epoch != update.epoch:
                raise GroupBrokenError(f"the engine is not in weight group {update.epoch}")
            # Received whole before anything is touched: over gloo while generation goes on, not so over NCCL.
            paused_s = 0.0
            if plan.backend == "nccl":
                started_s = time.perf_counter()
                await self._receive_paused(update)
                paused_s = time.perf_counter() - started_s
            else:
                # Each bucket has its deadline.
                limit_s = plan.timeout_s * (1 + -(-update.size_bytes // plan.bucket_bytes))
                await self._in_workers("receive", _update_info(update, "staged"), timeout_s=limit_s)
            timings = await self._change_to(update, lambda: self._replace_weights(update, "staged"))
            return replace(timings, pause_s=paused_s + timings.pause_s)

    async def _receive_paused(self, update: GroupUpdate) -> None:
        """Two NCCL groups of one GPU that work at a time can block each other, so the workers' own rests. The engine
        stays paused; when nothing came, it leaves the group and goes on. Raises GroupBrokenError."""
        await self._watched(self._llm.pause_generation(mode="keep", clear_cache=False))
        try:
            await self._in_workers("receive", _update_info(update, "staged"), timeout_s=self._spec.update_timeout_s)
        except BaseException:
            with contextlib.suppress(KeelError):  # a group that cannot be left is left behind
                await self.leave_group()
            if self._end_reason is None:
                await self._resume()
            raise

    async def _resume(self) -> None:
        try:
            async with asyncio.timeout(_LEAVE_S):
                await self._watched(self._llm.resume_generation())
        except Exception as error:
            self._end(f"it did not go on after a broken broadcast: {type(error).__name__}")
            raise self._dead_error() from error

    async def _change_to(
        self, update: WeightBlob | GroupUpdate, work: Callable[[], Awaitable[SyncTimings]]
    ) -> SyncTimings:
        """Take over the version that `work` loads. When it fails, end the engine."""
        self._ensure_alive()
        check_newer_than_engine(update.version, engine_version=self._version)
        try:
            self._check_manifest(update)
            async with asyncio.timeout(self._spec.update_timeout_s):
                timings = await self._watched(work())
        except BaseException as error:
            # Some tensors may be new and some old: nothing may be sampled from that mix, whatever went wrong.
            self._end(f"updating to version {update.version} failed: {type(error).__name__}")
            if isinstance(error, WeightSyncError | asyncio.CancelledError | EngineDeadError):
                raise
            raise WeightSyncError(
                f"updating the engine to version {update.version} failed",
                got=f"{type(error).__name__}: {error}",
                do="replace the engine; if it happens again, compare the learner's model with the engine's",
            ) from error
        self._version = update.version
        return timings

    # ---------------------------------------------------------------- the weight group

    @property
    def group_ranks(self) -> int:
        return self._spec.rollout.tensor_parallel_size

    async def join_group(self, plan: GroupPlan, *, first_rank: int) -> None:
        self._plan = None
        argument = {**asdict(plan), "first_rank": first_rank}
        await self._in_workers("join", argument, timeout_s=plan.timeout_s * 1.1)
        self._plan = plan

    async def leave_group(self) -> None:
        self._plan = None
        if self._end_reason is None and self._llm is not None:
            await self._in_workers("leave", {}, timeout_s=_LEAVE_S)

    async def _in_workers(self, job: str, argument: dict[str, Any], *, timeout_s: float) -> None:
        """Run a job of the group in a thread of each worker. Generation goes on. Raises GroupBrokenError."""

        async def finished() -> set[str]:
            await self._llm.collective_rpc("keel_begin", args=(job, argument))
            while "busy" in (states := set(await self._llm.collective_rpc("keel_state"))):  # noqa: ASYNC110 - by RPC
                await asyncio.sleep(_JOB_POLL_S)
            return states

        try:
            async with asyncio.timeout(timeout_s):
                states = await self._watched(finished())
        except TimeoutError as error:
            raise GroupBrokenError(f"{job}: the workers took too long", got=f"more than {timeout_s:g} s") from error
        if states != {"done"}:
            raise GroupBrokenError(f"{job} failed in a worker", got="; ".join(sorted(states - {"done"})))

    # ---------------------------------------------------------------- turns on a shared GPU

    async def sleep(self) -> None:
        if not (self._spec.can_sleep and self._spec.on_gpu):
            raise ConfigError("this engine cannot sleep", got="no shared GPU", do="set placement.colocate, on a GPU")
        # Level 1 parks the weights in host memory: after waking the engine is right at once, whatever comes next.
        await self._watched(self._llm.sleep(level=1, mode="keep"))

    async def wake(self) -> None:
        await self._watched(self._llm.wake_up())

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
            prompt = {"prompt_token_ids": prompt_ids.tolist()}
            async for output in self._llm.generate(prompt, params, request_id, lora_request=self._adapter):
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

    async def _load_landed(self, blob: WeightBlob) -> SyncTimings:
        if blob.shared is not None:
            return await self._replace_weights(blob, blob.shared.location)
        with contextlib.ExitStack() as stack:
            # Seconds for a large model, so not on the event loop. Waited for in any case: a copy cannot be cancelled.
            landing = asyncio.ensure_future(asyncio.to_thread(stack.enter_context, self._land(blob.buffer)))
            try:
                location = await asyncio.shield(landing)
            finally:
                await asyncio.wait((landing,))
            return await self._replace_weights(blob, location)

    async def _replace_weights(self, update: WeightBlob | GroupUpdate, location: str) -> SyncTimings:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        request = WeightTransferUpdateRequest(update_info=_update_info(update, location))
        paused_at = time.perf_counter()
        await self._llm.pause_generation(mode="keep", clear_cache=True)
        load_at = time.perf_counter()
        await self._llm.start_weight_update()
        await self._llm.update_weights(request)
        await self._llm.finish_weight_update(weight_version=str(update.version))
        loaded_at = time.perf_counter()
        await self._llm.resume_generation()
        return SyncTimings(pause_s=time.perf_counter() - paused_at, load_s=loaded_at - load_at)

    async def _load_adapter(self, blob: WeightBlob) -> SyncTimings:
        """Under the one name and id that every request carries, in the place of the adapter before."""
        from vllm.lora.request import LoRARequest

        with landed_adapter(blob) as directory:
            paused_at = time.perf_counter()
            # Requests that began without an adapter end without it; those that have one go on under the new one.
            mode = "wait" if self._adapter is None else "keep"
            await self._llm.pause_generation(mode=mode, clear_cache=True)
            load_at = time.perf_counter()
            if not await self._llm.add_lora(LoRARequest(_ADAPTER, 1, directory, load_inplace=True)):
                raise WeightSyncError(f"vLLM did not take the adapter of version {blob.version}")
            await self._llm.update_weight_version(str(blob.version))
            loaded_at = time.perf_counter()
            self._adapter = LoRARequest(_ADAPTER, 1, directory)  # the files are read once: by id from here on
            await self._llm.resume_generation()
        return SyncTimings(pause_s=time.perf_counter() - paused_at, load_s=loaded_at - load_at)

    def _check_manifest(self, update: WeightBlob | GroupUpdate) -> None:
        """Names and shapes against the model directory's: a fused parameter hides a missing part from the worker."""
        is_adapter = isinstance(update, WeightBlob) and update.adapter is not None
        if is_adapter != self._spec.takes_adapters:
            raise WeightSyncError(
                f"version {update.version} is {'an adapter' if is_adapter else 'a whole model'}",
                got="an engine that was started for the other",
                do="give engines and learner the same learner.lora",
            )
        if self._checkpoint_shapes is None or is_adapter:
            return
        published, own = dict(update.shapes), self._checkpoint_shapes
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


def _update_info(update: WeightBlob | GroupUpdate, location: str) -> dict[str, Any]:
    return {
        "location": location,
        "size_bytes": update.size_bytes,
        "names": [entry.name for entry in update.manifest],
        "dtypes": [entry.dtype for entry in update.manifest],
        "shapes": [list(entry.shape) for entry in update.manifest],
        "offsets_bytes": [entry.offset_bytes for entry in update.manifest],
    }


# ---------------------------------------------------------------- start-up


def _boot(spec: VllmSpec) -> tuple[Any, bool]:
    """(AsyncLLM, whether its core is a thread). Runs outside the event loop: it blocks for seconds."""
    from vllm.v1.engine.async_llm import AsyncLLM

    wanted = spec.rollout.engine_core
    if wanted != "process" and not spec.on_gpu and spec.rollout.tensor_parallel_size == 1:
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

    return AsyncEngineArgs(weight_transfer_config=WeightTransferConfig(backend=BACKEND), **engine_options(spec))
