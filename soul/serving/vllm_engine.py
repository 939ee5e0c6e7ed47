"""A model in vLLM: its own scheduler and paged key-value cache in a process beside this one, behind the interface of `Engine`."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from transformers import PreTrainedTokenizerBase

from soul.device import torch_device
from soul.evaluate.generate import stop_ids_of
from soul.models.load import load_tokenizer
from soul.records import InputError
from soul.serving.decoder import Row, Sampling
from soul.serving.engine import Settle, Watch
from soul.serving.likelihood import Likelihood
from soul.serving.orphans import Orphans, children
from soul.serving.settings import EngineSettings

if TYPE_CHECKING:
    from vllm import AsyncEngineArgs, SamplingParams

LOG: Final = logging.getLogger(__name__)
GPU_SHARE: Final = 0.9  # of a GPU's memory, for all models of a replica together
START_S: Final = 1800.0


class VllmEngine:
    """Token ids in and out: text, stop strings and templates are the same code as for every other engine."""

    def __init__(self, arguments: AsyncEngineArgs, tokenizer: PreTrainedTokenizerBase, eos_ids: tuple[int, ...]) -> None:
        self.tokenizer, self.eos_ids = tokenizer, eos_ids
        self._tasks: dict[Row | object, Future[None]] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._failures = failures()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_run, args=[self._loop], name="soul-vllm", daemon=True)
        self._thread.start()
        before = children()
        try:
            self._llm = self._started(self._build(arguments)).result(START_S)
        except BaseException:
            self._closed = True  # there is nothing for `close` to end
            self._loop.call_soon_threadsafe(self._loop.stop)
            raise
        self._orphans = Orphans(list(children() - before))
        config = self._llm.model_config
        self.vocab_size = int(config.get_vocab_size())
        self.positions = int(config.max_model_len) - 1  # vLLM writes a token behind what it scores, too

    @staticmethod
    async def _build(arguments: AsyncEngineArgs) -> Any:
        from vllm.v1.engine.async_llm import AsyncLLM

        return AsyncLLM.from_engine_args(arguments)

    def submit(self, rows: Sequence[Row], watch: Watch, *, every_step: bool) -> bool:
        return self._begin({row: self._decode(row, watch, every_step=every_step) for row in rows})

    def ask(self, rows: Sequence[Sequence[int]], num_top: int, answer: Settle) -> bool:
        return self._begin({object(): self._score(rows, num_top, answer)})

    def cancel(self, rows: Sequence[Row]) -> None:
        with self._lock:
            tasks = [self._tasks[row] for row in rows if row in self._tasks]
        for task in tasks:
            task.cancel()

    @property
    def num_rows(self) -> int:
        return len(self._tasks)

    @property
    def is_open(self) -> bool:
        return not self._closed

    @property
    def is_well(self) -> bool:
        return self._thread.is_alive() and not self._llm.errored

    def close(self) -> None:
        with self._lock:
            idle = not (self._closed or self._tasks)
            self._closed = True
        if idle:
            self._stop()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def __del__(self) -> None:  # what Ray Serve calls on the model that it evicts
        self.close()

    def _begin(self, works: Mapping[Row | object, Coroutine[Any, Any, None]]) -> bool:
        with self._lock:
            if self._closed:
                for work in works.values():
                    work.close()
                return False
            begun = {key: self._started(work) for key, work in works.items()}
            self._tasks.update(begun)
        for key, task in begun.items():
            task.add_done_callback(partial(self._end, key))
        return True

    def _started(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _end(self, key: Row | object, _: Future[None]) -> None:
        with self._lock:
            del self._tasks[key]
            last = self._closed and not self._tasks
        if last:
            self._stop()

    def _stop(self) -> None:
        """End vLLM's process, then the thread."""

        def stop() -> None:
            self._llm.shutdown()
            self._orphans.release()
            self._loop.stop()

        self._loop.call_soon_threadsafe(stop)

    async def _decode(self, row: Row, watch: Watch, *, every_step: bool) -> None:
        try:
            async for output in self._llm.generate(_prompt(row.prompt), _parameters(row.sampling, row.eos_ids), uuid4().hex):
                told = output.outputs[0]
                _append(row, told.token_ids, told.logprobs)
                if told.finish_reason is not None:
                    row.end = _end_of(row, told.finish_reason)
                if row.end is not None or every_step:
                    watch(row, len(row.tokens), row.end)
        except asyncio.CancelledError:
            row.end = row.end or "cancelled"
            watch(row, len(row.tokens), row.end)
            raise
        except self._failures as error:  # the message can quote the prompt
            LOG.error("vLLM failed on a request (%s)", type(error).__name__)
            row.end = "broken"
            watch(row, len(row.tokens), row.end)

    async def _score(self, rows: Sequence[Sequence[int]], num_top: int, answer: Settle) -> None:
        try:
            found = await asyncio.gather(*(self._likelihood(row, num_top) for row in rows))
        except self._failures as error:
            LOG.error("vLLM failed on a question (%s)", type(error).__name__)
            answer(None)
        else:
            answer(found)

    async def _likelihood(self, ids: Sequence[int], num_top: int) -> Likelihood:
        """log p of a row's own tokens; the one token that vLLM writes behind them is dropped."""
        from vllm import SamplingParams

        if len(ids) < 2:
            return Likelihood([], [])
        parameters = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=max(num_top, 1), detokenize=False)
        places: Any = None
        async for output in self._llm.generate(_prompt(ids), parameters, uuid4().hex):
            places = output.prompt_logprobs or places
        logps, tops = zip(*(_told(place, token, num_top) for token, place in zip(ids[1:], places[1:], strict=True)), strict=True)
        return Likelihood(list(logps), list(tops))


def failures() -> tuple[type[Exception], ...]:
    """What a request ends with that vLLM cannot answer."""
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    return EngineDeadError, EngineGenerateError, ValueError


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """What a thread does: the loop until it is stopped, then the end of what still waits in it."""
    loop.run_forever()
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        loop.run_until_complete(asyncio.wait(left))
    loop.close()


def _prompt(ids: Sequence[int]) -> Any:
    return {"prompt_token_ids": list(ids)}


def _parameters(sampling: Sampling, eos_ids: Sequence[int]) -> SamplingParams:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    greedy = sampling.temperature == 0 or sampling.top_p == 0
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=0.0 if greedy else sampling.temperature,
        top_p=1.0 if greedy else sampling.top_p,
        seed=None if greedy else sampling.seed,
        logprobs=sampling.num_top,
        ignore_eos=True,  # the ids below are all there are: also where the generation config names others
        stop_token_ids=list(eos_ids),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _append(row: Row, tokens: Sequence[int], places: Sequence[Mapping[int, Any]] | None) -> None:
    """What is new. The token that ends a row is not among its tokens, but its log-probability is."""
    for number, token in enumerate(tokens):
        if token in row.eos_ids:
            row.closing = token
        else:
            row.tokens.append(token)
        if places is not None:
            logp, top = _told(places[number], token, row.sampling.num_top or 0)
            row.logps.append(logp)
            row.tops.append(top)


def _told(place: Mapping[int, Any], token: int, num_top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """log p (nats) of the token, and the most probable ones: vLLM gives them in no order, the token among them."""
    best = sorted(place.items(), key=lambda item: item[1].rank)[:num_top]
    return float(place[token].logprob), tuple((other, float(told.logprob)) for other, told in best)


def _end_of(row: Row, reason: str) -> Any:
    if reason == "error" or not all(map(math.isfinite, row.logps)):
        return "broken"
    return {"stop": "stop", "length": "length", "abort": "cancelled"}.get(reason, "broken")


def load_vllm_engine(folder: Path, settings: EngineSettings) -> VllmEngine:
    """bfloat16 on GPUs, all of the replica's for every model; float32 elsewhere.

    Raises:
        InputError: vLLM cannot run this model here.
    """
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import AsyncEngineArgs

    on_gpu = torch_device(settings.device).type == "cuda"
    arguments = AsyncEngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format="safetensors",
        dtype="bfloat16" if on_gpu else "float32",
        max_model_len=-1,  # as much of the model's context as the memory holds
        max_num_seqs=settings.max_rows,
        max_logprobs=max(settings.max_top, 1),
        gpu_memory_utilization=GPU_SHARE / settings.max_models,
        tensor_parallel_size=max(1, int(settings.num_gpus)) if on_gpu else 1,
        distributed_executor_backend="mp" if settings.num_gpus > 1 else None,
        enforce_eager=not on_gpu,  # a CPU serves tests, which should not wait for a compiler
        disable_log_stats=True,
        enable_log_requests=False,
    )
    tokenizer = load_tokenizer(str(folder))
    try:
        return VllmEngine(arguments, tokenizer, stop_ids_of(str(folder), tokenizer))
    except (RuntimeError, ValueError, OSError, ImportError) as error:  # out of memory, an architecture it lacks, a process that died
        LOG.error("vLLM did not start (%s: %s)", type(error).__name__, error)
        raise InputError(
            f"vLLM cannot run this model here ({type(error).__name__}; the replica's log has the reason). Models of a replica share its "
            f"GPU's memory in equal parts: fewer of them (--max-models, now {settings.max_models}) have more each. Or choose "
            "--engine transformers."
        ) from None
