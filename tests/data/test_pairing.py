"""The data order: an epoch is one pass, partners are drawn without replacement, and nothing but (seed, epoch) decides."""

from __future__ import annotations

import itertools
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
from scipy import stats

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
    assert len(plan._passes) <= 12  # of 30 passes over forget and 199 over retain, seven of them in one window


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


@pytest.mark.parametrize("window", [1, 2, 8])
@pytest.mark.parametrize("batch_size", [3, 8])
@pytest.mark.parametrize("partner", [8, 9, 11, 15, 16, 17, 91])
def test_no_step_holds_a_row_twice(partner: int, batch_size: int, window: int) -> None:
    """Neither where a pass over the partner ends inside a step nor where a window holds a row many times."""
    plan = plan_of(partner=partner, batch_size=batch_size, window=window)
    for step in range(6 * plan.steps_per_epoch):
        rows = plan.step(step)
        assert len(set(rows["retain"].tolist())) == len(rows["retain"]) == len(rows["forget"])


def orders_of(plan: PairedPlan, split: str, num_epochs: int) -> list[np.ndarray[Any, Any]]:
    """The place of every row in the steps of each epoch, one behind the other."""
    return [
        np.argsort(rows_of(plan, split, range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)))
        for epoch in range(num_epochs)
    ]


def num_pairs_met_again(plan: PairedPlan, num_epochs: int) -> tuple[int, int]:
    """Of the pairs of leading rows that share a step, how many share one in the next epoch too; and how many there are."""

    def pairs(epoch: int) -> set[tuple[int, int]]:
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        return {pair for step in steps for pair in itertools.combinations(sorted(plan.step(step)["forget"].tolist()), 2)}

    met = [pairs(epoch) for epoch in range(num_epochs)]
    return sum(len(one & other) for one, other in itertools.pairwise(met)), sum(map(len, met[:-1]))


@pytest.mark.parametrize(("num_rows", "batch_size", "num_epochs"), [(7, 1, 200), (100, 8, 40), (4000, 8, 4)])
def test_the_orders_of_two_epochs_have_nothing_to_do_with_each_other(num_rows: int, batch_size: int, num_epochs: int) -> None:
    """The mean rank correlation of n rows over k pairs of epochs has mean 0 and sd 1/sqrt(k (n - 1)) when they are independent."""
    plan = PairedPlan({"forget": np.full(num_rows, 9)}, batch_size=batch_size, seed=3, window=8)
    orders = orders_of(plan, "forget", num_epochs)
    for lag in (1, 2):
        found = [stats.spearmanr(one, other).statistic for one, other in zip(orders, orders[lag:], strict=False)]
        assert abs(np.mean(found)) < 4 / np.sqrt(len(found) * (num_rows - 1)), lag


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "window", "num_epochs"), [(7, 2, 8, 400), (100, 8, 1, 60), (100, 8, 8, 60), (4000, 8, 8, 6)]
)
def test_rows_that_shared_a_step_meet_again_as_often_as_chance_has_it(num_rows: int, batch_size: int, window: int, num_epochs: int) -> None:
    """Rows of one length: with bucketing by length those of like lengths would meet more often, in whatever order they are drawn."""
    plan = PairedPlan({"forget": np.full(num_rows, 9)}, batch_size=batch_size, seed=5, window=window)
    again, pairs = num_pairs_met_again(plan, num_epochs)
    sizes = [min(batch_size, num_rows - start) for start in range(0, num_rows, batch_size)]
    chance = sum(size * (size - 1) for size in sizes) / (num_rows * (num_rows - 1))
    assert pairs * chance - 4.5 * np.sqrt(pairs * chance) < again < pairs * chance + 4.5 * np.sqrt(pairs * chance)


def test_the_windows_of_two_epochs_have_orders_of_their_own() -> None:
    """Where in a window its shortest rows come, over many epochs: every place as often as chance has it."""
    plan = PairedPlan({"forget": np.arange(32)}, batch_size=4, seed=1, window=8)
    places = []
    for epoch in range(400):
        steps = [plan.step(epoch * 8 + within)["forget"] for within in range(8)]
        places.append(next(i for i, rows in enumerate(steps) if 0 in rows))
    assert stats.chisquare(np.bincount(places, minlength=8)).pvalue > 1e-3
    follows = np.histogram2d(places[:-1], places[1:], bins=8)[0]
    assert stats.chi2_contingency(follows).pvalue > 1e-3


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
