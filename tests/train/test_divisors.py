"""Every row weighs the same in the objective, however rows are put into steps."""

from __future__ import annotations

import pytest
import torch

from soul.data.pairing import PairedPlan
from soul.data.store import TokenStore
from soul.objectives.methods import NPO, GradDiff, Method
from soul.records import InputError, TokenRow
from soul.train.divisors import Divisors
from soul.train.loop import _descend
from tests.train.loop_runs import ADAMW, TRAIN, feed_of, new_run

NUM_EPOCHS = 9  # of seven forget rows: as many rows as seven whole passes over nine retain rows


def summed_gradient(method: Method, window: int) -> list[torch.Tensor]:
    """Of all steps of these epochs, at the weights that training begins with."""
    run = new_run(ADAMW, dtype=torch.float64)
    feed = feed_of(method, TRAIN.model_copy(update={"bucket_window": window}))
    divisors = Divisors.of(feed.plan, feed.stores)
    for step in range(NUM_EPOCHS * feed.plan.steps_per_epoch):
        _descend(run.engine, feed.step(step), method, step, divisors, is_late=False)
    return [parameter.grad.clone() for parameter in run.engine.model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("method", [GradDiff(retain_weight=0.7), NPO(beta=0.3)])
def test_the_expected_gradient_is_the_same_for_every_window(method: Method) -> None:
    first, *others = (summed_gradient(method, window) for window in (1, 2, 8))
    assert all(float(gradient.abs().max()) > 0 for gradient in first)
    for other in others:
        for gradient, expected in zip(other, first, strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-13)


def test_a_full_step_of_rows_of_one_length_is_divided_by_what_it_has() -> None:
    stores = {split: TokenStore.of_rows([TokenRow(i, [3, 4, 5, 6], 1) for i in range(6)]) for split in ("forget", "retain")}
    plan = PairedPlan({split: store.lengths_R for split, store in stores.items()}, batch_size=4, seed=0)
    counts = Divisors.of(plan, stores).counts
    assert counts == {(split, unit): number for split in stores for unit, number in (("tokens", 12.0), ("sequences", 4.0))}


def test_a_split_without_an_answer_is_refused() -> None:
    stores = {"forget": TokenStore.of_rows([TokenRow(0, [3, 4], 2)])}
    plan = PairedPlan({"forget": stores["forget"].lengths_R}, batch_size=1, seed=0)
    with pytest.raises(InputError, match="no row of the forget split has an answer token"):
        Divisors.of(plan, stores)
