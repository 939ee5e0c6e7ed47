"""Reproducible randomness of the two curvature estimates: labels drawn from the model's own softmax, and probes of +1 and -1.

Gauss-Newton-Bartlett, which needs labels.
For logits f_b and labels yhat_b ~ softmax(f_b), drawn independently, the gradient of CE(f_b, yhat_b) has zero mean and the
expectation of its square is the diagonal of the Gauss-Newton matrix J_b^T S_b J_b. Squares of a sum lose their cross terms in
expectation, so for any weights w_b >= 0

    g = grad sum_b sqrt(w_b) CE(f_b, yhat_b)      has      E[g^2] = diag of the Gauss-Newton matrix of sum_b w_b CE_b.

Hence a loss that weighs tokens unequally (forget and retain means of different lengths) needs the square roots of its weights
and no further scale. For equal weights 1/T it is T times the squared gradient of the mean loss.

Hutchinson: for a probe u of independent entries with mean 0 and variance 1, E[u * (H u)] is the diagonal of H.

Shape letters: B rows, N supervised positions of all rows in row order, V vocabulary.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from soul.draws import uniforms, words


def label_uniforms(
    index_B: Tensor, lengths_B: Tensor, *, seed: int, update: int, split_B: Tensor | None = None, occurrence_B: Tensor | None = None
) -> Tensor:
    """One uniform in [0, 1) per supervised position, float64 on the CPU, shape (N,).

    Row b's numbers come from a counter-based stream named by (seed, update, split, example index, occurrence) alone: neither the rank,
    nor the cut into micro-batches, nor a restart changes them. `update`: number of the curvature update. `lengths_B`: supervised
    positions per row. `split_B`: where rows of several splits meet, since indices are unique only within one. `occurrence_B`: how often
    the row was in the step before; without it the rows given are the step. Copies with the same labels would square to four times what
    two rows have, and not to twice.
    """
    splits = torch.zeros_like(index_B) if split_B is None else split_B
    rows = list(zip(splits.tolist(), index_B.where(lengths_B > 0, -1).tolist(), strict=True))
    occurrences = count_before(rows) if occurrence_B is None else occurrence_B.tolist()
    draws = [
        uniforms(length, "sampled labels", seed, update, *row, occurrence)
        for row, occurrence, length in zip(rows, occurrences, lengths_B.tolist(), strict=True)
    ]
    return torch.from_numpy(np.concatenate([*draws, np.empty(0)]))


def count_before(rows: Sequence[tuple[int, int]]) -> list[int]:
    """How often each row is among those before it."""
    seen: Counter[tuple[int, int]] = Counter()
    found = []
    for row in rows:
        found.append(seen[row])
        seen[row] += 1
    return found


@torch.no_grad()
def sample_labels(logits_NV: Tensor, uniforms_N: Tensor, *, chunk: int = 1024) -> Tensor:
    """Labels by inverse CDF, shape (N,), int64: each an id of positive probability. `chunk`: positions whose CDF exists at once."""
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    uniforms_N = uniforms_N.to(logits_NV.device)
    labels = [torch.empty(0, dtype=torch.long, device=logits_NV.device)]
    for logits_CV, uniforms_C in zip(logits_NV.split(chunk), uniforms_N.split(chunk), strict=True):
        cdf_CV = torch.softmax(logits_CV.to(dtype), dim=-1).cumsum_(dim=-1).cummax(dim=-1).values  # a parallel sum may fall by a rounding
        total_C = cdf_CV[:, -1]
        # Strictly below the total, whatever the rounding: the first id beyond it then has a positive probability.
        target_C = torch.minimum((uniforms_C * total_C).to(dtype), torch.nextafter(total_C, torch.zeros_like(total_C)))
        labels.append(torch.searchsorted(cdf_CV, target_C[:, None], right=True)[:, 0].clamp_(max=logits_NV.shape[1] - 1))
    return torch.cat(labels)


def probe_signs(name: str, shape: tuple[int, ...], *, seed: int, update: int) -> Tensor:
    """Hutchinson's probe of one parameter: +1 or -1 with equal odds, float32 on the CPU.

    From a stream named by (seed, update, the parameter's name) alone, so that every rank, cut and restart has the same. Signs and not
    normal numbers: of all probes of unit variance they give the estimate the least one.
    """
    numel = math.prod(shape)
    drawn = words(-(-numel // 64), "probes", seed, update, name)
    bits = np.unpackbits(drawn.view(np.uint8) if sys.byteorder == "little" else drawn.byteswap().view(np.uint8), count=numel)
    return torch.from_numpy(bits).to(torch.float32).mul_(2).sub_(1).view(shape)
