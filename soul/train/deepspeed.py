"""The DeepSpeed engine: ZeRO stages 1 to 3 with our own optimizers, optionally in CPU memory.

ZeRO wraps the optimizer: its `step` reduces and flattens gradients, then calls ours on flat fp32 partitions. A curvature step is the
same call with the optimizer in another mode and clipping off, so that h sees the reduced gradients of every stage and only those.
Gradients are accumulated and reduced in fp32 in every precision, and round-robin gradients stay off: with them DeepSpeed 0.19 mixes up
which part of a parameter a rank has. Checkpoints are those of the other engines, each rank writing its flat pieces.

`deepspeed` is imported by the engine and not by this module: the other engines run where it is not installed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from soul.optim.sophia import Mode, SophiaG
from soul.records import InputError
from soul.train.engine import BuildModel, BuildOptimizer, EngineConfig, FullEntry, StepInfo, unwrap
from soul.train.export import export_weights
from soul.train.ranks import join_group, sum_over_ranks
from soul.train.sharding import fill, share_model
from soul.train.state import load_tensors, materialise_state, save_tensors
from soul.train.update import enable_checkpointing
from soul.train.zero import Share, flat_partitions, full_states, gather, named_fragments, refresh_weights, shares

NEVER = 2**31

# Elements: of a reduction or gather, of the part of a stage-3 shard that is stepped at once, and of whole weights at a time in stage 3.
BUCKET, SUB_GROUP, MAX_LIVE = 50_000_000, 10**9, 10**9


class DeepSpeedEngine:
    """One rank of ZeRO. The process group exists already.

    Raises:
        InputError: deepspeed is not installed.
    """

    sharded = True

    def __init__(self, config: EngineConfig, *, rank: int, world: int, local_rank: int) -> None:
        self.config = config
        self.rank, self.world = rank, world
        self.device = join_group(config, rank, world, local_rank)
        self._deepspeed = import_deepspeed(has_gpu=self.device.type == "cuda")
        os.environ.setdefault("LOCAL_RANK", str(local_rank))  # where DeepSpeed looks for it
        self.model: nn.Module
        self.optimizer: torch.optim.Optimizer
        self._shares: dict[nn.Parameter, Share]

    def prepare(self, build_model: BuildModel, build_optimizer: BuildOptimizer) -> None:
        settings = zero_settings(self.config, has_gpu=self.device.type == "cuda")
        dtype = torch.bfloat16 if self.config.precision == "bf16" else None
        model, values = share_model(build_model)
        kept_as = {name: parameter.dtype for name, parameter in model.named_parameters()}
        if any(kind != torch.float32 for kind in kept_as.values()):
            raise InputError(f"deepspeed keeps fp32 weights, got a model in {next(iter(kept_as.values()))}. Load it in fp32.")
        self._deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        fill(model, values, device=self.device, dtype=dtype, shard=lambda unit: self._partition(unit, settings))
        enable_checkpointing(model, self.config)
        optimizer = build_optimizer(model)
        optimizer.state.clear()  # that of whole parameters; the flat partitions get theirs below
        self.model, *_ = self._deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
        self.optimizer = optimizer
        flats = flat_partitions(self._zero)
        optimizer.state.clear()
        materialise_state(optimizer, flats)
        self._shares = shares(self._zero, [parameter for parameter in model.parameters() if parameter.requires_grad])
        self._set_weights(values)

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()  # in bf16 the model's weights are bf16 copies of the fp32 ones

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.world, scale_wrt_gas=False)  # ZeRO averages over ranks

    def step(self) -> StepInfo:
        self._engine.step()
        return StepInfo(grad_norm=float(self._engine.get_global_grad_norm()))

    def hessian_step(self) -> None:
        zero = self._zero
        clip, zero.clip_grad = zero.clip_grad, 0.0
        try:
            self._run_as("hessian")
        finally:
            zero.clip_grad = clip
        if zero.overflow:  # of gradients that are not finite ZeRO tells nobody, and does not call the optimizer
            self.optimizer.spoil_hessian()  # type: ignore[attr-defined]

    def look_at_ratios(self) -> None:
        self._run_as("ratios")

    def _run_as(self, mode: Mode) -> None:
        assert isinstance(self.optimizer, SophiaG)
        with self.optimizer.doing(mode):
            self._zero.step()  # not the engine's step, which counts
            self._zero.zero_grad()

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        return sum_over_ranks(tensor, self.device)

    def save(self, folder: Path, extra: Mapping[str, Any]) -> None:
        save_tensors(folder, named_fragments(unwrap(self.model), self.optimizer, self._shares), extra)
        dist.barrier()  # whichever rank returns, the checkpoint is complete

    def load(self, folder: Path) -> dict[str, Any]:
        extra = load_tensors(folder, named_fragments(unwrap(self.model), self.optimizer, self._shares))
        refresh_weights(self._zero)
        return extra

    def local_weights(self) -> list[Tensor]:
        return flat_partitions(self._zero)

    def iter_full_state(self) -> Iterator[tuple[str, FullEntry]]:
        for name, weights, state in full_states(unwrap(self.model), self.optimizer, self._shares, self.device):
            keep = self.rank == 0
            yield (
                name,
                FullEntry(
                    weights.cpu() if keep else torch.empty(0),
                    {key: value.cpu() if keep else torch.empty(0) for key, value in state.items()},
                ),
            )

    def export(self, folder: Path, *, tokenizer: Any, dtype: torch.dtype | None = None) -> None:
        export_weights(folder, unwrap(self.model), self._whole, tokenizer=tokenizer, dtype=dtype, is_writer=self.rank == 0)

    @property
    def _engine(self) -> Any:
        """The DeepSpeedEngine around the model."""
        return self.model

    @property
    def _zero(self) -> Any:
        """ZeRO's wrapper of the optimizer."""
        return self._engine.optimizer

    def _partition(self, unit: nn.Module, settings: dict[str, Any]) -> None:
        """Stage 3 keeps a part of each parameter from the start; the others hold the whole model."""
        if self.config.stage == 3:
            self._deepspeed.zero.Init(module=unit, config_dict_or_path=settings)

    def _set_weights(self, values: Mapping[str, Tensor]) -> None:
        """Give the fp32 weights rank 0's values: ZeRO made them from the model's, which bf16 has rounded."""
        for name, parameter in unwrap(self.model).named_parameters():
            if parameter in self._shares:
                share = self._shares[parameter]
                whole = values[name].detach().to(self.device, copy=True) if values else torch.empty(share.shape, device=self.device)
                dist.broadcast(whole, src=0)
                share.of(share.flat).copy_(whole.view(-1)[share.start : share.start + share.numel])
        refresh_weights(self._zero)

    def _whole(self, tensor: Tensor) -> Tensor:
        """The fp32 values of one of the model's parameters. Collective."""
        if isinstance(tensor, nn.Parameter) and tensor in self._shares:
            share = self._shares[tensor]
            return gather(share.of(share.flat), start=share.start, shape=share.shape, device=self.device)
        if hasattr(tensor, "ds_id"):  # stage 3 also cuts what is not trained
            with self._deepspeed.zero.GatheredParameters([tensor]):
                return tensor.detach().clone()
        return tensor


def zero_settings(config: EngineConfig, *, has_gpu: bool) -> dict[str, Any]:
    """DeepSpeed's configuration of `config`."""
    place = {"device": "cpu", "pin_memory": has_gpu}
    zero: dict[str, Any] = {"stage": config.stage, "round_robin_gradients": False}
    zero |= {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    zero |= {"sub_group_size": SUB_GROUP, "stage3_max_live_parameters": MAX_LIVE, "stage3_max_reuse_distance": MAX_LIVE}
    if config.offload is not None:
        zero["offload_optimizer"] = place
    if config.offload == "all":
        zero["offload_param"] = place
    return {
        "train_micro_batch_size_per_gpu": 1,  # only DeepSpeed's own counters use it
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": NEVER,
    }


def import_deepspeed(*, has_gpu: bool) -> Any:
    """The package, told what it runs on, quiet, and without the inference kernel that it would compile for minutes on a CPU.

    Raises:
        InputError: it is not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if has_gpu else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise InputError(f"engine deepspeed needs the deepspeed package ({error}). Install it, or use --engine fsdp.") from error
    if not has_gpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its import sets its own level
    return deepspeed
