"""One pass over (prompt, answer) rows, from which every likelihood metric follows.

Shape letters: B rows, T positions, N answer tokens of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from soul.batch import TokenRow, collate
from soul.models.scoring import answer_logits, chunks

_PAD_TO: Final = 8  # collate rounds a batch's length up to this
_MIN_STD: Final = 1e-6  # nats; a distribution on one token has no spread to standardise by


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """What the model thinks of one answer, token by token, the EOS included where the row has one.

    `logps` are nats, `correct` says where the token is the model's first choice, `standardised` is (log p - mean) / std with mean and
    standard deviation of log p over the model's own next-token distribution (Min-K++).
    """

    logps: tuple[float, ...]
    correct: tuple[bool, ...]
    standardised: tuple[float, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.logps)

    @property
    def mean_nll(self) -> float:
        """Nats per token."""
        return -sum(self.logps) / len(self.logps)


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Positions of rows that share a batch, longest first: memory runs out at once or never.

    A batch holds at most `batch_tokens` tokens, padding included, and one row at least. A pure function of its arguments: workers that
    take `batches[rank::world]` compute exactly what one worker would.
    """
    batches: list[list[int]] = []
    width = 0
    for position in sorted(range(len(lengths)), key=lambda position: -lengths[position]):
        if not batches or (len(batches[-1]) + 1) * width > batch_tokens:
            width = -(-lengths[position] // _PAD_TO) * _PAD_TO
            batches.append([])
        batches[-1].append(position)
    return batches


def score_batch(model: nn.Module, rows: Sequence[TokenRow], *, pad_id: int, device: torch.device) -> list[AnswerScore]:
    """One forward. No rows is a forward over filler, which keeps a sharded model's ranks in step."""
    batch = collate([("forget", row) for row in rows], pad_id=pad_id, multiple=_PAD_TO).to(device)  # the split plays no part here
    with torch.no_grad():  # inference mode would leave FSDP with parameters that cannot be trained on
        logits_NV = answer_logits(model, batch)
        targets_N = batch.targets_N
        statistics = [_token_statistics(*chunk) for chunk in chunks(logits_NV, targets_N)]
    counts = [row.num_supervised for row in rows]
    if not sum(counts):
        return [AnswerScore((), (), ()) for _ in rows]
    columns_RN = torch.cat(statistics, dim=1).double().cpu()
    return [
        AnswerScore(tuple(logps.tolist()), tuple(bool(flag) for flag in correct.tolist()), tuple(standardised.tolist()))
        for logps, correct, standardised in (part_RN.unbind() for part_RN in columns_RN.split(counts, dim=1))
    ]


def _token_statistics(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """log p of the target, whether it is the arg-max, and its standardised log p, stacked to (3, N), in fp32 or better."""
    correct_N = logits_NV.argmax(-1) == targets_N
    logits_NV = logits_NV.float() if logits_NV.dtype in (torch.bfloat16, torch.float16) else logits_NV
    logps_NV = logits_NV.log_softmax(-1)
    picked_N = logps_NV.gather(-1, targets_N[:, None])[:, 0]
    probs_NV = logps_NV.exp()
    bounded_NV = logps_NV.clamp_min_(-1e15)  # a masked token has p = 0 and log p = -inf, whose product would be NaN
    mean_N = (probs_NV * bounded_NV).sum(-1)
    variance_N = bounded_NV.sub_(mean_N[:, None]).square_().mul_(probs_NV).sum(-1)
    standardised_N = (picked_N - mean_N) / variance_N.sqrt().clamp_min(_MIN_STD)
    return torch.stack([picked_N, correct_N.to(picked_N.dtype), standardised_N])


def score_share(
    model: nn.Module,
    rows: Sequence[TokenRow],
    *,
    pad_id: int,
    device: torch.device,
    batch_tokens: int = 2048,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int], None] | None = None,
) -> dict[int, AnswerScore]:
    """The scores of every `world`-th batch, by position in `rows`; all ranks together hold them all.

    Every rank runs the model equally often, on filler where it has no batch left, so that a sharded model never waits for one.
    `progress` hears this rank's number of rows after every batch; the model's mode is kept.
    """
    batches = plan_batches([len(row.ids) for row in rows], batch_tokens)
    own = batches[rank::world]
    own += [[]] * (-(-len(batches) // world) - len(own))
    scores: dict[int, AnswerScore] = {}
    with evaluation_mode(model):
        for batch in own:
            scored = score_batch(model, [rows[position] for position in batch], pad_id=pad_id, device=device)
            scores.update(zip(batch, scored, strict=True))
            if progress is not None:
                progress(len(scores))
    return scores


def score_answers(
    model: nn.Module,
    rows: Sequence[TokenRow],
    *,
    pad_id: int,
    device: torch.device,
    batch_tokens: int = 2048,
    progress: Callable[[int], None] | None = None,
) -> list[AnswerScore]:
    """The scores of all rows, in their order."""
    scores = score_share(model, rows, pad_id=pad_id, device=device, batch_tokens=batch_tokens, progress=progress)
    return [scores[position] for position in range(len(rows))]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off while open; afterwards the model trains again if it did before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
