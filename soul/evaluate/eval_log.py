"""What an evaluation leaves behind: per-row values of every split, from which all metrics follow.

A live evaluation and a published log end up as the same `EvalLog`, so both are scored by the same code and either can be the gold
standard (`retrained`) of the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

from soul.evaluate.memorization import option_probability
from soul.evaluate.truth_ratio import truth_ratio

EVAL_SPLITS: Final = ("forget", "retain", "real_authors", "world_facts", "holdout")
ATTACKS: Final = ("loss", "zlib", "min_k", "min_k_plus_plus")

Column = tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class SplitLog:
    """Per-row values of one split; a column is None where nothing was measured, a value where the row has none.

    `right` is the answer that the wrong ones are compared with: the paraphrase on forget and retain rows, the answer itself elsewhere.
    All `nll`s are mean nats per answer token, the EOS included. The two `recorded` columns are values that a log gives without the
    losses behind them. `rows` is a short digest of all questions and answers. `attacks` maps an attack to its row scores (higher:
    less likely a member). `groups` says by numbers which rows are about one author (soul.data.groups).
    """

    keys: tuple[str, ...]
    answer_nll: Column | None = None
    right_nll: Column | None = None
    wrong_nlls: tuple[tuple[float, ...] | None, ...] | None = None
    answer_tokens: tuple[int, ...] | None = None
    right_tokens: tuple[int, ...] | None = None
    wrong_tokens: tuple[tuple[int, ...], ...] | None = None
    recorded_truth_ratio: Column | None = None
    recorded_option_probability: Column | None = None
    rouge1_recall: Column | None = None
    rougeL_recall: Column | None = None
    exact_memorization: Column | None = None
    extraction_strength: Column | None = None
    accuracy: Column | None = None
    rows: str | None = None
    attacks: Mapping[str, Column] = field(default_factory=dict)
    groups: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class EvalLog:
    """One model's evaluation. `source` names it in messages.

    `recorded_auc` holds attack AUCs that a log gives without row scores. `notes` says why a path such as "forget.truth_ratio" was not
    measured, where the writer knows better than "not recorded". `made_with` names what the numbers depend on beside rows and weights.
    """

    source: str
    splits: Mapping[str, SplitLog]
    recorded_auc: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    made_with: Mapping[str, str] = field(default_factory=dict)


def truth_ratios_of(log: SplitLog) -> Column | None:
    """Geometric truth ratios: as recorded, else from the losses."""
    if log.recorded_truth_ratio is not None or log.right_nll is None or log.wrong_nlls is None:
        return log.recorded_truth_ratio
    pairs = zip(log.right_nll, log.wrong_nlls, strict=True)
    return tuple(None if right is None or wrong is None else truth_ratio(right, wrong) for right, wrong in pairs)


def option_probabilities_of(log: SplitLog) -> Column | None:
    """The answer's share of all options: as recorded, else from the losses."""
    if log.recorded_option_probability is not None or log.answer_nll is None or log.wrong_nlls is None:
        return log.recorded_option_probability
    pairs = zip(log.answer_nll, log.wrong_nlls, strict=True)
    return tuple(None if answer is None or wrong is None else option_probability(answer, wrong) for answer, wrong in pairs)


def finite_columns(log: SplitLog) -> SplitLog:
    """Without the columns that hold an infinity or a NaN: JSON has no word for them, and no metric follows from them."""
    broken: dict[str, Any] = {f.name: None for f in fields(log) if not _is_finite(getattr(log, f.name))}
    return replace(log, **{**broken, "attacks": {name: rows for name, rows in log.attacks.items() if _is_finite(rows)}})


def _is_finite(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
