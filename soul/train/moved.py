"""How many weights training has moved: in fp32, and in the bf16 that a model is often saved in, where small steps round to nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from soul.train.engine import Engine

SAMPLED = 2**20  # weights per rank that are compared, evenly spaced


class MovedWeights:
    """Remembers a sample of the trained weights as they are now; make it before a checkpoint is loaded."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        numel = sum(weights.numel() for weights in engine.local_weights())
        self.stride = max(1, -(-numel // SAMPLED))
        self.start = self._sample()

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Shares of the sample that differ from the start. Collective."""
        now = self._sample()
        counts = torch.tensor(
            [int((now != self.start).sum()), int((now.bfloat16() != self.start.bfloat16()).sum()), now.numel()], dtype=torch.float64
        )
        moved, moved_bf16, total = self.engine.all_reduce_sum(counts.to(self.engine.device)).tolist()
        return {"moved_fraction": moved / max(total, 1), "moved_fraction_bf16": moved_bf16 / max(total, 1)}

    def _sample(self) -> Tensor:
        """Every `stride`-th weight of each piece, on the CPU."""
        pieces = [weights.detach().reshape(-1)[:: self.stride].float().cpu() for weights in self.engine.local_weights()]
        return torch.cat(pieces) if pieces else torch.empty(0)
