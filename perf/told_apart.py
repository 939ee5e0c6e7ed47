"""How often two models that never saw the forget rows are told apart: the paired max-T test, and the worst of four attacks by a margin.

    python perf/told_apart.py --draws 1000

A row has a hardness that both models share, a model has noise of its own, and the four attacks of a model are noisy views of one loss.
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray

from soul.statistics.attacks import paired_p_values
from soul.statistics.auc import delong

MARGIN = 0.1  # the rule of a fixed margin on the worst attack
SIZES = ((20, 20), (40, 40), (200, 200), (20, 100), (100, 20))


def scores(hardness: NDArray[np.float64], noise: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Rows x 4 attacks of one model."""
    loss = hardness + noise * rng.standard_normal(len(hardness))
    return loss[:, None] + 0.3 * rng.standard_normal((len(hardness), 4))


def told_apart(num_members: int, num_others: int, noise: float, draws: int, seed: int = 0) -> tuple[float, float]:
    """Shares of draws in which the max-T test, and the margin on the worst attack, call the models different."""
    rng = np.random.default_rng(seed)
    tested = margin = 0
    for _ in range(draws):
        hardness = rng.standard_normal(num_members + num_others)
        one, two = scores(hardness, noise, rng), scores(hardness, noise, rng)
        halves = one[:num_members], one[num_members:], two[:num_members], two[num_members:]
        tested += min(paired_p_values(*halves)) <= 0.05
        areas = [[delong(pair[0][:, k], pair[1][:, k]).area for k in range(4)] for pair in (halves[:2], halves[2:])]
        gaps = [a - b for a, b in zip(*areas, strict=True)]
        margin += max(map(abs, gaps)) > MARGIN
    return tested / draws, margin / draws


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    draws = parser.parse_args().draws
    print("forget holdout noise  max-T  margin 0.1 on the worst attack")
    for noise in (0.5, 1.5):
        for members, others in SIZES:
            tested, margin = told_apart(members, others, noise, draws)
            print(f"{members:6} {others:7} {noise:5}  {tested:5.3f}  {margin:5.3f}", flush=True)


if __name__ == "__main__":
    main()
