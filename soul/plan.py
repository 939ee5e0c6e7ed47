"""What a run will do and need, worked out beforehand: batch arithmetic, curvature passes, and the memory of one worker.

The memory model is the one of the project's notes on sharding (section 7). Letters: N parameters, B of them in one decoder block,
R outside the blocks, L blocks, d width, f MLP width, V vocabulary, T tokens in a micro-batch, W workers, s optimizer states,
c bytes of a number in computation (4, or 2 in bf16). With adapters N grows by theirs, and gradients, states and ZeRO's fp32 weights are
the adapters' alone.

    single, ddp    weights 4 N + gradients 4 N + states 4 s N; in bf16 autocast's copy of the weights 2 N.
                   DDP's buckets are views of the gradients.
    fsdp           (4 + 4 + 4 s) N / W, and beside the shards what is whole for a moment: the root's weights and gradients 2 c R,
                   the weights of two blocks 2 c B (one computes, one is fetched), one block's gradients c B and their fp32 copy 4 B
                   Offloaded, the shards are in CPU memory and a block's are on their way.
    deepspeed 1    weights c N, gradients c N and in bf16 their fp32 sum 4 N; fp32 weights and states (4 + 4 s) N / W, and in fp32 a
                   copy of the gradients 4 N / W while stepping
    deepspeed 2    weights c N, gradients 4 N / W with a copy while stepping 4 N / W, fp32 weights and states, two buckets
    deepspeed 3    weights c N / W, gradients 4 N / W, fp32 weights and states, a copy of one sub-group's gradients while stepping,
                   whole weights of c min(N, 10^9) and two buckets. What is offloaded is in CPU memory at every stage: fp32
                   weights, states and the gradients' sum; with `all` the weights too.
    activations    c T (8 d + 3 f) per block: inputs of both norms and what they return, q, k, v, attention out (8 d), gate, up and
                   their product (3 f). With gradient checkpointing c T d per block and one block in full.
    logits         T V (c + 4 + 4): logits, their fp32 copy, its gradient. Every token counted as supervised: an upper bound.

The curvature pass reuses the gradients' memory, and reference log-probabilities are one number a row: no second model. Hutchinson's
holds probe, gradient, product and their sum, 16 N, and as many activations again for the second derivative.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn
from transformers.pytorch_utils import Conv1D

from soul.config import Config
from soul.data.pairing import PairedPlan
from soul.models.tiny import TinyConfig
from soul.objectives.methods import needs_reference, streamed_splits
from soul.report.numbers import memory
from soul.train.config import TrainConfig
from soul.train.curvature import hessian_splits
from soul.train.deepspeed import BUCKET, MAX_LIVE, SUB_GROUP
from soul.train.engine import EngineConfig, Need, Precision
from soul.train.sharding import decoder_blocks

FP32 = 4
COMPUTE_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "pure_bf16": 2}
REFERENCE_BYTES = 8
LINEAR = (nn.Linear, Conv1D)
ACTIVATIONS, LOGITS, PRODUCT = "activations", "logits (at most)", "Hessian product"
COPY, WHOLE = "bf16 copy of the weights", "unsharded for a moment"
AT_MOST = frozenset({ACTIVATIONS, LOGITS, PRODUCT, COPY, WHOLE})
REMEDIES = (
    "Shard over more workers (--engine fsdp), recompute activations (--gradient-checkpointing), lower --micro-batch-size, train adapters "
    "(--lora-rank) or use --offload."
)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a decoder that memory depends on. `num_params` counts tied weights once."""

    num_params: int
    num_blocks: int
    block_params: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    block_linear_width: int = 0
    """Inputs plus outputs of a block's linear layers: what an adapter of rank one adds."""

    @property
    def root_params(self) -> int:
        return self.num_params - self.num_blocks * self.block_params

    def adapter_params(self, rank: int) -> int:
        return self.num_blocks * self.block_linear_width * rank


@dataclass(frozen=True, slots=True)
class MemoryItem:
    """`on_cpu`: in CPU memory beside a GPU's; without a GPU it is all the same."""

    name: str
    num_bytes: int
    on_cpu: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """One unlearning run. Rows are counted per split; a step takes as many of each streamed split."""

    splits: tuple[str, ...]
    rows_per_step: int
    rows_per_worker: int
    micro_batches: int
    micro_batch_rows: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    curvature_updates: int
    curvature_cost: float
    """Forward and backward passes of curvature updates as a share of the steps' own; a second derivative counts as another pass."""
    checkpoints: int
    """Resumable ones, behind steps and epochs that ask for them. What the clock asks for is not known beforehand."""
    checkpoint_bytes: int
    """Of one resumable checkpoint: trained weights and optimizer state. 0 without a shape."""
    model_bytes: int
    """Of the whole model in fp32. 0 without a shape."""
    memory: tuple[MemoryItem, ...]
    """Of one worker while it trains. Empty without a shape."""

    @property
    def memory_bytes(self) -> int:
        """What is not offloaded."""
        return sum(item.num_bytes for item in self.memory if not item.on_cpu)

    @property
    def needs(self) -> tuple[Need, ...]:
        """What is not offloaded, as jobs carry it to their workers."""
        return tuple(Need(item.name, item.num_bytes, item.name not in AT_MOST) for item in self.memory if not item.on_cpu)

    def export_bytes(self, config: Config) -> int:
        """Of the model that the run leaves."""
        return self.model_bytes // 2 if config.model.export_dtype == "bf16" else self.model_bytes

    def disk_bytes(self, config: Config) -> int:
        """What the run directory needs at its fullest: the checkpoints that are kept, the one being written, the exported model."""
        most = config.train.keep_checkpoints + 1
        kept = most if config.train.save_minutes else min(most, self.checkpoints)
        return kept * self.checkpoint_bytes + self.export_bytes(config)

    def staging_bytes(self, config: Config) -> int:
        """What a node needs at most of a run on a store: one checkpoint on its way, and the model on its way."""
        return (self.checkpoint_bytes if config.train.saves else 0) + self.export_bytes(config)

    def written_bytes(self, config: Config) -> int:
        """All that the run writes but for checkpoints by the clock: `checkpoints` of them and the model."""
        return self.checkpoints * self.checkpoint_bytes + self.export_bytes(config)


def shape_of(model: nn.Module, *, hidden_size: int, intermediate_size: int, vocab_size: int) -> ModelShape:
    """Count a model, which may be on the meta device."""
    blocks = decoder_blocks(model)
    return ModelShape(
        num_params=sum(parameter.numel() for parameter in model.parameters()),
        num_blocks=len(blocks),
        block_params=sum(parameter.numel() for parameter in blocks[0].parameters()),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        vocab_size=vocab_size,
        block_linear_width=sum(sum(module.weight.shape) for module in blocks[0].modules() if isinstance(module, LINEAR)),
    )


def tiny_shape(config: TinyConfig) -> ModelShape:
    """The tiny Llama's: tied embeddings, four square matrices and three MLP matrices a block, two norms a block and one at the end."""
    width, inner = config.hidden_size, config.intermediate_size
    block = 4 * width**2 + 3 * width * inner + 2 * width
    total = config.num_layers * block + config.vocab_size * width + width
    linear_width = 4 * (2 * width) + 3 * (width + inner)
    return ModelShape(total, config.num_layers, block, width, inner, config.vocab_size, linear_width)


def plan_run(config: Config, *, num_forget: int, num_retain: int, shape: ModelShape | None, max_length: int) -> Plan:
    """Plan the unlearning of `config` on so many rows, the longest of `max_length` tokens.

    Raises:
        InputError: a split has fewer rows than a step takes.
    """
    train, workers = config.train, config.engine.num_workers
    splits = streamed_splits(config.method)
    lengths = {split: np.full(num_retain if split == "retain" else num_forget, max_length, dtype=np.int64) for split in splits}
    paired = PairedPlan(lengths, batch_size=train.batch_size, seed=train.seed)
    rows = min(train.batch_size, paired.num_lead)
    per_worker = -(-rows // workers)
    micro_rows = min(train.micro_batch_size, per_worker)
    total = train.total_steps(paired.steps_per_epoch)
    updates = sum(config.optimizer.curvature_due(step) for step in range(total))
    share = len(hessian_splits(config.method, config.optimizer)) / len(splits)
    tokens = micro_rows * len(splits) * _padded(max_length)
    return Plan(
        splits=splits,
        rows_per_step=rows,
        rows_per_worker=per_worker,
        micro_batches=-(-per_worker // train.micro_batch_size),
        micro_batch_rows=micro_rows,
        steps_per_epoch=paired.steps_per_epoch,
        total_steps=total,
        warmup_steps=max(1, int(train.warmup_fraction * total)) if train.warmup_fraction > 0 else 0,
        curvature_updates=updates,
        curvature_cost=updates * share * (2 if config.optimizer.estimator == "hutchinson" else 1) / total,
        checkpoints=_num_checkpoints(train, total, paired.steps_per_epoch),
        checkpoint_bytes=0 if shape is None else FP32 * _sizes(config, shape)[1] * (1 + config.optimizer.state_tensors),
        model_bytes=0 if shape is None else FP32 * shape.num_params,
        memory=() if shape is None else memory_per_worker(config, shape, tokens=tokens, num_forget=num_forget),
    )


def memory_per_worker(config: Config, shape: ModelShape, *, tokens: int, num_forget: int) -> tuple[MemoryItem, ...]:
    """The formulas at the top of this file, for `tokens` padded tokens in a micro-batch."""
    engine = config.engine
    compute = COMPUTE_BYTES[engine.computes_in]
    width, inner, blocks = shape.hidden_size, shape.intermediate_size, shape.num_blocks
    one_block = compute * tokens * (8 * width + 3 * inner)
    saved = blocks * compute * tokens * width + one_block if engine.gradient_checkpointing else blocks * one_block
    total, trained = _sizes(config, shape)
    states = config.optimizer.state_tensors
    if engine.name == "deepspeed":
        items = _zero_items(engine, total=total, trained=trained, num_states=states)
    else:
        items = _own_items(engine, shape, total=total, trained=trained, num_states=states)
    items += [MemoryItem(ACTIVATIONS, saved), MemoryItem(LOGITS, tokens * shape.vocab_size * (compute + 2 * FP32))]
    if config.optimizer.estimator == "hutchinson":
        items.append(MemoryItem(PRODUCT, 4 * FP32 * trained + saved))
    if needs_reference(config.method):
        items.append(MemoryItem("reference log-probabilities", REFERENCE_BYTES * num_forget))
    return tuple(items)


def _sizes(config: Config, shape: ModelShape) -> tuple[int, int]:
    """Parameters, and how many of them are trained."""
    if config.train.lora_rank is None:
        return shape.num_params, shape.num_params
    adapters = shape.adapter_params(config.train.lora_rank)
    return shape.num_params + adapters, adapters


def _own_items(engine: EngineConfig, shape: ModelShape, *, total: int, trained: int, num_states: int) -> list[MemoryItem]:
    """Weights, gradients and states of single, ddp and fsdp."""
    sharded = engine.name == "fsdp"
    compute = COMPUTE_BYTES[engine.computes_in]
    parts = engine.num_workers if sharded else 1
    own, own_trained = -(-total // parts), -(-trained // parts)
    on_cpu = engine.offload is not None
    stored, kind = (2, "bf16") if engine.precision == "pure_bf16" else (FP32, "fp32")
    items = [
        MemoryItem(f"weights ({kind})", stored * own, on_cpu),
        MemoryItem(f"gradients ({kind})", stored * own_trained, on_cpu),
        MemoryItem(f"optimizer state ({num_states} x fp32)", FP32 * own_trained * num_states, on_cpu),
    ]
    if sharded:
        items.append(MemoryItem(WHOLE, 2 * compute * shape.root_params + (3 * compute + FP32) * shape.block_params))
    elif engine.precision == "bf16":
        items.append(MemoryItem(COPY, compute * total))
    return items


def _zero_items(engine: EngineConfig, *, total: int, trained: int, num_states: int) -> list[MemoryItem]:
    """Weights, gradients and states of ZeRO."""
    compute, stage = COMPUTE_BYTES[engine.computes_in], engine.stage
    own, own_trained = -(-total // engine.num_workers), -(-trained // engine.num_workers)
    off_states, off_weights = engine.offload is not None, engine.offload == "all"
    items = [
        MemoryItem(f"weights ({engine.precision})", compute * (own if stage == 3 else total), off_weights),
        MemoryItem("master weights (fp32)", FP32 * own_trained, off_states),
        MemoryItem(f"optimizer state ({num_states} x fp32)", FP32 * own_trained * num_states, off_states),
    ]
    if stage == 1:
        items.append(MemoryItem("gradients", compute * trained))
        summed = FP32 * (own_trained if engine.precision == "fp32" else trained)
        items.append(MemoryItem("gradients (fp32), summed", summed, off_states))
        return items
    items.append(MemoryItem("gradients (fp32)", FP32 * own_trained, off_states))
    items.append(MemoryItem("gradients of a step", FP32 * (own_trained if stage == 2 else min(own_trained, SUB_GROUP)), off_states))
    items.append(MemoryItem("buckets", 2 * compute * BUCKET))
    if stage == 3:
        items.append(MemoryItem(WHOLE, compute * min(total, MAX_LIVE)))
    return items


@dataclass(frozen=True, slots=True)
class Machine:
    """Memory of one machine. `gpu_bytes`: of its smallest GPU, 0 where there is none."""

    host_bytes: int
    gpu_bytes: int = 0


def shortages(plan: Plan, machine: Machine, *, num_workers: int) -> list[str]:
    """What of `num_workers` workers on one machine will not fit, and what to do; empty if all fits, or the shape is unknown."""
    on_cpu = sum(item.num_bytes for item in plan.memory if item.on_cpu)
    found = []
    if machine.gpu_bytes and plan.memory_bytes > machine.gpu_bytes:
        found.append(f"a worker needs about {memory(plan.memory_bytes)}, its GPU has {memory(machine.gpu_bytes)}. {REMEDIES}")
    host = num_workers * (on_cpu if machine.gpu_bytes else on_cpu + plan.memory_bytes)
    if host > machine.host_bytes:
        what = "of offloaded memory " if machine.gpu_bytes else ""
        found.append(
            f"{num_workers} worker(s) need about {memory(host)} {what}together, this machine has {memory(machine.host_bytes)}. "
            + ("Use more machines or GPUs without --offload." if machine.gpu_bytes else REMEDIES)
        )
    return found


def _padded(length: int, multiple: int = 8) -> int:
    return -(-length // multiple) * multiple


def _num_checkpoints(train: TrainConfig, total: int, steps_per_epoch: int) -> int:
    """Those that steps and epochs ask for, none behind the last step."""
    return sum(train.save_due(step, steps_per_epoch) for step in range(1, total))
