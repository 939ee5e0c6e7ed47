"""The cheap evaluations during training, against a loop over rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from soul.batch import TokenRow, collate
from soul.data.store import finish_store, write_part
from soul.train.probe import METRICS, ROWS_PER_BATCH, probe_splits, row_metrics
from tests.train.loop_runs import ADAMW, ROWS, new_run, ragged


def naive_metrics(logits_TV: torch.Tensor, row: TokenRow) -> list[float]:
    """Probability, exact memorisation, extraction strength and NLL of one answer whose logits are given."""
    labels = list(row.ids[row.num_prompt :])
    logps = [float(logits_TV[t].double().log_softmax(-1)[label]) for t, label in enumerate(labels)]
    hits = [int(logits_TV[t].argmax()) == label for t, label in enumerate(labels)][:-1]  # EOS left out
    first = next(k for k in range(len(hits) + 1) if all(hits[k:]))
    mean = sum(logps) / len(logps)
    size = max(len(hits), 1)
    strength = 1 - first / size if hits else 0.0
    return [float(torch.tensor(mean, dtype=torch.float64).exp()), sum(hits) / size, strength, -mean]


def taught(rows: list[TokenRow]) -> torch.nn.Module:
    """A model that answers some tokens right: a few steps of descent on the rows."""
    model = new_run(ADAMW).engine.model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(6):
        batch = collate([("forget", row) for row in rows], pad_id=0)
        loss = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, labels=batch.labels_BT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def test_metrics_equal_a_loop_over_rows() -> None:
    run, rows = new_run(ADAMW), [*ROWS["forget"], TokenRow(7, [3, 4, 5], 2)]  # the last one is a lone EOS
    with torch.enable_grad():
        run.engine.model = taught(rows)
    naive = []
    for row in rows:
        logits_TV = run.engine.model(input_ids=torch.tensor([list(row.ids)])).logits[0, row.num_prompt - 1 : -1]
        naive.append(naive_metrics(logits_TV, row))
    expected = torch.tensor(naive, dtype=torch.float64).sum(0)
    found = row_metrics(run.engine, collate([("forget", row) for row in rows], pad_id=0))
    torch.testing.assert_close(found[:4], expected, rtol=1e-5, atol=1e-5)
    assert found[4] == len(rows)
    assert 0 < expected[2] < expected[1] < len(rows)  # neither all right nor all wrong, or the test shows little


def test_a_filler_row_adds_nothing() -> None:
    assert row_metrics(new_run(ADAMW).engine, collate([], pad_id=0)).tolist() == [0.0] * 5


@pytest.mark.parametrize("limit", [5, 40])
def test_means_are_over_the_first_rows(limit: int, tmp_path: Path) -> None:
    run, rows = new_run(ADAMW), ragged(5, 2 * ROWS_PER_BATCH + 3)
    write_part(tmp_path / "part-00000.arrow", ((row.ids, row.num_prompt) for row in rows))
    finish_store(tmp_path)
    run.engine.model.train()
    with torch.no_grad():
        whole = row_metrics(run.engine, collate([("retain", row) for row in rows[:limit]], pad_id=0))
    found = probe_splits(run.engine, {"retain": str(tmp_path)}, limit=limit, pad_id=0)
    expected = {metric: float(whole[i] / whole[4]) for i, metric in enumerate(METRICS)}
    assert found["retain"] == pytest.approx(expected, rel=1e-5)
    assert run.engine.model.training
