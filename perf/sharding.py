"""How far each engine is from `single`: losses, weights, momentum and curvature, and optimizer bytes per rank.

    python -m perf.sharding

Prints one row per engine, world size and optimizer. In float64; DeepSpeed has only float32, where the optimizers are made smooth
(a large eps), because rounding can turn around a step that is the sign of a momentum without curvature. Runs on the CPU with gloo; the
model and the runs are the tests' own.
"""

from __future__ import annotations

from typing import Any

import torch

from soul.train.job import state_bytes
from tests.distributed import spawn
from tests.train.engine_runs import OPTIMIZERS, largest_difference, new_engine, straight_run

COLUMNS = ("engine", "ranks", "optimizer", "losses", "weights", "m", "h", "bytes/rank")
PARTS = ("param/", "exp_avg/", "exp_avg_sq/")
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {},
    "fsdp, offloaded": {"offload": "all"},
    **{f"deepspeed {stage}": {"zero_stage": stage} for stage in (1, 2, 3)},
    **{f"deepspeed {stage}, optimizer offloaded": {"zero_stage": stage, "offload": "optimizer"} for stage in (1, 2, 3)},
    "deepspeed 3, offloaded": {"zero_stage": 3, "offload": "all"},
}


def kind_of(engine: str, optimizer: str) -> tuple[str, torch.dtype]:
    """The optimizer's name among the tests', and the precision it is compared in."""
    return (f"smooth {optimizer}", torch.float32) if engine.startswith("deepspeed") else (optimizer, torch.float64)


def run_of(engine: str, optimizer: str, *, rank: int = 0, world: int = 1, dtype: torch.dtype | None = None) -> tuple[dict[str, Any], int]:
    """What a run computed, and its optimizer's bytes on this rank."""
    name, usual = kind_of(engine, optimizer)
    settings = ENGINES.get(engine, {})
    made = new_engine(engine.replace(",", " ").split()[0], name, rank=rank, world=world, dtype=dtype or usual, **settings)
    return straight_run(made, name), state_bytes(made)


def runs_on(rank: int, world: int) -> dict[tuple[str, str], dict[str, Any]]:
    """Every distributed engine with every optimizer, on this rank; the bytes are those of a run in float32."""
    runs = {}
    for engine in ENGINES:
        for optimizer in OPTIMIZERS:
            run, _ = run_of(engine, optimizer, rank=rank, world=world)
            _, num_bytes = run_of(engine, optimizer, rank=rank, world=world, dtype=torch.float32)
            runs[engine, optimizer] = run | {"bytes": num_bytes}
    return runs


def reference(engine: str, optimizer: str) -> dict[str, Any]:
    """The run of `single` that this engine's is compared with."""
    name, dtype = kind_of(engine, optimizer)
    return straight_run(new_engine("single", name, dtype=dtype), name)


def row(engine: str, world: int, optimizer: str, run: dict[str, Any], expected: dict[str, Any], num_bytes: list[int]) -> tuple[str, ...]:
    losses = max(abs(one - other) for one, other in zip(run["losses"], expected["losses"], strict=True))
    differences = [losses, *(largest_difference(run["state"], expected["state"], part) for part in PARTS)]
    return (engine, str(world), optimizer, *(f"{value:.1e}" for value in differences), " + ".join(map(str, num_bytes)))


def main() -> None:
    table: list[tuple[str, ...]] = [COLUMNS]
    for world in (1, 2):
        ranks = spawn(runs_on, world, timeout_s=900)
        for (engine, optimizer), run in ranks[0].items():
            num_bytes = [results[engine, optimizer]["bytes"] for results in ranks]
            table.append(row(engine, world, optimizer, run, reference(engine, optimizer), num_bytes))
    widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
