"""The reference engine: one process, one device. Every other engine is tested against it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from soul.models.load import save_model
from soul.train.engine import BuildModel, BuildOptimizer, EngineConfig, FullEntry, StepInfo, pick_device
from soul.train.state import full_entries, load_state, save_state


class SingleEngine:
    """One rank that holds everything."""

    sharded = False

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.rank, self.world = 0, 1
        self.device = pick_device(0)
        self.model: nn.Module
        self.optimizer: torch.optim.Optimizer

    def prepare(self, build_model: BuildModel, build_optimizer: BuildOptimizer) -> None:
        self.model = build_model().to(self.device)
        if self.config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        self.optimizer = build_optimizer(self.model)

    def autocast(self) -> Any:
        """The context every forward runs under."""
        if self.config.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> StepInfo:
        limit = self.config.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), float("inf") if limit is None else limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepInfo(grad_norm=float(norm))

    def hessian_step(self, *, decay: bool, scale: float = 1.0) -> None:
        self.optimizer.update_hessian(scale=scale, decay=decay)  # type: ignore[attr-defined]
        self.optimizer.zero_grad(set_to_none=True)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def save(self, folder: Path, extra: Mapping[str, Any]) -> None:
        save_state(folder, self.model, self.optimizer, extra)

    def load(self, folder: Path) -> dict[str, Any]:
        return load_state(folder, self.model, self.optimizer)

    def iter_full_state(self) -> Iterator[tuple[str, FullEntry]]:
        return full_entries(self.model, self.optimizer, keep=True)

    def export(self, folder: Path, *, tokenizer: Any, dtype: torch.dtype | None = None) -> None:
        save_model(folder, self.model, tokenizer, dtype=dtype)  # type: ignore[arg-type]
