"""The running batch: rows with their key-value cache, one token for every row at each step.

Rows of any length share a batch (padded on the left); new rows join between steps, finished ones leave at once and take the padding that
only they needed with them, so that nobody waits for the longest answer. Shape letters: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel

End = Literal["stop", "length", "cancelled", "broken"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """`temperature` 0 is greedy. `num_top`: None is no log-probabilities. The same seed gives the same answer, whoever shares the batch."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    num_top: int | None = None


@dataclass(eq=False, slots=True)
class Row:
    """One answer in the making. `logps` and `tops` (ids with log-probabilities, nats) are the model's own, before temperature and top_p.

    `closing`: the end-of-sequence token that ended the row; it is not among `tokens`, but `logps` and `tops` have it.
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    eos_ids: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    tops: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    end: End | None = None
    closing: int | None = None
    dice: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.dice = random.Random(self.sampling.seed)

    @property
    def most_positions(self) -> int:
        return len(self.prompt) + self.sampling.max_tokens


class RunningBatch:
    def __init__(self, model: PreTrainedModel) -> None:
        self.rows: list[Row] = []
        self._model = model
        self._device = model.device
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._cache = DynamicCache()
        self._mask_BT = torch.zeros(0, 0, dtype=torch.long, device=self._device)

    @torch.inference_mode()
    def admit(self, rows: Sequence[Row]) -> None:
        """Read the prompts of new rows, choose their first tokens, and let them join."""
        length = max(len(row.prompt) for row in rows)
        ids_BT = torch.zeros(len(rows), length, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for b, row in enumerate(rows):
            ids_BT[b, length - len(row.prompt) :] = torch.as_tensor(row.prompt, dtype=torch.long)
            mask_BT[b, length - len(row.prompt) :] = 1
        mask_BT = mask_BT.to(self._device)
        cache = DynamicCache()
        logits_BV = self._forward(ids_BT.to(self._device), mask_BT, (mask_BT.cumsum(-1) - 1).clamp(min=0), cache)
        if self.rows:
            self._merge(cache, mask_BT)
        else:
            self._cache, self._mask_BT = cache, mask_BT
        first = len(self.rows)
        self.rows += rows
        choose(logits_BV, self.rows[first:])

    @torch.inference_mode()
    def step(self) -> None:
        """One more token for every row."""
        last_B1 = torch.tensor([[row.tokens[-1]] for row in self.rows], device=self._device)
        self._mask_BT = functional.pad(self._mask_BT, (0, 1), value=1)
        positions_B1 = self._mask_BT.sum(-1, keepdim=True) - 1
        choose(self._forward(last_B1, self._mask_BT, positions_B1, self._cache), self.rows)

    @torch.inference_mode()
    def release(self) -> list[Row]:
        """Take the rows that have ended out of the batch."""
        done = [row for row in self.rows if row.end is not None]
        if not done:
            return done
        keep = [b for b, row in enumerate(self.rows) if row.end is None]
        self.rows = [self.rows[b] for b in keep]
        if not keep:
            self.clear()
            return done
        keep_B = torch.tensor(keep, device=self._device)
        mask_BT = self._mask_BT[keep_B]
        padding = int((mask_BT.cumsum(-1) == 0).sum(-1).min())
        self._mask_BT = mask_BT[:, padding:]
        for layer in self._layers(self._cache):
            layer.keys = layer.keys[keep_B, :, padding:]
            layer.values = layer.values[keep_B, :, padding:]
        return done

    def clear(self) -> None:
        self.rows, self._cache = [], DynamicCache()
        self._mask_BT = self._mask_BT[:0, :0]

    def _forward(self, ids_BT: Tensor, mask_BT: Tensor, positions_BT: Tensor, cache: DynamicCache) -> Tensor:
        """Logits behind the last position, shape (B, V)."""
        placed = {"position_ids": positions_BT} if self._takes_positions else {}
        output = self._model(input_ids=ids_BT, attention_mask=mask_BT, past_key_values=cache, use_cache=True, **placed, **self._last_only)
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV

    def _merge(self, cache: DynamicCache, mask_BT: Tensor) -> None:
        """Put new rows behind the old ones, the shorter of the two padded on the left."""
        missing = self._mask_BT.shape[1] - mask_BT.shape[1]
        old, new = max(-missing, 0), max(missing, 0)
        self._mask_BT = torch.cat([functional.pad(self._mask_BT, (old, 0)), functional.pad(mask_BT, (new, 0))])
        for mine, theirs in zip(self._layers(self._cache), self._layers(cache), strict=True):
            mine.keys = torch.cat([functional.pad(mine.keys, (0, 0, old, 0)), functional.pad(theirs.keys, (0, 0, new, 0))])
            mine.values = torch.cat([functional.pad(mine.values, (0, 0, old, 0)), functional.pad(theirs.values, (0, 0, new, 0))])

    @staticmethod
    def _layers(cache: DynamicCache) -> list[Any]:
        """Layers that share another's keys hold none of their own."""
        layers: list[Any] = cache.layers
        return [layer for layer in layers if layer.is_initialized]


def choose(logits_BV: Tensor, rows: Sequence[Row]) -> None:
    """Append the next token to every row, and end the rows that are complete."""
    logits_BV = logits_BV.float()
    best_B, tokens_B = logits_BV.max(-1)
    drawn = [b for b, row in enumerate(rows) if row.sampling.temperature > 0]
    if drawn:
        drawn_N = torch.tensor(drawn, device=logits_BV.device)
        tokens_B[drawn_N] = sample(logits_BV[drawn_N], [rows[b] for b in drawn])
    tokens = tokens_B.tolist()
    for row, token, best in zip(rows, tokens, best_B.tolist(), strict=True):
        if best - best != 0:  # nan or inf: training has destroyed the model
            row.end = "broken"
        elif token in row.eos_ids:
            row.end, row.closing = "stop", token
        else:
            row.tokens.append(token)
            row.end = "length" if len(row.tokens) >= row.sampling.max_tokens else row.end
    told = [b for b, row in enumerate(rows) if row.sampling.num_top is not None and row.end != "broken"]
    if told:
        told_N = torch.tensor(told, device=logits_BV.device)
        num_top = max(rows[b].sampling.num_top or 0 for b in told)
        logps, tops = describe(logits_BV[told_N], tokens_B[told_N], num_top)
        for b, logp, top in zip(told, logps, tops, strict=True):
            rows[b].logps.append(logp)
            rows[b].tops.append(top[: rows[b].sampling.num_top])


def sample(logits_BV: Tensor, rows: Sequence[Row]) -> Tensor:
    """Tokens drawn with each row's own dice: the smallest set that holds `top_p` of the probability, by inverse CDF."""
    temperature_B = torch.tensor([row.sampling.temperature for row in rows], device=logits_BV.device)
    top_p_B = torch.tensor([row.sampling.top_p for row in rows], device=logits_BV.device)
    dice_B = torch.tensor([row.dice.random() for row in rows], device=logits_BV.device)
    probs_BV, order_BV = torch.softmax(logits_BV / temperature_B[:, None], dim=-1).sort(dim=-1, descending=True)
    before_BV = probs_BV.cumsum(-1) - probs_BV
    kept_BV = torch.where(before_BV < top_p_B[:, None], probs_BV, 0.0)
    kept_BV[:, 0] = probs_BV[:, 0]  # top_p 0: the most probable one
    cdf_BV = kept_BV.cumsum(-1)
    # the last kept token takes what rounding leaves
    place_B = torch.searchsorted(cdf_BV, dice_B[:, None] * cdf_BV[:, -1:], right=True)[:, 0].clamp(max=probs_BV.shape[1] - 1)
    place_B = torch.minimum(place_B, (kept_BV > 0).sum(-1) - 1)
    drawn_B: Tensor = order_BV.gather(-1, place_B[:, None])[:, 0]
    return drawn_B


def describe(logits_NV: Tensor, tokens_N: Tensor, num_top: int) -> tuple[list[float], list[tuple[tuple[int, float], ...]]]:
    """log p of the given tokens, and the `num_top` most probable ones with theirs. One log-softmax: a token has one value in both."""
    logps_NV = torch.log_softmax(logits_NV.float(), dim=-1)
    logps: list[float] = logps_NV.gather(-1, tokens_N[:, None])[:, 0].tolist()
    if not num_top:
        return logps, [()] * len(logps)
    values, ids = logps_NV.topk(min(num_top, logps_NV.shape[-1]), dim=-1)
    return logps, [tuple(zip(row_ids, row_values, strict=True)) for row_ids, row_values in zip(ids.tolist(), values.tolist(), strict=True)]
