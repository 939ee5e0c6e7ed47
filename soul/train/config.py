"""How long and in what pieces a run trains. SOUL's schedule is the default."""

from __future__ import annotations

from typing import Literal

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
    save_every: int = Field(1, ge=0, description="epochs between resumable checkpoints (0: only the last step)")
    keep_checkpoints: int = Field(2, ge=1, description="resumable checkpoints kept")
    telemetry_every: int = Field(5, ge=1, description="steps between measurements of unclipped fraction and update norm")
    lora_rank: int | None = Field(
        None, ge=1, description="train adapters of this rank on the blocks' linear layers, with peft, instead of all weights (null: all)"
    )
    bucket_window: int = Field(8, ge=1, description="steps whose rows are bucketed by length together (1: no bucketing)")

    def total_steps(self, steps_per_epoch: int) -> int:
        steps = self.epochs * steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)
