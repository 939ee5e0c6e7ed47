"""Reference log-probabilities of the leading split under the frozen target, scored by the engine that is about to train it.

Never a second model: the engine has just prepared the target, in shards or whole, and no step or checkpoint has touched it yet. Batches
are fixed by row length, so that on one kind of device a number depends on nothing but `reference_path`'s arguments.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from soul.batch import collate
from soul.data.steps import StepSource
from soul.data.store import TokenStore
from soul.models.scoring import answer_logps
from soul.rundir import digest, write_atomically
from soul.store import local, path_of, pull_file
from soul.train.engine import Engine, EngineConfig
from soul.train.lora import without_adapters

ROWS_PER_BATCH = 16


class NonFiniteReference(ArithmeticError):
    """The target gives a row a log-probability that is NaN or infinite. Raised on every rank, before any step."""

    def __init__(self) -> None:
        super().__init__("the target gives some forget rows a log-probability that is not finite; check the model's weights")


def reference_path(cache: Path, *, model_key: str, revision: str | None, trust_remote_code: bool, rows: str, engine: EngineConfig) -> Path:
    """Where the numbers of these rows under this model belong: named by everything that changes a bit of them.

    In fp32 and pure_bf16 all engines agree at any number of ranks; in bf16 autocast rounds in other places than bf16 weights do.
    """
    rounding = None
    if engine.computes_in == "bf16":
        rounding = "autocast" if engine.name in ("single", "ddp") else engine.name
    facts = [model_key, revision, trust_remote_code, rows, ROWS_PER_BATCH, engine.runs_on, engine.computes_in, rounding]
    return cache / "reference" / f"{digest(facts, length=20)}.npy"


def make_reference(engine: Engine, source: StepSource) -> None:
    """Have `source.reference` made, unless it is there already, before anybody opens it. Collective, with the target in the engine.

    Raises:
        NonFiniteReference: on every rank.
    """
    assert source.reference is not None
    path = path_of(source.reference)
    if _any_rank(engine, engine.rank == 0 and pull_file(path)):
        return
    [split, folders] = next(iter(source.stores.items()))
    logps_R = score_rows(engine, TokenStore.open(*(Path(local(folder)) for folder in folders)), split)
    if not np.isfinite(logps_R).all():
        raise NonFiniteReference
    if engine.rank == 0:
        _write(path, logps_R)
    _any_rank(engine, engine.rank == 0)  # nobody looks for it before it is whole


@torch.no_grad()
def score_rows(engine: Engine, store: TokenStore, split: str) -> NDArray[np.float64]:
    """The answers' log-probabilities (nats) in row order, the same on every rank, whatever adapters the model has. Collective."""
    order = np.argsort(store.lengths_R, kind="stable").tolist()
    batches = [order[start : start + ROWS_PER_BATCH] for start in range(0, len(order), ROWS_PER_BATCH)]
    found_R = torch.zeros(len(store), dtype=torch.float64)
    was_training = engine.model.training
    engine.model.eval()
    with without_adapters(engine.model):
        for turn in range(0, len(batches), engine.world):
            mine = batches[turn + engine.rank] if turn + engine.rank < len(batches) else []
            batch = collate([(split, store.row(i)) for i in mine], pad_id=0).to(engine.device)
            with engine.autocast():
                scores = answer_logps(engine.model, batch)
            # on the CPU: a GPU adds in an order that changes from run to run
            found_R.index_add_(0, torch.tensor(mine, dtype=torch.long)[scores.row_N.cpu()], scores.logps_N.double().cpu())
    engine.model.train(was_training)
    logps_R: NDArray[np.float64] = engine.all_reduce_sum(found_R.to(engine.device)).cpu().numpy()
    return logps_R


def _any_rank(engine: Engine, value: bool) -> bool:
    """Whether it is true on any rank; no rank goes on before all have asked."""
    return bool(engine.all_reduce_sum(torch.tensor([int(value)], device=engine.device)).item())


def _write(path: Path, logps_R: NDArray[np.float64]) -> None:
    """Whole or not at all; one of several writers of the same numbers is the last."""
    file = io.BytesIO()
    np.save(file, logps_R, allow_pickle=False)
    write_atomically(path, file.getvalue())
