"""Labelled token ids, and the padded micro-batch that holds the rows of every split of a step at once.

Shape letters: B rows, T positions, N supervised positions of all rows in row order, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from soul.records import TokenRow as TokenRow  # part of this module's interface; torch-free where it lives

IGNORE_INDEX = -100
SPLITS = ("forget", "retain", "refusal", "holdout")


@dataclass(frozen=True, slots=True)
class Batch:
    """A right-padded micro-batch. `labels_BT` is aligned with `input_ids_BT` (unshifted, as in Hugging Face models).

    `split_B` indexes SPLITS. A filler row (no labels) keeps ranks in step when a rank has no rows; it adds zero to every sum.
    """

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    labels_BT: Tensor
    split_B: Tensor
    index_B: Tensor
    reference_logps_B: Tensor

    def to(self, device: torch.device) -> Batch:
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in self.__slots__})

    @property
    def supervised_BT(self) -> Tensor:
        """True where the *next* token is a label: the positions whose logits the losses need. Shape (B, T)."""
        mask_BT = torch.zeros_like(self.labels_BT, dtype=torch.bool)
        mask_BT[:, :-1] = self.labels_BT[:, 1:] != IGNORE_INDEX
        return mask_BT

    @property
    def targets_N(self) -> Tensor:
        """The labels in the order of `supervised_BT`'s true positions."""
        shifted_BT = self.labels_BT[:, 1:]
        return shifted_BT[shifted_BT != IGNORE_INDEX]

    @property
    def row_N(self) -> Tensor:
        """Which row each supervised position belongs to."""
        return self.supervised_BT.nonzero()[:, 0]


def collate(rows: Sequence[tuple[str, TokenRow]], *, pad_id: int, multiple: int = 8) -> Batch:
    """Pad (split, row) pairs on the right to the longest of them, rounded up to `multiple`. No rows gives one filler row."""
    length = max((len(row.ids) for _, row in rows), default=1)
    length = -(-length // multiple) * multiple
    size = max(len(rows), 1)
    input_ids_BT = torch.full((size, length), pad_id, dtype=torch.long)
    mask_BT = torch.zeros((size, length), dtype=torch.long)
    labels_BT = torch.full((size, length), IGNORE_INDEX, dtype=torch.long)
    mask_BT[:, 0] = 1  # a fully masked row would make attention divide by zero
    reference_B = torch.full((size,), float("nan"), dtype=torch.float64)
    for b, (_, row) in enumerate(rows):
        assert row.num_prompt >= 1, "a row needs a prompt token: no position predicts the first token of a sequence"
        ids = torch.as_tensor(row.ids, dtype=torch.long)
        input_ids_BT[b, : len(ids)] = ids
        mask_BT[b, : len(ids)] = 1
        labels_BT[b, row.num_prompt : len(ids)] = ids[row.num_prompt :]
        if row.reference_logp is not None:
            reference_B[b] = row.reference_logp
    return Batch(
        input_ids_BT=input_ids_BT,
        attention_mask_BT=mask_BT,
        labels_BT=labels_BT,
        split_B=torch.tensor([SPLITS.index(split) for split, _ in rows] or [0], dtype=torch.long),
        index_B=torch.tensor([row.index for _, row in rows] or [-1], dtype=torch.long),
        reference_logps_B=reference_B,
    )
