"""What the training loop asks of an engine: where parameters, gradients and optimizer state live, and how they meet over ranks.

The loop owns counts, schedules and the curvature interval; an engine owns placement and reduction only, so every engine gives the
losses, weights and curvature of `single`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from soul.device import Device, Wanted
from soul.models.stored import BuildModel as BuildModel  # part of this module's interface

BuildOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
Precision = Literal["fp32", "bf16", "pure_bf16"]

# What says where a run lives and not what it computes: it may be another each time the run is resumed.
PLACEMENT = frozenset({"name", "device", "num_workers", "min_workers", "max_failures", "zero_stage", "offload", "gradient_checkpointing"})


class EngineConfig(BaseModel):
    """Where the model lives while it trains."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: Literal["single", "ddp", "fsdp", "deepspeed"] = Field(
        "single", description="single process, replicated (ddp) or sharded (fsdp: FSDP2; deepspeed: ZeRO)"
    )
    device: Wanted = Field(
        "auto",
        description="what trains and evaluates: gpu waits for what an autoscaler can add, and is an error where there can be none; "
        "auto: GPUs where the cluster has or can add some, else CPUs",
    )
    num_workers: int = Field(1, ge=1, description="training workers (ranks), each with a GPU or a CPU of its own")
    precision: Literal["auto"] | Precision = Field(
        "auto",
        description="compute precision; weights, gradients and optimizer state stay fp32, but for pure_bf16, which is for parity studies: "
        "weights in bf16, where small steps are lost (auto: bf16 on GPUs, fp32 on CPUs; a resumed run keeps what it began with)",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass: less memory, more time")
    max_grad_norm: float | None = Field(1.0, gt=0, description="clip the global gradient norm to this; null: no clipping")
    zero_stage: int | None = Field(
        None, ge=1, le=3, description="what deepspeed shards: optimizer state (1), gradients too (2), weights too (3) (null: 3)"
    )
    offload: Literal["optimizer", "all"] | None = Field(
        None, description="keep this in CPU memory: optimizer (deepspeed) or weights too: all (fsdp, deepspeed stage 3) (null: nothing)"
    )

    min_workers: int | None = Field(
        None, ge=1, description="go on with as few workers as this when a node is lost, and with more when it is back (null: num_workers)"
    )
    max_failures: int = Field(2, ge=0, description="how often failed workers are started again, from the last checkpoint")

    @model_validator(mode="after")
    def _workers_that_may_be_lost(self) -> Self:
        if self.min_workers is None:
            return self
        if self.name == "single":
            raise ValueError("min_workers belongs to engines of several workers, got single. Remove engine.min_workers (--min-workers).")
        if self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers must be at most num_workers {self.num_workers}, got {self.min_workers}. Lower engine.min_workers."
            )
        return self

    @model_validator(mode="after")
    def _sharding_of_the_engine(self) -> Self:
        if self.zero_stage is not None and self.name != "deepspeed":
            raise ValueError(f"zero_stage belongs to deepspeed, got engine {self.name}. Remove engine.zero_stage (--zero-stage).")
        if self.offload is not None and self.name not in ("fsdp", "deepspeed"):
            raise ValueError(f"offload belongs to fsdp and deepspeed, got engine {self.name}. Remove engine.offload (--offload).")
        if self.offload == "optimizer" and self.name == "fsdp":
            raise ValueError("fsdp offloads all or nothing, got offload optimizer. Set engine.offload (--offload) to all.")
        if self.precision == "pure_bf16" and self.name == "deepspeed":
            raise ValueError("deepspeed keeps fp32 weights, got precision pure_bf16. Choose engine single, ddp or fsdp, or precision bf16.")
        if self.offload == "all" and self.name == "deepspeed" and self.stage != 3:
            raise ValueError(f"zero_stage {self.stage} offloads the optimizer only. Set offload to optimizer, or zero_stage to 3.")
        return self

    def decided(self, device: Device) -> Self:
        """With `device` and the precision that goes with it; what jobs carry and engines are made of."""
        return self.model_copy(update={"device": device, "precision": self.precision_on(device)})

    def precision_on(self, device: Device) -> Precision:
        """The chosen precision; with auto, what the device is made for."""
        if self.precision == "auto":
            return "bf16" if device == "gpu" else "fp32"
        return self.precision

    @property
    def computes_in(self) -> Precision:
        """The precision of a decided config."""
        assert self.precision != "auto", "the driver decides device and precision before anything is computed: EngineConfig.decided"
        return self.precision

    @property
    def runs_on(self) -> Device:
        """The device of a decided config."""
        assert self.device != "auto", "the driver decides device and precision before anything is computed: EngineConfig.decided"
        return self.device

    @property
    def preparing_precision(self) -> Precision:
        """In which models to unlearn are made, of a decided config: pure_bf16 is for unlearning itself."""
        return "bf16" if self.computes_in == "pure_bf16" else self.computes_in

    def check_adapters(self, lora_rank: int | None) -> None:
        """Raises:
        ValueError: the weights that adapters are added to would be rounded.
        """
        if lora_rank is not None and self.name == "deepspeed" and self.precision not in ("fp32", "auto"):
            raise ValueError("lora_rank under deepspeed in bf16 would round the weights it adds to. Choose engine fsdp, or precision fp32.")

    def check_estimator(self, optimizer: str, estimator: str | None) -> None:
        """Raises:
        ValueError: the optimizer's curvature needs a second derivative through a sharded backward pass, which there is none of.
        """
        if estimator == "hutchinson" and self.name in ("fsdp", "deepspeed"):
            raise ValueError(
                f"{optimizer} differentiates gradients again, which {self.name} reduces in a way that has no derivative. Choose engine "
                "single or ddp (--engine), or optimizer sophia (--optimizer), whose curvature every engine measures."
            )

    def cautions(self, learning_rate: float) -> list[str]:
        """What is allowed and costs more than it looks. Shares were measured on weights of size 0.02 over 200 sign-like steps."""
        if self.precision != "pure_bf16":
            return []
        lost = (
            "leave most weights where they are (85 % at 1e-5, 92 % at 5e-6)"
            if learning_rate <= 1e-5
            else "are rounded (12 % never move at 1e-4)"
        )
        return [f"precision pure_bf16 keeps weights in bf16, where steps of {learning_rate:g} {lost}. Use bf16 but for parity studies."]

    @property
    def stage(self) -> int:
        """The ZeRO stage of deepspeed."""
        return self.zero_stage or 3


@dataclass(frozen=True, slots=True)
class Need:
    """One part of what a rank needs of its device's memory, from the plan; what is not sure is an upper bound."""

    name: str
    num_bytes: int
    is_sure: bool


@dataclass(frozen=True, slots=True)
class StepInfo:
    """What one optimizer step did. `grad_norm` is the global norm before clipping."""

    grad_norm: float


@dataclass(frozen=True, slots=True)
class FullEntry:
    """One parameter with its optimizer state, unsharded, on the CPU."""

    param: Tensor
    state: Mapping[str, Tensor]


class Engine(Protocol):
    """One per rank. Every method but the attributes is collective: all ranks call it, in the same order."""

    config: EngineConfig
    rank: int
    world: int
    device: torch.device
    model: nn.Module
    optimizer: torch.optim.Optimizer
    sharded: bool

    def prepare(self, build_model: BuildModel, build_optimizer: BuildOptimizer) -> None:
        """Build model and optimizer in the order the engine needs (FSDP shards before the optimizer sees parameters)."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The context every forward runs under (bf16 autocast, or nothing)."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients of `loss`, already divided by constants of the run, summed over ranks. `last`: no more before a step."""

    def step(self) -> StepInfo:
        """Clip, update, zero the gradients."""

    def hessian_step(self) -> None:
        """Fold the accumulated gradients' squares into the curvature: no clipping, no update; zero the gradients."""

    def look_at_ratios(self) -> None:
        """Clip, count what a step with these gradients would divide by what (SophiaG.take_ratios), zero the gradients; nothing moves."""

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks."""

    def save(self, folder: Path, extra: Mapping[str, Any]) -> None:
        """Write this rank's part of an exact checkpoint, and `extra` (JSON) from rank 0."""

    def load(self, folder: Path) -> dict[str, Any]:
        """Restore a checkpoint written by any engine at any world size in place; returns `extra`."""

    def local_weights(self) -> list[Tensor]:
        """The trained weights' part on this rank, as the optimizer steps them."""

    def iter_full_state(self) -> Iterator[tuple[str, FullEntry]]:
        """Every parameter and its state, gathered one at a time; real tensors on rank 0, empty ones elsewhere."""

    def export(self, folder: Path, *, tokenizer: Any, dtype: torch.dtype | None = None) -> None:
        """A Hugging Face folder of the weights, written by rank 0."""


def unwrap(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside DDP; itself otherwise."""
    inner = getattr(model, "module", model)
    assert isinstance(inner, nn.Module)
    return inner


def num_threads(config: EngineConfig, device: torch.device, *, local_ranks: int, otherwise: int) -> int:
    """CPU threads of one of `local_ranks` ranks on this node. Where a GPU's weights are stepped in CPU memory: its share of the cores."""
    if config.offload is None or device.type == "cpu":
        return otherwise
    return max(1, (os.cpu_count() or 1) // local_ranks)
