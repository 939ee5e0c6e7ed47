"""Bias and noise of the Gauss-Newton-Bartlett estimate by what is squared at once: the whole step, or each micro-batch.

    python -m perf.curvature_variance [--seeds 200]

Eight rows of a step of a tiny float64 Llama. The truth is enumerated: every label of every token by its probability. "Bias" is the mean
estimate over the truth, summed over all weights; "sd" the root of the summed variances over the norm of the true diagonal; "sd of the
average" is that of Sophia's h after many updates (b2 .95), which is what a step divides by. Smaller units are less noisy and depend on
how a step is cut; only the whole step is the same for every micro-batch and number of workers.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from soul.batch import collate
from soul.optim.curvature import label_uniforms, sample_labels
from soul.records import TokenRow
from tests.train.engine_runs import ragged_stores, tiny_llama

BETA2 = 0.95
NUM_ROWS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=200)
    options = parser.parse_args()
    model = tiny_llama()
    parameters = list(model.parameters())
    rows = [ragged_stores()["retain"].row(i) for i in range(NUM_ROWS)]
    weight = 1 / sum(row.num_supervised for row in rows)
    logits = [_row_logits(model, row) for row in rows]
    truth = _exact(logits, parameters) * weight

    def gradients(seed: int) -> Tensor:
        """Of each row's weighted loss of sampled labels, shape (rows, weights)."""
        found = []
        for row, logits_NV in zip(rows, logits, strict=True):
            uniforms = label_uniforms(torch.tensor([row.index]), torch.tensor([row.num_supervised]), seed=seed, update=0)
            labels = sample_labels(logits_NV.detach(), uniforms)
            loss = -math.sqrt(weight) * logits_NV.log_softmax(-1).gather(-1, labels[:, None]).sum()
            found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)]))
        return torch.stack(found)

    sums = {size: [torch.zeros_like(truth), torch.zeros_like(truth)] for size in (8, 4, 2, 1)}
    for seed in range(options.seeds):
        by_row = gradients(seed)
        for size, (first, second) in sums.items():
            estimate = by_row.view(NUM_ROWS // size, size, -1).sum(1).square().sum(0)
            first += estimate
            second += estimate.square()
    for size, (first, second) in sums.items():
        mean = first / options.seeds
        variance = (second / options.seeds - mean.square()) * options.seeds / (options.seeds - 1)
        sd = math.sqrt(float(variance.sum())) / float(truth.norm())
        averaged = sd * math.sqrt((1 - BETA2) / (1 + BETA2))
        unit = "the whole step" if size == NUM_ROWS else f"micro-batches of {size}"
        print(f"{unit:18s} bias {float(mean.sum() / truth.sum()):.3f}   sd {sd:.2f}   sd of the average {averaged:.2f}")


def _row_logits(model: torch.nn.Module, row: TokenRow) -> Tensor:
    batch = collate([("retain", row)], pad_id=0, multiple=1)
    logits: Tensor = model(input_ids=batch.input_ids_BT).logits[0]
    return logits[row.num_prompt - 1 : -1]


def _exact(logits: list[Tensor], parameters: list[torch.nn.Parameter]) -> Tensor:
    """Diagonal of the Gauss-Newton matrix of the summed loss."""
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    for logits_NV in logits:
        for logps_V in logits_NV.log_softmax(-1):
            for logp in logps_V:
                gradients = torch.autograd.grad(logp, parameters, retain_graph=True)
                total += math.exp(logp.item()) * torch.cat([g.flatten() for g in gradients]).square()
    return total


if __name__ == "__main__":
    main()
