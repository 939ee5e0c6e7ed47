"""The order of rows: what two epochs have in common, how many rows a step repeats, what a row weighs, and what bucketing saves.

    python -m perf.row_order [--rounds 5] [--steps 20] [--data ../shared/data/tofu]

Lengths are uniform in 5 to 200 tokens where nothing else is said. "Chance" is what orders drawn by another generator give under the
same bucketing. The last lines time GradDiff steps of AdamW on one model and the same rows, the sides taking turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from perf._measure import Moment, interleaved
from perf._steps import WARM_UP, run_steps
from perf._workload import Workload, make_workload
from soul.data.feed import LocalFeed
from soul.data.pairing import PairedPlan
from soul.data.store import TokenStore
from soul.objectives.methods import GradDiff
from soul.optim.configs import AdamWConfig
from soul.records import TokenRow
from soul.train.divisors import Divisors

BATCH, EPOCHS = 8, 12
Indices = NDArray[np.int64]


def ragged(num_rows: int) -> Indices:
    return np.random.default_rng(num_rows).integers(5, 200, num_rows)


def epoch_steps(plan: PairedPlan, epoch: int, split: str = "forget") -> list[Indices]:
    return [plan.step(epoch * plan.steps_per_epoch + step)[split] for step in range(plan.steps_per_epoch)]


def order_facts(num_rows: int) -> tuple[float, float]:
    """Mean rank correlation of a row's places in one epoch and the next, and the share of pairs in a step that meet again."""
    plan = PairedPlan({"forget": ragged(num_rows)}, batch_size=BATCH, seed=0, window=8)
    epochs = [epoch_steps(plan, epoch) for epoch in range(EPOCHS)]
    places = [np.argsort(np.concatenate(steps)) for steps in epochs]
    correlation = float(np.mean([stats.spearmanr(one, other).statistic for one, other in pairwise(places)]))
    pairs = [{pair for rows in steps for pair in combinations(sorted(rows.tolist()), 2)} for steps in epochs]
    again = sum(len(one & other) for one, other in pairwise(pairs)) / sum(map(len, pairs[:-1]))
    return correlation, again


def by_chance(num_rows: int) -> tuple[float, float]:
    """The same of orders that numpy shuffles."""
    generator, kept = np.random.default_rng(1), dict[Any, Indices]()

    def shuffled(size: int, *name: Any) -> Indices:
        return kept.setdefault(name, generator.permutation(size))

    with mock.patch("soul.data.pairing.permutation", shuffled):
        return order_facts(num_rows)


def distinct_rows(num_forget: int, num_retain: int) -> float:
    """Distinct retain rows in a step, on average."""
    plan = PairedPlan({"forget": ragged(num_forget), "retain": ragged(num_retain)}, batch_size=BATCH, seed=0, window=8)
    return float(np.mean([len(set(rows.tolist())) for epoch in range(2) for rows in epoch_steps(plan, epoch, "retain")]))


def tenth_weights(window: int) -> tuple[float, float]:
    """What a token of the shortest and of the longest tenth of 400 rows weighs over the epochs, in units of the mean token's weight."""
    lengths = ragged(400)
    store = TokenStore.of_rows([TokenRow(i, [3] * n, 1) for i, n in enumerate(lengths)])
    plan = PairedPlan({"forget": lengths}, batch_size=BATCH, seed=0, window=window)
    divisor = Divisors.of(plan, {"forget": store}).counts["forget", "tokens"]
    weights_R = np.zeros(len(lengths))
    for epoch in range(EPOCHS):
        for rows in epoch_steps(plan, epoch):
            weights_R[rows] += 1 / divisor
    weights_R /= np.average(weights_R, weights=store.num_supervised_R)
    order = np.argsort(lengths)
    return float(weights_R[order[:40]].mean()), float(weights_R[order[-40:]].mean())


def step_seconds(options: argparse.Namespace) -> dict[str, float]:
    """Median seconds a step: a window of 8 steps against steps of rows as they come, and those in two micro-batches."""
    sides = {"window 8": (8, BATCH), "window 1": (1, BATCH), "window 1, two micro-batches": (1, BATCH // 2)}
    work: dict[str, Callable[[], Moment]] = {}
    for name, (window, micro) in sides.items():
        workload = make_workload(
            model="tiny", device="cpu", precision="fp32", rows=128, batch_size=BATCH, micro_batch_size=micro, data=options.data
        )
        feed = workload.feed(reference=False, window=window)

        def run(workload: Workload = workload, feed: LocalFeed = feed) -> Moment:
            return run_steps(workload, feed, GradDiff(), AdamWConfig(), steps=WARM_UP + options.steps).per_step(options.steps)

        work[name] = run
    found = interleaved(work, rounds=options.rounds)
    return {name: float(np.median([moment.wall for moment in moments])) for name, moments in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    for num_rows in (100, 400, 4000):
        (correlation, again), (_, chance) = order_facts(num_rows), by_chance(num_rows)
        print(
            f"{num_rows} rows: rank correlation of two epochs {correlation:+.3f}, pairs that meet again {again:.1%} (chance {chance:.1%})"
        )
    for num_retain in (8, 12, 16, 100):
        print(f"forget 400, retain {num_retain}: {distinct_rows(400, num_retain):.2f} distinct retain rows in a step of {BATCH}")
    for window in (1, 8):
        print("window {}: weight of a token in the shortest tenth {:.2f}, in the longest {:.2f}".format(window, *tenth_weights(window)))
    found = step_seconds(options)
    for name, seconds in found.items():
        print(f"{name}: {1000 * seconds:.1f} ms a step, {seconds / found['window 8']:.2f} of window 8")


if __name__ == "__main__":
    main()
