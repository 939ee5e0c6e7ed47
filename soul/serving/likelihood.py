"""Log-probabilities of tokens that are given: what echo, lm-eval and the heat strip ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from transformers import PreTrainedModel

from soul.evaluate.likelihood import plan_batches
from soul.serving.decoder import describe

_LOGIT_BYTES: Final = 256 * 2**20  # the (T, V) logits of a batch in fp32 stay below this, a single long row apart


@dataclass(frozen=True, slots=True)
class Likelihood:
    """One row: log p (nats) of every token but the first, which nothing predicts, and the most probable tokens in its place."""

    logps: list[float]
    tops: list[tuple[tuple[int, float], ...]]


@torch.inference_mode()
def likelihoods(model: PreTrainedModel, rows: Sequence[Sequence[int]], num_top: int) -> list[Likelihood]:
    """Score rows of token ids, rows of similar length together."""
    found: dict[int, Likelihood] = {}
    vocabulary = int(model.config.get_text_config().vocab_size)
    for batch in plan_batches([len(row) for row in rows], max(1, _LOGIT_BYTES // (4 * vocabulary))):
        length = max(len(rows[b]) for b in batch)
        ids_BT = torch.zeros(len(batch), length, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for place, b in enumerate(batch):  # on the right: causal attention never looks there, and positions need no care
            ids_BT[place, : len(rows[b])] = torch.as_tensor(rows[b], dtype=torch.long)
            mask_BT[place, : len(rows[b])] = 1
        output = model(input_ids=ids_BT.to(model.device), attention_mask=mask_BT.to(model.device), use_cache=False)
        for place, b in enumerate(batch):
            targets_N = ids_BT[place, 1 : len(rows[b])].to(model.device)
            logps, tops = describe(output.logits[place, : len(rows[b]) - 1], targets_N, num_top)
            found[b] = Likelihood(logps, tops)
    return [found[b] for b in range(len(rows))]
