"""By what the sums of a step are divided: constants of the run, so that every row weighs the same in whatever step it comes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from soul.data.pairing import PairedPlan
from soul.data.store import TokenStore
from soul.objectives.terms import Term, Unit
from soul.optim.configs import HessianData
from soul.records import InputError


@dataclass(frozen=True, slots=True)
class Divisors:
    """What a full step has of each split on average: supervised tokens, and rows that have any.

    A step's own counts would make a mean over rows of one over tokens: where steps are bucketed by length, a token of a step of short
    rows would weigh several times one of a step of long rows. With constants the gradients of an epoch's steps add up to that of the
    mean over all its tokens, however rows are put into steps, times the number of full steps that an epoch's rows make.
    """

    counts: Mapping[tuple[str, Unit], float]

    @classmethod
    def of(cls, plan: PairedPlan, stores: Mapping[str, TokenStore]) -> Divisors:
        """Raises:
        InputError: a split has no token to learn from.
        """
        supervised = {split: store.num_supervised_R for split, store in stores.items()}
        for split, num_R in supervised.items():
            if not num_R.any():
                raise InputError(f"no row of the {split} split has an answer token, expected at least one.")
        tokens: dict[tuple[str, Unit], float] = {(split, "tokens"): float(np.mean(num_R)) for split, num_R in supervised.items()}
        rows: dict[tuple[str, Unit], float] = {(split, "sequences"): float(np.mean(num_R > 0)) for split, num_R in supervised.items()}
        return cls({key: mean * plan.rows_per_step for key, mean in (tokens | rows).items()})

    def of_term(self, term: Term) -> float:
        return self.counts[term.split, term.unit]


@dataclass(frozen=True, slots=True)
class WholePass(Divisors):
    """What the one pass of influence unlearning has in all its steps together. `forget_share`: of the tokens of all the data, each row
    counted once.
    """

    forget_share: float

    @classmethod
    def of_run(cls, plan: PairedPlan, stores: Mapping[str, TokenStore], num_steps: int) -> WholePass:
        counts: dict[tuple[str, Unit], float] = {(split, "tokens"): 0.0 for split in stores}
        for step in range(num_steps):
            for split, rows in plan.step(step).items():
                counts[split, "tokens"] += float(stores[split].num_supervised_R[rows].sum())
        everything = {split: int(np.sum(store.num_supervised_R)) for split, store in stores.items()}
        return cls(counts, everything["forget"] / sum(everything.values()))

    def token_weights(self, data: HessianData) -> dict[str, float]:
        """The weight of each token in the mean loss whose curvature is wanted; over both splits each has its share of all the data."""
        shares = {"forget": self.forget_share, "retain": 1 - self.forget_share} if data == "both" else {data: 1.0}
        return {split: share / self.counts[split, "tokens"] for split, share in shares.items()}
