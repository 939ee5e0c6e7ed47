"""The data order: an epoch is one pass, partners are drawn without replacement, and nothing but (seed, epoch) decides."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from soul.data.pairing import PairedPlan
from soul.records import InputError

LEAD, PARTNER = 53, 91


def plan_of(*, lead: int = LEAD, partner: int = PARTNER, batch_size: int = 8, window: int = 8, seed: int = 0) -> PairedPlan:
    rng = np.random.default_rng(7)
    lengths = {"forget": rng.integers(5, 200, lead), "retain": rng.integers(5, 200, partner)}
    return PairedPlan(lengths, batch_size=batch_size, seed=seed, window=window)


def rows_of(plan: PairedPlan, split: str, steps: range) -> list[int]:
    return [int(index) for step in steps for index in plan.step(step)[split]]


def as_lists(plan: PairedPlan, step: int) -> dict[str, list[int]]:
    return {split: indices.tolist() for split, indices in plan.step(step).items()}


@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize(("lead", "batch_size"), [(53, 8), (53, 1), (53, 53), (53, 60), (1, 1), (16, 8), (17, 8)])
def test_an_epoch_is_one_pass_over_the_leading_split(lead: int, batch_size: int, window: int) -> None:
    plan = plan_of(lead=lead, batch_size=batch_size, window=window)
    per_epoch = plan.steps_per_epoch
    assert per_epoch == -(-lead // batch_size)
    for epoch in range(3):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        assert sorted(rows_of(plan, "forget", steps)) == list(range(lead))
        sizes = sorted(len(plan.step(step)["forget"]) for step in steps)
        assert sizes[1:] == [batch_size] * (per_epoch - 1)  # one step at most is short


@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize("partner", [8, 20, 53, 91, 300])
def test_partners_are_drawn_without_replacement_until_none_is_left(partner: int, window: int) -> None:
    plan = plan_of(partner=partner, window=window)
    drawn: Counter[int] = Counter()
    for epoch in range(4):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        drawn.update(rows_of(plan, "retain", steps))
        assert sum(drawn.values()) == (epoch + 1) * LEAD
        counts = [drawn[index] for index in range(partner)]
        assert max(counts) - min(counts) <= 1  # as even as the number of draws allows


def test_all_splits_of_a_step_have_as_many_rows() -> None:
    plan = plan_of(window=3)
    for step in range(2 * plan.steps_per_epoch):
        rows = plan.step(step)
        assert list(rows) == ["forget", "retain"]
        assert len(rows["forget"]) == len(rows["retain"])


def test_a_step_does_not_depend_on_which_were_asked_for_before() -> None:
    plan = plan_of()
    steps = list(range(6 * plan.steps_per_epoch))
    expected = {step: as_lists(plan, step) for step in steps}
    random.Random(1).shuffle(steps)
    shuffled = plan_of()
    assert {step: as_lists(shuffled, step) for step in steps} == {step: expected[step] for step in steps}
    assert all(as_lists(plan_of(), step) == expected[step] for step in (0, 5, 11, 33))


def test_old_orders_are_not_kept() -> None:
    plan = plan_of(partner=8)
    for step in range(30 * plan.steps_per_epoch):
        plan.step(step)
    assert len(plan._cache) <= 12  # of 30 passes over forget and 199 over retain, seven of them in one window


def test_another_process_draws_the_same_order() -> None:
    script = (
        "import json, numpy as np; from soul.data.pairing import PairedPlan; rng = np.random.default_rng(7);"
        f"lengths = {{'forget': rng.integers(5, 200, {LEAD}), 'retain': rng.integers(5, 200, {PARTNER})}};"
        "plan = PairedPlan(lengths, batch_size=8, seed=0, window=8);"
        "print(json.dumps([{k: v.tolist() for k, v in plan.step(s).items()} for s in range(20)]))"
    )
    expected = [as_lists(plan_of(), step) for step in range(20)]
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        root = Path(__file__).resolve().parents[2]
        output = subprocess.run([sys.executable, "-c", script], env=environment, cwd=root, capture_output=True, text=True, check=True)
        assert json.loads(output.stdout) == expected


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    first, second = plan_of(seed=0), plan_of(seed=1)
    epoch = range(first.steps_per_epoch)
    for split in ("forget", "retain"):
        assert rows_of(first, split, epoch) != rows_of(second, split, epoch)
        assert rows_of(first, split, epoch) != rows_of(first, split, range(first.steps_per_epoch, 2 * first.steps_per_epoch))
    same_size = plan_of(partner=LEAD, window=1)
    assert rows_of(same_size, "forget", epoch) != rows_of(same_size, "retain", epoch)  # splits are not shuffled alike


def test_the_window_changes_steps_but_not_what_partners_an_epoch_sees() -> None:
    narrow, wide = plan_of(window=1), plan_of(window=8)
    epoch = range(narrow.steps_per_epoch)
    for split in ("forget", "retain"):
        assert sorted(rows_of(narrow, split, epoch)) == sorted(rows_of(wide, split, epoch))
        assert rows_of(narrow, split, epoch) != rows_of(wide, split, epoch)


def padded_tokens(plan: PairedPlan) -> int:
    """Tokens of an epoch's joint batches: rows times the longest of them."""
    total = 0
    for step in range(plan.steps_per_epoch):
        lengths = np.concatenate([plan.lengths[split][indices] for split, indices in plan.step(step).items()])
        total += len(lengths) * int(lengths.max())
    return total


def test_bucketing_saves_padding_on_ragged_rows() -> None:
    assert padded_tokens(plan_of(window=8)) < 0.85 * padded_tokens(plan_of(window=1))


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 8, 100])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shares_make_up_the_step_in_equal_numbers_of_micro_batches(world: int, micro_batch_size: int) -> None:
    plan = plan_of(batch_size=7)
    for step in range(2 * plan.steps_per_epoch):
        shares = [plan.share(step, rank=rank, world=world, micro_batch_size=micro_batch_size) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1
        together = Counter(pair for share in shares for micro_batch in share for pair in micro_batch)
        assert together == Counter((split, int(index)) for split, indices in plan.step(step).items() for index in indices)
        for micro_batch in (micro_batch for share in shares for micro_batch in share):
            sizes = Counter(split for split, _ in micro_batch)
            assert sizes["forget"] == sizes["retain"] <= micro_batch_size


def test_a_rank_without_rows_gets_empty_micro_batches() -> None:
    plan = plan_of(lead=9, batch_size=8, window=1)
    shares = [plan.share(1, rank=rank, world=3, micro_batch_size=2) for rank in range(3)]
    assert [len(share) for share in shares] == [1, 1, 1]
    assert [len(share[0]) for share in shares] == [2, 0, 0]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"partner": 7}, "retain split has 7 rows, need >= 8"),
        ({"partner": 2, "lead": 3}, "retain split has 2 rows, need >= 3"),
        ({"partner": 0}, "retain split has no rows"),
        ({"lead": 0}, "forget split has no rows"),
    ],
)
def test_a_split_too_small_for_a_step_is_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_of(**sizes)


def test_a_leading_split_smaller_than_a_batch_is_one_step() -> None:
    plan = plan_of(lead=3, partner=3)
    assert plan.steps_per_epoch == 1
    assert sorted(plan.step(0)["retain"].tolist()) == [0, 1, 2]
