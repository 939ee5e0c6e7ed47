"""How long and in what pieces a run trains. SOUL's schedule is the default."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field


class TrainConfig(BaseModel):
    """Batch arithmetic, schedule and seed. One seed gives one result."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    epochs: int = Field(5, ge=1, description="passes over the forget set")
    max_steps: int | None = Field(None, ge=1, description="stop after this many optimizer steps, whatever the epochs (null: no limit)")
    batch_size: int = Field(8, ge=1, description="forget rows per optimizer step over all workers; as many retain rows join them")
    micro_batch_size: int = Field(8, ge=1, description="forget rows per forward on one worker; the rest is gradient accumulation")
    warmup_fraction: float = Field(0.1, ge=0, lt=1, description="share of the steps that warm the learning rate up")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="decay after the warm-up")
    seed: int = Field(0, ge=0, description="data order, sampled labels, initial weights")
    eval_every: int = Field(1, ge=0, description="epochs between cheap evaluations during training (0: none)")
    save_minutes: float | None = Field(
        15,
        ge=0,
        description="minutes of training between resumable checkpoints, the most that a run which is killed or interrupted repeats "
        "(null: no checkpoints by the clock)",
    )
    save_steps: int | None = Field(None, ge=1, description="steps between resumable checkpoints, beside those by the clock (null: none)")
    save_every: int = Field(0, ge=0, description="epochs between resumable checkpoints, beside those by the clock (0: none)")
    keep_checkpoints: int = Field(2, ge=1, description="resumable checkpoints kept until the run is done")
    telemetry_every: int = Field(5, ge=1, description="steps between measurements of unclipped fraction and update norm")
    lora_rank: int | None = Field(
        None, ge=1, description="train adapters of this rank on the blocks' linear layers, with peft, instead of all weights (null: all)"
    )
    bucket_window: int = Field(
        8,
        ge=1,
        description="steps whose rows are bucketed by length together, which saves padding (1: no bucketing). Before gradients are "
        "clipped, every row weighs the same whatever the window: sums are divided by what a step has on average",
    )

    def total_steps(self, steps_per_epoch: int) -> int:
        steps = self.epochs * steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    @property
    def saves(self) -> bool:
        """Whether there are resumable checkpoints at all. One is also left where a trained model cannot be exported."""
        return bool(self.save_minutes or self.save_steps or self.save_every)

    def save_due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether steps or epochs ask for a checkpoint behind this step."""
        by_steps = self.save_steps is not None and step % self.save_steps == 0
        return by_steps or (self.save_every > 0 and step % (self.save_every * steps_per_epoch) == 0)


# Raised when the same settings and rows make other weights than before (the order of rows, divisors, curvature, a tokenizer): what was
# made under another number is another model, and a run that began under one does not go on.
RECIPE: Final = 2

# When a run is saved and what is kept of it changes nothing in its result: each time it is resumed these may be others.
CADENCE = frozenset({"save_minutes", "save_steps", "save_every", "keep_checkpoints"})


class Clock:
    """Says on one rank whether `minutes` have gone since the last checkpoint. None or 0: never."""

    def __init__(self, minutes: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self._seconds = 60 * minutes if minutes else None
        self._now = now
        self.restart()

    def restart(self) -> None:
        self._since = self._now()

    def is_late(self) -> bool:
        return self._seconds is not None and self._now() - self._since >= self._seconds
