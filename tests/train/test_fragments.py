"""A run of a flattened tensor is the union of its boxes, and checkpoints of runs are checkpoints of the whole tensor."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from soul.train.fragments import Fragment, boxes
from tests.distributed import spawn

SHAPES = [(), (1,), (7,), (3, 5), (1, 4), (4, 1), (2, 3, 5), (3, 1, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_are_the_run_in_order(shape: tuple[int, ...]) -> None:
    numel = math.prod(shape)
    whole = torch.arange(numel).view(shape)
    for start in range(numel + 1):
        for stop in range(start, numel + 1):
            found = boxes(shape, start, stop)
            assert len(found) <= max(2 * len(shape) - 1, 1)
            pieces = [whole[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))] for box in found]
            assert all(0 not in piece.shape for piece in pieces)
            assert [int(x) for piece in pieces for x in piece.flatten()] == list(range(start, stop))


def uneven(rank: int, world: int, numel: int) -> tuple[int, int]:
    """Where rank's run begins and ends: rank 0 has the lesser part, down to nothing."""
    cut = numel // 3
    return ((0, cut), (cut, numel))[rank] if world == 2 else (0, numel)


def save_and_read(rank: int, world: int, folder: str) -> dict[tuple[int, ...], torch.Tensor]:
    wholes = {shape: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in SHAPES}

    def fragments(empty: bool) -> dict[str, Fragment]:
        found = {}
        for shape, whole in wholes.items():
            start, stop = uneven(rank, world, whole.numel())
            local = whole.flatten()[start:stop].clone()
            found[str(shape)] = Fragment(torch.full_like(local, torch.nan) if empty else local, start=start, shape=shape)
        return found

    dcp.save(fragments(empty=False), checkpoint_id=f"{folder}/fragments")
    dcp.save({str(shape): whole for shape, whole in wholes.items()}, checkpoint_id=f"{folder}/wholes")
    for source in ("fragments", "wholes"):
        read = fragments(empty=True)
        dcp.load(read, checkpoint_id=f"{folder}/{source}")
        for shape, whole in wholes.items():
            start, stop = uneven(rank, world, whole.numel())
            assert torch.equal(read[str(shape)].local, whole.flatten()[start:stop]), (source, shape)
    return wholes


def test_fragments_and_whole_tensors_read_each_other(tmp_path: Path) -> None:
    wholes = spawn(save_and_read, 2, str(tmp_path))[0]
    read = {str(shape): torch.full(shape, torch.nan) for shape in SHAPES}
    dcp.load(read, checkpoint_id=str(tmp_path / "fragments"), no_dist=True)
    for shape, whole in wholes.items():
        assert torch.equal(read[str(shape)], whole)


def test_a_fragment_does_not_compute() -> None:
    with pytest.raises(TypeError, match="only saved and loaded"):
        torch.add(Fragment(torch.zeros(2), start=0, shape=(4,)), 1)
