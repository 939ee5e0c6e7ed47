"""What influence unlearning has to know of its whole pass before the first step: by what its sums are divided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from soul.data.pairing import PairedPlan
from soul.data.store import TokenStore
from soul.optim.configs import HessianData


@dataclass(frozen=True, slots=True)
class WholePass:
    """`tokens`: supervised ones of each split in all steps of the run. `forget_share`: of all the data's, each row counted once."""

    tokens: Mapping[str, int]
    forget_share: float

    @classmethod
    def of(cls, plan: PairedPlan, stores: Mapping[str, TokenStore], num_steps: int) -> WholePass:
        tokens = dict.fromkeys(stores, 0)
        for step in range(num_steps):
            for split, rows in plan.step(step).items():
                tokens[split] += int(stores[split].num_supervised_R[rows].sum())
        everything = {split: int(np.sum(store.num_supervised_R)) for split, store in stores.items()}
        return cls(tokens, everything["forget"] / sum(everything.values()))

    def token_weights(self, data: HessianData) -> dict[str, float]:
        """The weight of each token in the mean loss whose curvature is wanted; over both splits each has its share of all the data."""
        shares = {"forget": self.forget_share, "retain": 1 - self.forget_share} if data == "both" else {data: 1.0}
        return {split: share / self.tokens[split] for split, share in shares.items()}
