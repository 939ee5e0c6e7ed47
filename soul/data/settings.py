"""Where the rows of a run come from, as settings."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from soul.data.chat import ChatFormat
from soul.data.columns import ColumnMap, parse_columns

FICTITIOUS = "fictitious"
OWN_FILES = "files"
DEFAULT_FORGET = "forget05"


class DataConfig(BaseModel):
    """Where the rows of each split come from."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, validate_default=True)

    source: str = Field(
        FICTITIOUS,
        min_length=1,
        description="benchmark rows: fictitious (built in), a folder or s3:// prefix in TOFU's layout, or a hub id",
    )
    forget: str | None = Field(
        None, min_length=1, description=f"what to forget: a split's name, or a file of your own (null: {DEFAULT_FORGET} of a benchmark)"
    )
    retain: str | None = Field(
        None, min_length=1, description="what to keep: a split's name or a file (null: all that the forget split of a benchmark leaves)"
    )
    holdout: str | None = Field(None, min_length=1, description="rows the model never saw, for privacy attacks: a split's name or a file")
    columns: ColumnMap = Field(ColumnMap(), description="columns of own data, for example prompt=question,response=answer (null: by name)")
    limit_forget: int | None = Field(None, ge=1, description="use the first rows of the forget split only (null: all)")
    limit_retain: int | None = Field(None, ge=1, description="use the first rows of the retain split only (null: all)")
    num_authors: int = Field(200, ge=1, description="invented authors of the fictitious benchmark, 20 questions each")
    seed: int = Field(0, ge=0, description="which authors the fictitious benchmark invents")
    revision: str | None = Field(None, min_length=1, description="branch, tag or commit of a hub dataset (null: its main branch)")
    chat: str = Field(
        "auto",
        min_length=1,
        description="prompt format: auto (the tokenizer's chat template if it has one, else plain), chat, plain, or a text around {prompt}",
    )
    max_length: int | None = Field(
        None, ge=8, description="longest row in tokens; longer answers are cut (null: the model's limit, beyond which a row is an error)"
    )
    allow_overlap: bool = Field(False, description="accept rows that are in both the forget and the retain data")

    @field_validator("chat")
    @classmethod
    def _known_format(cls, chat: str) -> str:
        return ChatFormat(chat).choice

    @field_validator("columns", mode="before")
    @classmethod
    def _columns_as_text(cls, value: Any) -> Any:
        return parse_columns(value) if isinstance(value, str) else value

    def for_benchmark(self, benchmark: str) -> DataConfig:
        """These settings with the benchmark's defaults filled in.

        Raises:
            ValueError: a setting means nothing to the benchmark, or a file is missing.
        """
        if benchmark == "own":
            if self.source not in (FICTITIOUS, OWN_FILES):
                raise ValueError(
                    "source belongs to benchmarks; own data comes from its forget and retain files. Remove data.source (--data)."
                )
            for name in ("forget", "retain"):
                if getattr(self, name) is None:
                    raise ValueError(f"own data needs a {name} file, got none. Set data.{name} (--{name}): JSONL, JSON, CSV or Parquet.")
            return self.model_copy(update={"source": OWN_FILES})
        for name in ("columns", "holdout"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} belongs to own data (pipelines/unlearn.py); a benchmark names its own. Remove data.{name}.")
        for name in ("num_authors", "seed"):
            if self.source != FICTITIOUS and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} belongs to the fictitious benchmark, got source {self.source}. Remove data.{name}.")
        return self if self.forget is not None else self.model_copy(update={"forget": DEFAULT_FORGET})
