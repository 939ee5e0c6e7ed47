"""What an evaluation measures and how much it does at a time."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from soul.evaluate.truth_ratio import TruthRatioMean


class EvalSettings(BaseModel):
    """The evaluation section of a run's config."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    truth_ratio: TruthRatioMean = Field(
        "geometric", description="mean over the wrong answers: TOFU's leaderboard's, or arithmetic as in its paper"
    )
    generate: bool = Field(True, description="generate answers; without them ROUGE-L, accuracy and model utility are null")
    max_new_tokens: int = Field(200, ge=1, description="cap of a generated answer, tokens; a model that never stops costs all of them")
    batch_tokens: int = Field(2048, ge=1, description="tokens of a likelihood batch, padding included")
    generation_batch_tokens: int = Field(16384, ge=1, description="tokens in the KV cache of a generation batch, prompts and answers")
    min_k: float = Field(0.4, gt=0, le=1, description="share of least likely tokens that the Min-K attacks look at")
    sentence_model: str | None = Field(None, description="folder or hub id of a sentence-embedding model for `accuracy`; null without")
    limit: int | None = Field(None, ge=1, description="evaluate the first rows of every split only; all of them by default")
