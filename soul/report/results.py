"""`results.json`, schema 1: what a run measured. A value that is missing is null and has a reason beside it, never a default."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from soul.records import InputError
from soul.report.words import ATTACKS, METRICS
from soul.rundir import write_atomically
from soul.statistics import LEVEL

ModelName = Literal["target", "unlearned", "retrained"]
MODELS: Final[tuple[ModelName, ...]] = ("target", "unlearned", "retrained")
ROUNDING: Final = 1e-6  # a mean of float32 probabilities may leave [0, 1] by this much


def _known_metric(name: str) -> str:
    if name not in METRICS:
        raise ValueError(f"unknown metric; known are {', '.join(METRICS)} (add a row to soul/report/words.py for a new one)")
    return name


def _known_attack(name: str) -> str:
    if name not in ATTACKS:
        raise ValueError(f"unknown attack; known are {', '.join(ATTACKS)} (add a row to soul/report/words.py for a new one)")
    return name


def _within_range(metrics: dict[str, float | None]) -> dict[str, float | None]:
    for name, value in metrics.items():
        if value is not None and METRICS[name].share and value > 1 + ROUNDING:
            raise ValueError(f"{name} is a share and must be in [0, 1]")
    return metrics


Share = Annotated[float, Field(ge=-ROUNDING, le=1 + ROUNDING, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=-ROUNDING, allow_inf_nan=False)]
Difference = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]
Reason = Annotated[str, StringConstraints(min_length=3, max_length=400, strip_whitespace=True)]
Metrics = Annotated[dict[Annotated[str, AfterValidator(_known_metric)], Amount | None], AfterValidator(_within_range)]
Attacks = dict[Annotated[str, AfterValidator(_known_attack)], Share | None]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, protected_namespaces=())


class RemovalTest(_Section):
    """What a removal test found and what it could have found; a `reason` and no numbers where it was not run.

    `value` is the KS distance or the attack's AUC, `low` to `high` its 95 % interval. An attack has a `reference` (the retrained model's
    AUC on the same rows, or 0.5) and the `difference` from it with its own interval, and its `p_value` is adjusted for all attacks.
    `num_authors`: of the forget rows, where rows about one author count once. `smallest_p` is the least that so many can give; `detectable`
    the smallest distance or difference found with 80 % power (null: none within reach).
    """

    num_rows: Annotated[int, Field(ge=1)] | None = None
    num_others: Annotated[int, Field(ge=1)] | None = None
    num_authors: Annotated[int, Field(ge=1)] | None = None
    value: Share | None = None
    low: Share | None = None
    high: Share | None = None
    reference: Share | None = None
    difference: Difference | None = None
    difference_low: Difference | None = None
    difference_high: Difference | None = None
    p_value: Share | None = None
    smallest_p: Share | None = None
    detectable: Share | None = None
    reason: Reason | None = None

    @model_validator(mode="after")
    def _numbers_or_reason(self) -> RemovalTest:
        needed = (self.num_rows, self.num_others, self.value, self.low, self.high, self.p_value, self.smallest_p)
        if (self.reason is None) == any(number is None for number in needed):
            raise ValueError("a removal test has either all of its numbers or a reason")
        return self

    @property
    def testable(self) -> bool:
        """Whether so many rows can give a p-value at the level at all, and do so in four of five runs for some effect."""
        return self.can_reject and self.detectable is not None

    @property
    def can_reject(self) -> bool:
        return self.smallest_p is not None and self.smallest_p <= LEVEL

    @property
    def rejected(self) -> bool:
        return self.can_reject and self.p_value is not None and self.p_value <= LEVEL


class ModelResults(_Section):
    """One model's metrics. A split that was not evaluated is null as a whole.

    The keys of `reasons` are paths inside this object, such as "forget.truth_ratio", "real_authors" or "mia_auc.zlib". `tests` has the keys
    "forget_quality" and "mia_auc.<attack>"; it is null for the retrained model, and in files that are older than it.
    """

    forget: Metrics | None
    retain: Metrics | None
    real_authors: Metrics | None
    world_facts: Metrics | None
    forget_quality: Share | None
    forget_quality_ks: Share | None
    model_utility: Share | None
    mia_auc: Attacks | None
    tests: dict[str, RemovalTest] | None = None
    reasons: dict[str, Reason] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _nulls_are_explained(self) -> ModelResults:
        _check_reasons(self.model_dump(exclude={"reasons", "tests"}), self.reasons)
        return self

    def value(self, path: str) -> float | None:
        """The number at "forget.probability" or "model_utility"; None where it is null or was never asked for."""
        section, _, metric = path.partition(".")
        found: Metrics | float | None = getattr(self, section)
        return found.get(metric) if isinstance(found, dict) else found

    def reason(self, path: str) -> str:
        """Why `value(path)` is None."""
        inside = (reason for key, reason in self.reasons.items() if key.startswith(f"{path}."))
        return self.reasons.get(path) or self.reasons.get(path.partition(".")[0]) or next(inside, "not part of this run's evaluation")


class EpochRow(_Section):
    """An evaluation during training; epoch 0 is the model before the first step."""

    epoch: Amount
    step: Annotated[int, Field(ge=0)]
    forget: Metrics
    retain: Metrics


class Cost(_Section):
    train_s: Amount | None
    eval_s: Amount | None
    tokens_per_s: Amount | None
    peak_memory_bytes: Annotated[int, Field(ge=0)] | None
    optimizer_state_bytes_per_rank: Annotated[int, Field(ge=0)] | None


class Results(_Section):
    """A finished run. `splits` counts rows; `settings` is what a reader needs to know, null where a setting is switched off.

    The keys of `reasons` are paths such as "models.retrained", "cost.peak_memory_bytes" or "epochs.forget.truth_ratio" (of every row).
    """

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    schema_version: Literal[1] = Field(default=1, alias="schema")
    benchmark: str
    method: str
    optimizer: str
    seed: int
    splits: dict[str, Annotated[int, Field(ge=0)]]
    models: dict[ModelName, ModelResults | None]
    epochs: list[EpochRow]
    cost: Cost
    settings: dict[str, bool | int | float | str | None]
    reasons: dict[str, Reason] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _complete(self) -> Results:
        missing = [name for name in MODELS if name not in self.models]
        if missing:
            raise ValueError(f"models needs the keys {', '.join(MODELS)} (null with a reason where absent); missing: {', '.join(missing)}")
        measured = {
            "models": {name: model and {} for name, model in self.models.items()},  # a model's own nulls are checked by the model
            "epochs": [row.model_dump() for row in self.epochs],
            "cost": self.cost.model_dump(),
        }
        _check_reasons(measured, self.reasons)
        return self


def _nulls(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if value is None:
        yield path
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _nulls(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _nulls(item, (*path, str(index)))


def _check_reasons(measured: Mapping[str, object], reasons: Mapping[str, str]) -> None:
    """Every null needs a reason under its path, or under its path without list positions; a reason without a null is a typing error."""
    used: set[str] = set()
    for path in _nulls(measured):
        names = {".".join(path), ".".join(part for part in path if not part.isdigit())}
        if not names & reasons.keys():
            raise ValueError(f"{'.'.join(path)} is null without a reason: add it to `reasons`")
        used |= names
    idle = sorted(set(reasons) - used)
    if idle:
        raise ValueError(f"`reasons` explains {', '.join(idle)}, which is not null")


def load_results(path: Path) -> Results:
    """Read a results.json, or the one in a run directory."""
    path = path / "results.json" if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(
            f"expected {path}, found no such file. Is it a run directory? A run writes it at its end: soul resume {path.parent}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {type(error).__name__}. Check that it is a text file you may read.") from None
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} is not JSON (line {error.lineno}, column {error.colno}). Run the evaluation again to rewrite it."
        ) from None
    version = document.get("schema") if isinstance(document, dict) else None
    if version != 1:
        raise InputError(f"{path} has results schema {version!r:.20}, expected 1. Read it with the soul version that wrote it.")
    try:
        return Results.model_validate(document)
    except ValidationError as error:
        raise InputError(
            f"{path} does not follow results schema 1: {_first_errors(error)}. Run the evaluation again to rewrite it."
        ) from None


def save_results(results: Results, path: Path) -> None:
    """A reader sees the old file or the new one, whole, whatever happens in between."""
    write_atomically(path, results.model_dump_json(indent=1, by_alias=True) + "\n")


def _first_errors(error: ValidationError, limit: int = 3) -> str:
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    told = [f"{'.'.join(str(part) for part in item['loc']) or 'the file'}: {item['msg']}" for item in errors[:limit]]
    rest = f" (and {len(errors) - limit} more)" if len(errors) > limit else ""
    return "; ".join(told) + rest
