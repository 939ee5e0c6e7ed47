"""Flat pieces of tensors in checkpoints: what ZeRO leaves of a parameter on a rank, saved and loaded as part of the whole tensor.

A checkpoint stores boxes of whole tensors. A run of a flattened tensor is a few boxes: the end of one row, whole rows, the beginning
of another. Cut like this, ZeRO's partitions are written to and read from the files that every other engine uses, nothing gathered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes


def boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """The elements `start` to `stop` of a flattened tensor of `shape` as boxes of it, in that order: at most 2 x dimensions - 1."""
    if start >= stop:
        return []
    if len(shape) < 2:
        return [((start,), (stop - start,))] if shape else [((), ())]
    inner = shape[1:]
    row = math.prod(inner)

    def within(index: int, first: int, last: int) -> list[Box]:
        return [((index, *offsets), (1, *sizes)) for offsets, sizes in boxes(inner, first, last)]

    found, first = [], start // row
    if start % row:
        found += within(first, start % row, min(stop - first * row, row))
        first += 1
    if stop // row > first:
        zeros = (0,) * len(inner)
        found.append(((first, *zeros), (stop // row - first, *inner)))
    if stop % row and stop // row >= first:
        found += within(stop // row, 0, stop % row)
    return found


class Fragment(Tensor):
    """Stands for a whole tensor of which this rank holds `local`, the elements from `start` on; `local` may be empty.

    It can be saved and loaded (in place) by `torch.distributed.checkpoint`, which asks for the three methods below; nothing else.
    """

    local: Tensor
    start: int

    @staticmethod
    def __new__(cls, local: Tensor, *, start: int, shape: Sequence[int]) -> Fragment:
        whole = Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=local.dtype, device=local.device)
        assert isinstance(whole, Fragment)
        whole.local, whole.start = local.detach(), start
        return whole

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"a Fragment is only saved and loaded, {func} was called on one")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Fragment({self.local.numel()} elements from {self.start} of {tuple(self.shape)})"

    def _boxes(self) -> list[Box]:
        return boxes(tuple(self.shape), self.start, self.start + self.local.numel())

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes)) for offsets, sizes in self._boxes()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        begin = 0
        for offsets, sizes in self._boxes():
            numel = math.prod(sizes)
            if index.offset == torch.Size(offsets):
                return self.local[begin : begin + numel].view(sizes)
            begin += numel
        raise KeyError(f"{self!r} has no box at {index.offset}")
