"""A model in transformers and the thread that works for it: prompts join the running batch, questions are answered in between."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from soul.device import torch_device
from soul.evaluate.evaluator import positions
from soul.evaluate.generate import stop_ids
from soul.models.load import load_model, load_tokenizer
from soul.records import InputError
from soul.serving.decoder import Row, RunningBatch
from soul.serving.engine import Settle, Watch
from soul.serving.likelihood import likelihoods
from soul.serving.settings import EngineSettings

MAX_FAILURES = 3
LOG = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Job:
    """A row; `watch` is called with it, its number of tokens and its end, from the engine's thread: at every step, or at its end only."""

    row: Row
    watch: Watch
    every_step: bool


@dataclass(eq=False, slots=True)
class _Question:
    rows: Sequence[Sequence[int]]
    num_top: int
    answer: Settle


class TorchEngine:
    """`max_rows` and `max_batch_tokens` (cached positions, padding included) bound what is decoded together."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_rows: int, max_batch_tokens: int) -> None:
        if getattr(model, "_is_stateful", False):
            raise InputError(
                f"{type(model).__name__} keeps a recurrent state, which cannot be batched here. Serve an attention-only model."
            )
        self.tokenizer = tokenizer
        self.eos_ids = stop_ids(model.generation_config, tokenizer)
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self.positions = positions(model.config)
        self.num_failures = 0  # in a row
        self._model = model
        self._max_rows, self._max_batch_tokens = max_rows, max_batch_tokens
        self._batch = RunningBatch(model)
        self._jobs: dict[Row, _Job] = {}
        self._waiting: deque[Row] = deque()
        self._questions: deque[_Question] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="soul-engine", daemon=True)
        self._thread.start()

    def submit(self, rows: Sequence[Row], watch: Watch, *, every_step: bool) -> bool:
        with self._wake:
            if self._closed:
                return False
            for row in rows:
                self._jobs[row] = _Job(row, watch, every_step)
                self._waiting.append(row)
            self._wake.notify()
        return True

    def ask(self, rows: Sequence[Sequence[int]], num_top: int, answer: Settle) -> bool:
        with self._wake:
            if self._closed:
                return False
            self._questions.append(_Question(rows, num_top, answer))
            self._wake.notify()
        return True

    def cancel(self, rows: Sequence[Row]) -> None:
        """They leave before the next step."""
        with self._wake:
            for row in rows:
                if row in self._jobs and row.end is None:
                    row.end = "cancelled"
            self._wake.notify()

    @property
    def num_rows(self) -> int:
        return len(self._jobs)

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()

    @property
    def is_well(self) -> bool:
        """False once the thread is gone, or when step after step has failed."""
        return self._thread.is_alive() and self.num_failures < MAX_FAILURES

    @property
    def is_open(self) -> bool:
        return not self._closed

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def __del__(self) -> None:  # what Ray Serve calls on the model that it evicts
        self.close()

    def _work(self) -> None:
        while True:
            with self._wake:
                while not (self._waiting or self._questions or self._batch.rows or self._closed):
                    self._wake.wait()
                if self._closed and not (self._waiting or self._questions or self._batch.rows):
                    return
                question = self._questions.popleft() if self._questions else None
                rows = self._admissible()
            if question is not None:
                self._answer(question)
            try:
                if rows:
                    self._batch.admit(rows)
                elif self._batch.rows:
                    self._batch.step()
                    self.num_failures = 0
            except RuntimeError as error:  # out of memory is one
                self._fail(rows, error)
            self._tell()

    def _admissible(self) -> list[Row]:
        """The waiting rows that fit, first come first served; one alone always fits. Cancelled ones are let go."""
        for row in [row for row in self._waiting if row.end is not None]:
            self._waiting.remove(row)
            del self._jobs[row]
        running = [row for row in self._batch.rows if row.end is None]
        longest = max((row.most_positions for row in running), default=0)
        chosen: list[Row] = []
        while self._waiting:
            count = len(running) + len(chosen) + 1
            longest = max(longest, self._waiting[0].most_positions)
            if count > 1 and (count > self._max_rows or count * longest > self._max_batch_tokens):
                break
            chosen.append(self._waiting.popleft())
        return chosen

    def _tell(self) -> None:
        """Report progress, and forget the rows that have ended."""
        done = self._batch.release()
        jobs = [self._jobs[row] for row in done]
        with self._wake:
            for row in done:
                del self._jobs[row]
        for job in jobs:
            job.watch(job.row, len(job.row.tokens), job.row.end)
        for row in self._batch.rows:  # one that is cancelled at this moment leaves after the next step
            job = self._jobs[row]
            if job.every_step:
                job.watch(row, len(row.tokens), None)

    def _answer(self, question: _Question) -> None:
        try:
            found = likelihoods(self._model, question.rows, question.num_top)
        except RuntimeError as error:
            self._note(error)
            question.answer(None)
        else:
            question.answer(found)

    def _fail(self, joining: Sequence[Row], error: RuntimeError) -> None:
        """A step has failed: every row in it ends, the engine goes on with an empty batch."""
        self._note(error)
        lost = {*self._batch.rows, *joining}
        self._batch.clear()
        for row in lost:
            row.end = "broken"
            with self._wake:
                job = self._jobs.pop(row)
            job.watch(row, len(row.tokens), row.end)

    def _note(self, error: RuntimeError) -> None:
        self.num_failures += 1
        LOG.error("a step of the model failed (%s)", type(error).__name__)


def load_torch_engine(folder: Path, settings: EngineSettings) -> TorchEngine:
    """bfloat16 on a GPU, float32 elsewhere.

    Raises:
        InputError: the model cannot be loaded, does not fit beside what the GPU holds, or cannot be batched.
    """
    device = torch_device(settings.device)
    model = load_model(str(folder), dtype=torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    try:
        model.to(device)
    except torch.OutOfMemoryError as error:
        raise InputError(
            "a model does not fit into its GPU's memory beside what is there. Keep fewer models in a replica (--max-models), or use GPUs "
            "with more memory."
        ) from error
    return TorchEngine(model, load_tokenizer(str(folder)), max_rows=settings.max_rows, max_batch_tokens=settings.max_batch_tokens)
