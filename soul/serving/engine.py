"""What has a loaded model: the interface that a request's work is written against, and how one is loaded for it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

from transformers import PreTrainedTokenizerBase

from soul.device import Device
from soul.models.hashes import model_sha256
from soul.records import InputError
from soul.serving.decoder import End, Row
from soul.serving.likelihood import Likelihood
from soul.serving.settings import EngineKind, EngineSettings
from soul.serving.work import ModelSpec
from soul.store import local

Watch = Callable[[Row, int, End | None], None]
Settle = Callable[[list[Likelihood] | None], None]


class Engine(Protocol):
    """Called from any thread; calls back from its own. `positions`: the longest row, prompt and answer together."""

    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]
    vocab_size: int
    positions: int

    def submit(self, rows: Sequence[Row], watch: Watch, *, every_step: bool) -> bool:
        """Queue rows in order. `watch` gets a row, its number of tokens and its end: as it grows, or at its end only.

        Returns False if the engine has been closed: ask for a new one.
        """

    def ask(self, rows: Sequence[Sequence[int]], num_top: int, answer: Settle) -> bool:
        """Queue a question of likelihood; the answer is None if it failed. Returns False if the engine has been closed."""

    def cancel(self, rows: Sequence[Row]) -> None:
        """Nobody waits for these any more."""

    @property
    def num_rows(self) -> int:
        """Rows that are waiting or being decoded."""

    @property
    def is_open(self) -> bool: ...

    @property
    def is_well(self) -> bool:
        """False once it has stopped by itself, or fails again and again."""

    def close(self) -> None:
        """No new work; what has begun is finished, then the memory is free."""

    def join(self, timeout_s: float) -> None:
        """Wait until a closed engine has ended."""


def chosen(wanted: EngineKind, device: Device) -> Literal["transformers", "vllm"]:
    """What `auto` stands for on this device.

    Raises:
        InputError: vLLM is wanted and not installed.
    """
    if wanted == "transformers" or (wanted == "auto" and device == "cpu"):
        return "transformers"
    if importlib.util.find_spec("vllm") is not None:
        return "vllm"
    if wanted == "vllm":
        raise InputError("vLLM is not installed where the replica runs. Install soul with its extra llm there, or serve with transformers.")
    return "transformers"


def load_engine(spec: ModelSpec, settings: EngineSettings) -> Engine:
    """Load a model whose files are still the ones that the gate has seen.

    Raises:
        InputError: they are not, or cannot be loaded.
    """
    folder = Path(local(spec.folder))
    if model_sha256(folder) != spec.sha256:
        raise InputError("the model's files have changed since they were checked. Evaluate them and let the server read the run again.")
    if chosen(settings.kind, settings.device) == "vllm":
        from soul.serving.vllm_engine import load_vllm_engine

        return load_vllm_engine(folder, settings)
    from soul.serving.torch_engine import load_torch_engine

    return load_torch_engine(folder, settings)
