"""Logits and log-probabilities at supervised positions only: the LM head never sees a prompt or a padding token.

A pre-hook on the head keeps just the hidden states a loss needs, so that a model's own extras around the head (logit scaling,
soft-capping, tied weights) stay in force and every engine's wrapper (DDP, FSDP2, ZeRO) still sees one plain forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from soul.batch import Batch
from soul.records import InputError


@contextmanager
def _head_at(model: nn.Module, positions_BT: Tensor) -> Iterator[None]:
    """While open, the LM head of `model` maps (B, T, D) hidden states to (1, N, V) logits."""

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][positions_BT].unsqueeze(0), *args[1:])

    handle = output_head(model).register_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def output_head(model: nn.Module) -> nn.Module:
    """The module that maps hidden states to logits.

    Raises:
        InputError: the model has none (not a causal language model).
    """
    inner = getattr(model, "module", model)  # DDP and DeepSpeed wrap the model
    get_head = getattr(inner, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    if not isinstance(head, nn.Module):
        raise InputError(f"expected a causal language model with an LM head, got {type(inner).__name__}. Pass a *ForCausalLM model.")
    return head


def answer_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits that predict each supervised token, shape (N, V), rows in batch order. One forward over all rows."""
    with _head_at(model, batch.supervised_BT):
        output = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False)
    logits_NV: Tensor = output.logits[0]
    return logits_NV


@dataclass(frozen=True, slots=True)
class AnswerLogps:
    """Log-probabilities of the true answer tokens (nats, fp32). `row_N` says which of the `num_rows` rows a token belongs to."""

    logps_N: Tensor
    row_N: Tensor
    num_rows: int

    def sum_B(self) -> Tensor:
        """Per-row sum over the answer's tokens."""
        zeros_B = self.logps_N.new_zeros(self.num_rows)
        return zeros_B.index_add(0, self.row_N, self.logps_N)

    def count_B(self) -> Tensor:
        """Per-row number of answer tokens."""
        return torch.bincount(self.row_N, minlength=self.num_rows)


def token_logps(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """log p(target) per position, in fp32 or better whatever the model computes in."""
    logps_N: Tensor = _TokenLogps.apply(logits_NV, targets_N)  # type: ignore[no-untyped-call]
    return logps_N


class _TokenLogps(torch.autograd.Function):
    """logit of the target - logsumexp, a chunk at a time: what is as large as the logits is their gradient alone.

    Autograd's own backward of the two terms makes four such tensors and walks over each of them. The numbers are the same.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        normalisers_N = torch.cat([_wide(logits_CV).logsumexp(-1) for logits_CV, _ in chunks(logits_NV, targets_N)])
        ctx.save_for_backward(logits_NV, targets_N, normalisers_N)
        picked_N = _wide(logits_NV.gather(-1, targets_N[:, None])[:, 0])
        return picked_N - normalisers_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None]:
        logits_NV, targets_N, normalisers_N = ctx.saved_tensors
        gradient_NV = torch.empty_like(logits_NV)
        for logits_CV, targets_C, normalisers_C, grad_C, gradient_CV in chunks(logits_NV, targets_N, normalisers_N, grad_N, gradient_NV):
            probs_CV = (_wide(logits_CV) - normalisers_C[:, None]).exp_().mul_(-grad_C[:, None])
            gradient_CV.copy_(probs_CV.scatter_add_(-1, targets_C[:, None], grad_C[:, None]))
        return gradient_NV, None


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def chunks(logits_NV: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Pieces of equally long tensors whose logits fit a CPU's cache, or are worth a kernel of a GPU."""
    numel = 2**26 if logits_NV.is_cuda else 2**17
    length = max(1, numel // logits_NV.shape[1])
    return zip(logits_NV.split(length), *(other.split(length) for other in others), strict=True)


def answer_logps(model: nn.Module, batch: Batch) -> AnswerLogps:
    """Score every row's answer in one forward."""
    logits_NV = answer_logits(model, batch)
    return AnswerLogps(token_logps(logits_NV, batch.targets_N), batch.row_N, batch.labels_BT.shape[0])
