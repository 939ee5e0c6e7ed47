"""A padded micro-batch against a loop over its rows: which positions are scored, with which labels, and what padding leaves alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from soul.batch import IGNORE_INDEX, SPLITS, TokenRow, collate

PAD, EOS = 0, 2


def ragged_rows(seed: int, num: int) -> list[tuple[str, TokenRow]]:
    """Rows of 2 to 19 tokens with prompts from one token to all but one, in mixed splits, some with a reference."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(num):
        length = int(rng.integers(2, 20))
        ids = [*rng.integers(3, 50, length - 1).tolist(), EOS]
        reference = float(rng.normal()) if rng.random() < 0.5 else None
        row = TokenRow(int(rng.integers(1000)), ids, int(rng.integers(1, length)), reference)
        rows.append((SPLITS[int(rng.integers(len(SPLITS)))], row))
    return rows


@pytest.mark.parametrize("pad_id", [PAD, EOS])
@pytest.mark.parametrize(("num", "multiple"), [(1, 1), (2, 8), (7, 8), (5, 3)])
def test_positions_and_targets_are_those_of_a_loop_over_the_rows(num: int, multiple: int, pad_id: int) -> None:
    rows = ragged_rows(num + multiple, num)
    batch = collate(rows, pad_id=pad_id, multiple=multiple)
    positions, targets, owners = [], [], []
    for b, (_, row) in enumerate(rows):
        for t in range(1, len(row.ids)):
            if t >= row.num_prompt:
                positions.append((b, t - 1))
                targets.append(row.ids[t])
                owners.append(b)
    assert [tuple(pair) for pair in batch.supervised_BT.nonzero().tolist()] == positions
    assert batch.targets_N.tolist() == targets
    assert batch.row_N.tolist() == owners
    assert len(targets) == sum(row.num_supervised for _, row in rows)


@pytest.mark.parametrize("pad_id", [PAD, EOS])
def test_rows_keep_their_tokens_attention_and_names(pad_id: int) -> None:
    rows = ragged_rows(3, 6)
    batch = collate(rows, pad_id=pad_id)
    longest = max(len(row.ids) for _, row in rows)
    assert batch.input_ids_BT.shape == (6, -(-longest // 8) * 8)
    assert [SPLITS[i] for i in batch.split_B.tolist()] == [split for split, _ in rows]
    assert batch.index_B.tolist() == [row.index for _, row in rows]
    for b, (_, row) in enumerate(rows):
        size = len(row.ids)
        assert batch.input_ids_BT[b].tolist() == [*row.ids, *[pad_id] * (batch.input_ids_BT.shape[1] - size)]
        assert batch.attention_mask_BT[b].tolist() == [1] * size + [0] * (batch.input_ids_BT.shape[1] - size)
        reference = batch.reference_logps_B[b]
        assert torch.isnan(reference) if row.reference_logp is None else reference == row.reference_logp


def test_eos_is_learnt_and_seen_where_it_is_also_the_padding() -> None:
    short, long = TokenRow(0, [5, 6, EOS], 1), TokenRow(1, [5, 6, 7, 8, 9, 10, 11, 12, EOS], 4)
    batch = collate([("forget", short), ("forget", long)], pad_id=EOS)
    for b, row in enumerate((short, long)):
        last = len(row.ids) - 1
        assert batch.labels_BT[b, last] == EOS and batch.attention_mask_BT[b, last] == 1 and batch.supervised_BT[b, last - 1]
        assert (batch.labels_BT[b, last + 1 :] == IGNORE_INDEX).all() and not batch.attention_mask_BT[b, last + 1 :].any()


def test_no_rows_make_one_filler_row_without_labels() -> None:
    batch = collate([], pad_id=PAD)
    assert batch.input_ids_BT.shape == (1, 8)
    assert not batch.supervised_BT.any() and batch.targets_N.numel() == 0 and batch.row_N.numel() == 0
    assert batch.attention_mask_BT.sum() == 1  # nothing to attend to would be a division by zero
    assert batch.index_B.tolist() == [-1]


def test_a_row_without_prompt_is_refused() -> None:
    with pytest.raises(AssertionError, match="prompt"):
        collate([("forget", TokenRow(0, [5, EOS], 0))], pad_id=PAD)


def test_moving_keeps_everything() -> None:
    batch = collate(ragged_rows(1, 3), pad_id=PAD)
    moved = batch.to(torch.device("cpu"))
    for name in batch.__slots__:
        torch.testing.assert_close(getattr(moved, name), getattr(batch, name), equal_nan=True, rtol=0, atol=0)
