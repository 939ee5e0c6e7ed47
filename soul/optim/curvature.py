"""The Gauss-Newton-Bartlett estimate: labels drawn from the model's own softmax, reproducibly.

For logits f_b and labels yhat_b ~ softmax(f_b), drawn independently, the gradient of CE(f_b, yhat_b) has zero mean and the
expectation of its square is the diagonal of the Gauss-Newton matrix J_b^T S_b J_b. Squares of a sum lose their cross terms in
expectation, so for any weights w_b >= 0

    g = grad sum_b sqrt(w_b) CE(f_b, yhat_b)      has      E[g^2] = diag of the Gauss-Newton matrix of sum_b w_b CE_b.

Hence a loss that weighs tokens unequally (forget and retain means of different lengths) needs the square roots of its weights
and no further scale. For equal weights 1/T it is T times the squared gradient of the mean loss.

Shape letters: B rows, N supervised positions of all rows in row order, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_WORD = 2**64


def label_uniforms(index_B: Tensor, lengths_B: Tensor, *, seed: int, update: int, split_B: Tensor | None = None) -> Tensor:
    """One uniform in [0, 1) per supervised position, float64 on the CPU, shape (N,).

    Row b's numbers come from a counter-based stream named by (seed, update, split, example index) alone: neither the rank, nor
    the cut into micro-batches, nor a restart changes them. `update`: number of the curvature update. `lengths_B`: supervised
    positions per row. `split_B`: where rows of several splits meet, since indices are unique only within one.
    """
    splits = torch.zeros_like(index_B) if split_B is None else split_B
    rows = zip(index_B.tolist(), lengths_B.tolist(), splits.tolist(), strict=True)
    draws = [_uniforms(length, key=(seed, update), stream=(split, index)) for index, length, split in rows]
    return torch.from_numpy(np.concatenate([*draws, np.empty(0)]))


def _uniforms(num: int, *, key: tuple[int, int], stream: tuple[int, int]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """The first `num` of a Philox stream. Raw words, because numpy may change what its distributions make of them."""
    key_words, counter = (np.array([word % _WORD for word in words], dtype=np.uint64) for words in (key, (0, 0, *stream)))
    words = np.asarray(np.random.Philox(key=key_words, counter=counter).random_raw(num), dtype=np.uint64)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


@torch.no_grad()
def sample_labels(logits_NV: Tensor, uniforms_N: Tensor, *, chunk: int = 1024) -> Tensor:
    """Labels by inverse CDF, shape (N,), int64: each an id of positive probability. `chunk`: positions whose CDF exists at once."""
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    uniforms_N = uniforms_N.to(logits_NV.device)
    labels = [torch.empty(0, dtype=torch.long, device=logits_NV.device)]
    for logits_CV, uniforms_C in zip(logits_NV.split(chunk), uniforms_N.split(chunk), strict=True):
        cdf_CV = torch.softmax(logits_CV.to(dtype), dim=-1).cumsum_(dim=-1)
        total_C = cdf_CV[:, -1]
        # Strictly below the total, whatever the rounding: the first id beyond it then has a positive probability.
        target_C = torch.minimum((uniforms_C * total_C).to(dtype), torch.nextafter(total_C, torch.zeros_like(total_C)))
        labels.append(torch.searchsorted(cdf_CV, target_C[:, None], right=True)[:, 0].clamp_(max=logits_NV.shape[1] - 1))
    return torch.cat(labels)


def sampled_label_nll(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """-log softmax(logits)[label] per position, in float32 or wider: what is weighted, summed and differentiated. Shape (N,)."""
    return F.cross_entropy(logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)), labels_N, reduction="none")
