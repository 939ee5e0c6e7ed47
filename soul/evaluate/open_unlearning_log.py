"""OpenUnlearning's `TOFU_EVAL.json`: metric name -> {"agg_value": ..., "value_by_index": {row: {...}}}.

Written files hold what that project reads from a retained model's log: `forget_truth_ratio` row by row, and the attack AUCs under
`mia_*`. Names are read in any capitalisation, because `Truth_Ratio` is spelt both ways in the wild.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from soul.evaluate.eval_log import ATTACKS, Column, EvalLog, SplitLog, finite_columns, option_probabilities_of, truth_ratios_of
from soul.evaluate.log_json import Json, by_index, check_rows, loss, losses, number, share, write_json
from soul.evaluate.memorization import probability
from soul.evaluate.privacy import auc
from soul.evaluate.truth_ratio import indistinguishability, preference
from soul.records import InputError

FILE: Final = "TOFU_EVAL.json"
PREFIXES: Final = {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"}
_FORGET_ONLY: Final = ("exact_memorization", "extraction_strength")
_Metrics = Mapping[str, Mapping[str, Any]]
_Parse = Callable[..., Any]


def is_open_unlearning(document: Mapping[str, Any]) -> bool:
    return any(isinstance(value, dict) and "agg_value" in value for value in document.values())


def parse_open_unlearning(document: Json, path: Path) -> EvalLog:
    """Whatever of the known metrics the log holds.

    Raises:
        InputError: none of them, or one of an unexpected form.
    """
    metrics = {name.lower(): value for name, value in document.items() if isinstance(value, dict)}
    splits = {split: log for split, prefix in PREFIXES.items() if (log := _parse_split(metrics, path, split, prefix)) is not None}
    recorded = {
        attack: share(metrics[f"mia_{attack}"].get("agg_value"), path=path, key=f"mia_{attack} > agg_value")
        for attack in ATTACKS
        if f"mia_{attack}" in metrics
    }
    if not splits and not recorded:
        raise InputError(f"{path} holds none of the metrics of OpenUnlearning's TOFU evaluation. Expected forget_truth_ratio and others.")
    return EvalLog(str(path), splits, recorded)


def _parse_split(metrics: _Metrics, path: Path, split: str, prefix: str) -> SplitLog | None:
    """None when the log says nothing about the split."""
    right_name = f"{prefix}_Q_A_PARA_Prob" if split in ("forget", "retain") else f"{prefix}_Q_A_Prob"
    wanted: dict[str, tuple[str, str, _Parse]] = {
        "answer_nll": (f"{prefix}_Q_A_Prob", "avg_loss", loss),
        "right_nll": (right_name, "avg_loss", loss),
        "wrong_nlls": (f"{prefix}_Q_A_PERT_Prob", "avg_loss", losses),
        "recorded_truth_ratio": (f"{prefix}_Truth_Ratio", "score", number),
        "recorded_option_probability": (f"{prefix}_Q_A_Prob_normalised", "prob", share),
        "rouge1_recall": (f"{prefix}_Q_A_ROUGE", "rouge1_recall", share),
        "rougeL_recall": (f"{prefix}_Q_A_ROUGE", "rougeL_recall", share),
    }
    if split == "forget":
        wanted |= {name: (name, "score", share) for name in _FORGET_ONLY}
    columns: dict[str, dict[str, Any]] = {}
    for column, (metric, field, parse) in wanted.items():
        rows = metrics.get(metric.lower(), {}).get("value_by_index")
        if rows is not None:
            columns[column] = _parse_rows(rows, path, metric, field, parse)
    if not columns:
        return None
    keys = check_rows({wanted[column][0]: rows for column, rows in columns.items()}, path=path)
    values: dict[str, Any] = {column: tuple(rows.values()) for column, rows in columns.items()}
    return SplitLog(keys, **values)


def _parse_rows(rows: object, path: Path, metric: str, field: str, parse: _Parse) -> dict[str, Any]:
    where = f"{metric} > value_by_index"
    parsed: dict[str, Any] = {}
    for index, row in by_index(rows, path=path, key=where).items():
        if not isinstance(row, dict) or field not in row:
            raise InputError(f"{path}, key {where} > {index} > {field}: missing. Is it an OpenUnlearning evaluation log?")
        parsed[index] = None if row[field] is None else parse(row[field], path=path, key=f"{where} > {index} > {field}")
    return parsed


def write_open_unlearning_log(log: EvalLog, path: Path) -> None:
    """What OpenUnlearning accepts as `retain_logs_path`, with its names; .gz compresses."""
    document: Json = {}
    finite = {split: finite_columns(split_log) for split, split_log in log.splits.items()}
    for split, prefix in PREFIXES.items():
        if split in finite:
            document |= _split_json(finite[split], split, prefix)
    members, others = finite.get("forget"), finite.get("holdout")
    for attack in ATTACKS:
        if members is not None and others is not None and attack in members.attacks and attack in others.attacks:
            document[f"mia_{attack}"] = _attack_json(members, others, attack)
        elif attack in log.recorded_auc:
            document[f"mia_{attack}"] = {"agg_value": log.recorded_auc[attack], "auc": log.recorded_auc[attack]}
    write_json(path, document)


def _split_json(log: SplitLog, split: str, prefix: str) -> Json:
    document: Json = {}
    paraphrased = split in ("forget", "retain")
    if log.answer_nll is not None:
        document[f"{prefix}_Q_A_Prob"] = _probabilities(log.keys, log.answer_nll)
    if log.right_nll is not None and paraphrased:
        document[f"{prefix}_Q_A_PARA_Prob"] = _probabilities(log.keys, log.right_nll)
    if log.wrong_nlls is not None:
        document[f"{prefix}_Q_A_PERT_Prob"] = _wrong_probabilities(log.keys, log.wrong_nlls)
    ratios = truth_ratios_of(log)
    if ratios is not None:
        name = "forget_truth_ratio" if split == "forget" else f"{prefix}_Truth_Ratio"
        document[name] = _metric(log.keys, "score", ratios, indistinguishability if split == "forget" else preference)
    shares = option_probabilities_of(log)
    if shares is not None and not paraphrased:
        document[f"{prefix}_Q_A_Prob_normalised"] = _metric(log.keys, "prob", shares, _mean)
    if log.rougeL_recall is not None:
        entry = _metric(log.keys, "rougeL_recall", log.rougeL_recall, _mean)
        for key, value in zip(log.keys, log.rouge1_recall or (), strict=False):
            entry["value_by_index"][key]["rouge1_recall"] = value
        document[f"{prefix}_Q_A_ROUGE"] = entry
    for name in _FORGET_ONLY:
        column: Column | None = getattr(log, name)
        if column is not None and split == "forget":
            document[name] = _metric(log.keys, "score", column, _mean)
    return document


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _metric(keys: Sequence[str], field: str, column: Column, aggregate: Callable[[Sequence[float]], float]) -> Json:
    present = [value for value in column if value is not None]
    rows = {key: {field: value} for key, value in zip(keys, column, strict=True)}
    return {"agg_value": aggregate(present) if present else None, "value_by_index": rows}


def _probabilities(keys: Sequence[str], column: Column) -> Json:
    shares = tuple(None if value is None else probability(value) for value in column)
    entry = _metric(keys, "prob", shares, _mean)
    for key, value in zip(keys, column, strict=True):
        entry["value_by_index"][key]["avg_loss"] = value
    return entry


def _wrong_probabilities(keys: Sequence[str], column: Sequence[tuple[float, ...] | None]) -> Json:
    rows = {
        key: {"prob": None if row is None else [probability(value) for value in row], "avg_loss": None if row is None else list(row)}
        for key, row in zip(keys, column, strict=True)
    }
    means = [_mean(row["prob"]) for row in rows.values() if row["prob"] is not None]
    return {"agg_value": _mean(means) if means else None, "value_by_index": rows}


def _attack_json(members: SplitLog, others: SplitLog, attack: str) -> Json:
    first, second = members.attacks[attack], others.attacks[attack]
    area = auc([score for score in first if score is not None], [score for score in second if score is not None])
    return {
        "agg_value": area,
        "auc": area,
        "forget": _metric(members.keys, "score", first, _mean),
        "holdout": _metric(others.keys, "score", second, _mean),
    }
