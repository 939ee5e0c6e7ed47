"""How far each engine is from `single`: losses, weights, momentum and curvature in float64, and optimizer bytes per rank.

    python -m perf.sharding

Prints one row per engine, world size and optimizer. Runs on the CPU with gloo; the model and the runs are the tests' own.
"""

from __future__ import annotations

from typing import Any

import torch

from soul.train.engines import ENGINES
from soul.train.job import state_bytes
from tests.distributed import spawn
from tests.train.engine_runs import OPTIMIZERS, largest_difference, new_engine, straight_run

COLUMNS = ("engine", "ranks", "optimizer", "losses", "weights", "m", "h", "bytes/rank")
PARTS = ("param/", "exp_avg/", "exp_avg_sq/")


def runs_on(rank: int, world: int) -> dict[tuple[str, str], dict[str, Any]]:
    """Every distributed engine with every optimizer, on this rank: the run in float64, the bytes in float32."""
    runs = {}
    for engine in (name for name in ENGINES if name != "single"):
        for optimizer in OPTIMIZERS:
            run = straight_run(new_engine(engine, optimizer, rank=rank, world=world), optimizer)
            narrow = new_engine(engine, optimizer, rank=rank, world=world, dtype=torch.float32)
            straight_run(narrow, optimizer)
            runs[engine, optimizer] = run | {"bytes": state_bytes(narrow)}
    return runs


def row(engine: str, world: int, optimizer: str, run: dict[str, Any], reference: dict[str, Any], num_bytes: list[int]) -> tuple[str, ...]:
    losses = max(abs(one - other) for one, other in zip(run["losses"], reference["losses"], strict=True))
    differences = [losses, *(largest_difference(run["state"], reference["state"], part) for part in PARTS)]
    return (engine, str(world), optimizer, *(f"{value:.1e}" for value in differences), " + ".join(map(str, num_bytes)))


def main() -> None:
    reference = {optimizer: straight_run(new_engine("single", optimizer), optimizer) for optimizer in OPTIMIZERS}
    table: list[tuple[str, ...]] = [COLUMNS]
    for world in (1, 2):
        ranks = spawn(runs_on, world, timeout_s=300)
        for (engine, optimizer), run in ranks[0].items():
            num_bytes = [results[engine, optimizer]["bytes"] for results in ranks]
            table.append(row(engine, world, optimizer, run, reference[optimizer], num_bytes))
    widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
