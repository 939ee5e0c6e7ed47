"""What the optimizers of this package share: state on local shards, bounded temporaries, statistics. No communication.

An update rule is written for lists of equally shaped pieces (parameters, gradients, state). The base class cuts every tensor of a
rank (plain tensors, local shards of DTensors, ZeRO's flat partitions) into such pieces and owns state and checkpoints.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from soul.optim.stats import OptimizerStats, step_sums
from soul.records import InputError

# Elements whose temporaries exist at once. Unbounded foreach needs two more copies of the shard: 54 GB for an unsharded 7B model.
CHUNK_NUMEL = 4 * 2**20

Group = dict[str, Any]
Row = tuple[Tensor, ...]  # one piece of a parameter, of its gradient and of its state
Bucket = list[list[Tensor]]  # the same, transposed: parameters, gradients, state of many pieces


class ShardOptimizer(torch.optim.Optimizer, ABC):
    """Abstract: a subclass names its `state_keys` and updates one bucket.

    `foreach`: True updates many tensors per kernel, False one tensor at a time, None chooses True on CUDA and False elsewhere; the
    numbers are the same. `eager_state=False` leaves the state to the first step, for ZeRO, whose flat partitions replace the
    parameters after construction. Arithmetic is float32 or wider whatever the storage.
    """

    state_keys: ClassVar[tuple[str, ...]]
    state_dtype: torch.dtype = torch.float32
    foreach: bool | None = None
    collect_stats: bool = False
    _sums: Tensor | None = None

    def __init__(self, params: Any, defaults: dict[str, Any], *, state_dtype: torch.dtype, foreach: bool | None, eager_state: bool) -> None:
        if state_dtype not in (torch.float32, torch.float64, torch.bfloat16):
            raise InputError(f"state_dtype must be float32, float64 or bfloat16 (squares underflow in float16), got {state_dtype}.")
        super().__init__(params, defaults)
        self.state_dtype, self.foreach = state_dtype, foreach
        if eager_state:
            self.init_state()

    @abstractmethod
    def _update_(self, group: Group, bucket: Bucket) -> None:
        """One step of a bucket (parameters, gradients, *state), in place, and `_record` of its clipped directions."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        self._for_each_bucket(self._update_)
        return loss

    def _for_each_bucket(self, rule: Callable[[Group, Bucket], None]) -> None:
        for group in self.param_groups:
            rows = [(p, p.grad, *self._state_of(p)) for p in group["params"] if p.grad is not None]
            for bucket in buckets(rows, foreach=self.foreach):
                wide = [[t.to(torch.promote_types(t.dtype, torch.float32)) for t in column] for column in bucket]
                rule(group, wide)
                for column, source in zip(bucket, wide, strict=True):
                    for tensor, result in zip(column, source, strict=True):
                        if result is not tensor:
                            tensor.copy_(result)

    @torch.no_grad()
    def init_state(self, params: Iterable[Tensor] | None = None) -> None:
        """Create the zero state of `params` (None: of all groups), so that a checkpoint can be loaded into it."""
        for p in params if params is not None else [p for group in self.param_groups for p in group["params"]]:
            self._state_of(p)

    def _state_of(self, p: Tensor) -> tuple[Tensor, ...]:
        """In the order of `state_keys`. A DTensor's state is a DTensor; a float64 parameter's is float64."""
        state, dtype = self.state[p], torch.float64 if p.dtype == torch.float64 else self.state_dtype
        for key in self.state_keys:
            if key not in state:
                state[key] = torch.zeros_like(p, dtype=dtype)
        return tuple(state[key] for key in self.state_keys)

    def state_buckets(self) -> Iterator[Bucket]:
        """The state alone. From `self.state`, because ZeRO-3 leaves the groups without parameters between steps."""
        return buckets([self._state_of(p) for p in self.state], foreach=self.foreach)

    def _record(self, directions: list[Tensor], *, lr: float) -> None:
        if self.collect_stats:
            self._add_sums(step_sums(directions, lr=lr))

    def _add_sums(self, sums: Tensor) -> None:
        self._sums = sums if self._sums is None else self._sums.to(sums.device) + sums

    def take_stats(self) -> OptimizerStats:
        """Sums over the calls since the last take; zeros on the CPU if `collect_stats` was off or the shards are empty."""
        sums, self._sums = self._sums, None
        return OptimizerStats(torch.zeros(4, dtype=torch.float64) if sums is None else sums)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but into the existing state and in its dtype: torch would round float32 state to a bfloat16 parameter's."""
        state = self.state
        super().load_state_dict({**state_dict, "state": {}})
        self.state = state
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=True):
            saved = state_dict["state"].get(i)
            for key, own in zip(self.state_keys, self._state_of(p), strict=True):
                if saved is None:  # saved before its first step
                    own.zero_()
                elif key in saved and saved[key].shape == own.shape:
                    own.copy_(saved[key])
                else:
                    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in saved.items()}
                    raise InputError(
                        f"State of parameter {i} must hold {key} of shape {tuple(own.shape)}, got {shapes}. Is it this model's?"
                    )


def local_shard(tensor: Tensor) -> Tensor:
    """The part of a DTensor on this rank, or the tensor itself; the memory is shared."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    if any(placement.is_partial() for placement in tensor.placements):
        raise InputError(f"An optimizer needs reduced gradients, got a DTensor placed as {tensor.placements}. Reduce it first.")
    return tensor.to_local().detach()


def buckets(rows: Iterable[Row], *, foreach: bool | None) -> Iterator[Bucket]:
    """Gather pieces of equal kind (devices, dtypes) until a chunk is full; without foreach every piece is a bucket."""
    gathered: list[Row] = []
    kind, numel = None, 0
    for piece in _pieces(rows):
        piece_kind = [(tensor.device, tensor.dtype) for tensor in piece]
        many = piece[0].is_cuda if foreach is None else foreach
        if gathered and (not many or piece_kind != kind or numel + piece[0].numel() > CHUNK_NUMEL):
            yield [list(column) for column in zip(*gathered, strict=True)]
            gathered, numel = [], 0
        gathered.append(piece)
        kind, numel = piece_kind, numel + piece[0].numel()
    if gathered:
        yield [list(column) for column in zip(*gathered, strict=True)]


def _pieces(rows: Iterable[Row]) -> Iterator[Row]:
    """Local shards, cut along the first dimension where they are larger than a chunk; empty ones are skipped."""
    for row in rows:
        shards = tuple(local_shard(tensor) for tensor in row)
        shape, numel = shards[0].shape, shards[0].numel()
        if any(shard.shape != shape for shard in shards):
            raise InputError(f"A parameter, its gradient and state must be sharded alike, got shapes {[tuple(s.shape) for s in shards]}.")
        if numel > CHUNK_NUMEL:
            length = max(1, CHUNK_NUMEL * shape[0] // numel)
            yield from zip(*(shard.split(length) for shard in shards), strict=True)
        elif numel > 0:
            yield shards
