"""One micro-batch through the model: the objective's summands, or the sampled-label loss that measures curvature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soul.batch import IGNORE_INDEX, SPLITS, Batch
from soul.models.scoring import AnswerLogps, answer_logits, answer_logps, token_logps
from soul.objectives.terms import Term, Unit
from soul.optim.curvature import label_uniforms, sample_labels
from soul.train.engine import Engine

Part = tuple[Term, float]  # a term, and by what its sum is multiplied in the objective


def count(batch: Batch, split: str, unit: Unit) -> int:
    """Supervised tokens, or rows that have any, of one split."""
    supervised_B = (batch.labels_BT != IGNORE_INDEX).sum(1)[batch.split_B == SPLITS.index(split)]
    return int(supervised_B.sum() if unit == "tokens" else (supervised_B > 0).sum())


def global_counts(engine: Engine, batches: Sequence[Batch], wanted: Sequence[tuple[str, Unit]], *votes: int) -> list[float]:
    """By what reported means are divided: counts over all ranks and micro-batches; behind them the sum of each vote. One reduction."""
    local = [*(sum(count(batch, split, unit) for batch in batches) for split, unit in wanted), *votes]
    counts: list[float] = engine.all_reduce_sum(torch.tensor(local, dtype=torch.float64, device=engine.device)).tolist()
    return counts


def _rows(scores: AnswerLogps, batch: Batch, split: str) -> tuple[AnswerLogps, Tensor]:
    """The scores and reference log-probabilities of one split's rows, renumbered from zero."""
    chosen_B = batch.split_B == SPLITS.index(split)
    keep_N = chosen_B[scores.row_N]
    renumber_B = chosen_B.cumsum(0) - 1
    rows = AnswerLogps(scores.logps_N[keep_N], renumber_B[scores.row_N[keep_N]], int(chosen_B.sum()))
    return rows, batch.reference_logps_B[chosen_B]


def term_sums(engine: Engine, batch: Batch, terms: Sequence[Term]) -> list[Tensor]:
    """Each term's sum over this micro-batch's rows. One joint forward over the rows of all splits."""
    with engine.autocast():
        scores = answer_logps(engine.model, batch)
    return [term.loss(*_rows(scores, batch, term.split)) for term in terms]


def select(batch: Batch, splits: Sequence[str]) -> Batch:
    """The rows of `splits`; when there are none, one row with its labels removed, so that every rank still runs a forward."""
    wanted = torch.tensor([SPLITS.index(split) for split in splits], dtype=torch.long, device=batch.split_B.device)
    keep_B = torch.isin(batch.split_B, wanted)
    if keep_B.any():
        return take(batch, keep_B)
    filler = take(batch, [0])
    return replace(filler, labels_BT=torch.full_like(filler.labels_BT, IGNORE_INDEX))


def take(batch: Batch, rows: Tensor | list[int]) -> Batch:
    """The rows of these numbers, or where a mask is true."""
    return replace(batch, **{name: getattr(batch, name)[rows] for name in Batch.__slots__})


def supervised_rows(batch: Batch, splits: Sequence[str]) -> list[int]:
    """Numbers of the rows of `splits` that have labels."""
    wanted = {SPLITS.index(split) for split in splits}
    has_labels_B = (batch.labels_BT != IGNORE_INDEX).any(1).tolist()
    return [b for b, split in enumerate(batch.split_B.tolist()) if split in wanted and has_labels_B[b]]


def splits_of(parts: Sequence[Part]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(term.split for term, _ in parts))


def sampled_loss(engine: Engine, batch: Batch, parts: Sequence[Part], occurrence_B: Tensor, *, seed: int, update: int) -> Tensor:
    """Sum over supervised tokens of sqrt(w) * CE(logits, label drawn from the model's own softmax), w as in `token_weights`.

    Its squared gradient is an unbiased diagonal of the Gauss-Newton matrix of sum_b w_b * CE_b (Bartlett's identity; Sophia-G,
    arXiv 2305.14342), so weights w = 1/T give the curvature of the mean loss with no further scale. `occurrence_B` as in
    `label_uniforms`.
    """
    with engine.autocast():
        logits_NV = answer_logits(engine.model, batch)
    lengths_B = (batch.labels_BT != IGNORE_INDEX).sum(1)
    uniforms_N = label_uniforms(
        batch.index_B, lengths_B, seed=seed, update=update, split_B=batch.split_B, occurrence_B=occurrence_B.to(batch.index_B.device)
    )
    losses_N = -token_logps(logits_NV, sample_labels(logits_NV.detach(), uniforms_N))
    return (token_weights(batch, logits_NV, parts).sqrt() * losses_N).sum()


def root_weighted_nll(engine: Engine, batch: Batch, parts: Sequence[Part]) -> Tensor:
    """As `sampled_loss`, with the rows' own labels."""
    with engine.autocast():
        logits_NV = answer_logits(engine.model, batch)
    losses_N = -token_logps(logits_NV, batch.targets_N)
    return (token_weights(batch, logits_NV, parts).sqrt() * losses_N).sum()


def weighted_nll(engine: Engine, model: nn.Module, batch: Batch, parts: Sequence[Part]) -> Tensor:
    """Sum over supervised tokens of w * CE(logits, label), of `model`, which may be differentiated twice."""
    batch = select(batch, splits_of(parts))
    with engine.autocast():
        logits_NV = answer_logits(model, batch)
    losses_N = F.cross_entropy(logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)), batch.targets_N, reduction="none")
    return (token_weights(batch, logits_NV, parts) * losses_N).sum()


def token_weights(batch: Batch, logits_NV: Tensor, parts: Sequence[Part]) -> Tensor:
    """How much each token's log-probability moves the objective, as a size, shape (N,): |d sum(factor * term) / d logp|, held fixed.

    That is the weight of the token's cross-entropy in the Gauss-Newton matrix of the objective: for a likelihood its factor, and for
    NPO's (2/beta) softplus(beta r) of a row's log-ratio r 2 sigmoid(beta r) of it, that paper's adaptive weight (arXiv 2404.05868).
    """
    logps_N = token_logps(logits_NV.detach(), batch.targets_N).requires_grad_()
    scores = AnswerLogps(logps_N, batch.row_N, len(batch.split_B))
    with torch.enable_grad():
        objective = torch.stack([factor * term.loss(*_rows(scores, batch, term.split)) for term, factor in parts]).sum()
    (slope_N,) = torch.autograd.grad(objective, logps_N)
    return slope_N.abs()
