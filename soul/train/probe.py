"""Cheap metrics while training: one likelihood pass over a few rows of each split, shared by all ranks. Figure 2's curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from soul.batch import Batch, collate
from soul.data.store import TokenStore
from soul.models.scoring import answer_logits, token_logps
from soul.train.engine import Engine

ROWS_PER_BATCH = 16
METRICS = ("probability", "exact_memorization", "extraction_strength", "nll")


def row_metrics(engine: Engine, batch: Batch) -> Tensor:
    """Sums over the batch's rows of METRICS, then the number of rows; shape (5,), float64.

    Probability is exp(mean token log-probability); exact memorisation the share of answer tokens that are the arg-max, EOS left
    out; extraction strength 1 - k/T with k the first position from which every answer token is the arg-max.
    """
    with engine.autocast():
        logits_NV = answer_logits(engine.model, batch)
    logps_N = token_logps(logits_NV, batch.targets_N).double()
    hits_N = logits_NV.argmax(-1) == batch.targets_N
    sums = torch.zeros(5, dtype=torch.float64, device=logps_N.device)
    for row in batch.row_N.unique().tolist():
        chosen_N = batch.row_N == row
        nll = -logps_N[chosen_N].mean()
        hits_T = hits_N[chosen_N][:-1].double()  # the last supervised token is EOS
        suffix = hits_T.flip(0).cumprod(0).sum()
        size = max(len(hits_T), 1)
        sums += torch.stack([(-nll).exp(), hits_T.sum() / size, suffix / size, nll, torch.ones_like(nll)])
    return sums


@torch.no_grad()
def probe_splits(engine: Engine, stores: Mapping[str, str], *, limit: int, pad_id: int) -> dict[str, dict[str, float]]:
    """METRICS per named store, over its first `limit` rows. Collective: every rank scores its share of the batches."""
    engine.model.eval()
    results = {}
    for name, folder in stores.items():
        store = TokenStore.open(Path(folder))
        order = sorted(range(min(len(store), limit)), key=lambda i: (int(store.lengths_R[i]), i))
        batches = [order[start : start + ROWS_PER_BATCH] for start in range(0, len(order), ROWS_PER_BATCH)]
        total = torch.zeros(len(METRICS) + 1, dtype=torch.float64, device=engine.device)
        for turn in range(0, len(batches), engine.world):
            mine = batches[turn + engine.rank] if turn + engine.rank < len(batches) else []
            batch = collate([(name, store.row(i)) for i in mine], pad_id=pad_id).to(engine.device)
            total += row_metrics(engine, batch)
        total = engine.all_reduce_sum(total)
        results[name] = {metric: float(total[i] / total[-1].clamp(min=1)) for i, metric in enumerate(METRICS)}
    engine.model.train()
    return results
