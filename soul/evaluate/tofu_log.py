"""TOFU's log format: one JSON object per split with `avg_gt_loss`, `avg_paraphrased_loss`, ... as {row: value}.

The aggregated file holds the splits under the names of their single files. Beside TOFU's own columns, ours are kept under our names
(`exact_memorization`, `attack_loss`, ...); TOFU's scripts ignore them. Generated and reference text is never written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from soul.evaluate.eval_log import ATTACKS, EvalLog, SplitLog, finite_columns, truth_ratios_of
from soul.evaluate.log_json import Json, by_index, check_rows, count, indexed, load_json, loss, losses, number, share, write_json
from soul.records import InputError

FILES: Final = {
    "retain": "eval_log.json",
    "forget": "eval_log_forget.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
    "holdout": "eval_log_holdout.json",
}
ROWS: Final = "rows_digest"  # ours, as the next
MADE_WITH: Final = "made_with"  # ours
AGGREGATED: Final = "eval_log_aggregated.json"
_LOSSES: Final = {"answer_nll": "avg_gt_loss", "right_nll": "avg_paraphrased_loss"}
_SHARES: Final = ("rouge1_recall", "rougeL_recall", "exact_memorization", "extraction_strength", "accuracy")
_COUNTS: Final = {"answer_tokens": "num_token_gt", "right_tokens": "num_token_paraphrased", "groups": "group"}


def is_tofu(document: Mapping[str, Any]) -> bool:
    return "avg_gt_loss" in document or any(name in document for name in FILES.values())


def parse_tofu(document: Json, path: Path) -> EvalLog:
    """An aggregated log, or a single split's, which is told by its file name.

    Raises:
        InputError: a key is missing or holds something else than numbers.
    """
    if "avg_gt_loss" in document:
        name = path.name.removesuffix(".gz")
        split = next((split for split, file in FILES.items() if file == name), None)
        if split is None:
            raise InputError(
                f"{path} is the log of one split, but its name does not say which. Expected one of {', '.join(FILES.values())}."
            )
        return EvalLog(str(path), {split: _parse_split(document, path, "")})
    splits: dict[str, SplitLog] = {}
    for split, file in FILES.items():
        if file not in document:
            continue
        if not isinstance(document[file], dict):
            raise InputError(f"{path}, key {file}: expected an object with one entry per metric.")
        splits[split] = _parse_split(document[file], path, f"{file} > ")
    return EvalLog(str(path), splits, made_with=_texts(document.get(MADE_WITH, {}), path))


def read_tofu_folder(folder: Path) -> EvalLog | None:
    """The single files of an evaluation folder, None when there are none."""
    found = {split: folder / file for split, file in FILES.items() if (folder / file).is_file()}
    if not found:
        return None
    return EvalLog(str(folder), {split: _parse_split(load_json(path), path, "") for split, path in found.items()})


def _parse_split(document: Json, path: Path, prefix: str) -> SplitLog:
    if "avg_gt_loss" not in document:
        raise InputError(f"{path}, key {prefix}avg_gt_loss: missing. Expected TOFU's evaluation log of a split.")
    wanted = [*_LOSSES.values(), *_SHARES, *_COUNTS.values(), "average_perturb_loss", "num_token_perturb"]
    wanted += [f"attack_{attack}" for attack in ATTACKS]
    present = [key for key in wanted if document.get(key) is not None]
    columns = {key: by_index(document[key], path=path, key=prefix + key) for key in present}
    keys = check_rows({prefix + key: column for key, column in columns.items()}, path=path)

    def column(key: str, parse: Callable[..., Any]) -> tuple[Any, ...] | None:
        if key not in columns:
            return None
        return tuple(None if row is None else parse(row, path=path, key=f"{prefix}{key} > {i}") for i, row in columns[key].items())

    values: dict[str, Any] = {name: column(key, loss) for name, key in _LOSSES.items()}
    values |= {name: column(name, share) for name in _SHARES}
    values |= {name: column(key, count) for name, key in _COUNTS.items()}
    return SplitLog(
        keys=keys,
        wrong_nlls=column("average_perturb_loss", losses),
        wrong_tokens=column("num_token_perturb", _counts),
        rows=_digest(document.get(ROWS), path, prefix + ROWS),
        attacks={name: rows for name in ATTACKS if (rows := column(f"attack_{name}", number)) is not None},
        **values,
    )


def _digest(value: object, path: Path, key: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise InputError(f"{path}, key {key}: expected a text. Evaluate again to get one.")
    return value


def _counts(value: object, *, path: Path, key: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise InputError(f"{path}, key {key}: expected a list with the number of tokens of each wrong answer.")
    return tuple(count(item, path=path, key=key) for item in value)


def _texts(value: object, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise InputError(f"{path}, key {MADE_WITH}: expected an object of names and words. Evaluate again to get one.")
    return value


def write_tofu_log(log: EvalLog, path: Path) -> None:
    """One aggregated file, as `aggregate_eval_stat.py` of TOFU reads it; .gz compresses."""
    splits: Json = {FILES[split]: _split_json(finite_columns(split_log)) for split, split_log in log.splits.items()}
    write_json(path, splits | ({MADE_WITH: dict(log.made_with)} if log.made_with else {}))


def _split_json(log: SplitLog) -> Json:
    document: Json = {}
    names = {
        **_LOSSES,
        **dict(zip(_SHARES, _SHARES, strict=True)),
        **_COUNTS,
        "wrong_nlls": "average_perturb_loss",
        "wrong_tokens": "num_token_perturb",
    }
    for name, key in names.items():
        column = getattr(log, name)
        if column is not None:
            document[key] = indexed(column, log.keys)
    if log.answer_nll is not None and log.answer_tokens is not None:
        document["gt_loss"] = indexed(_totals(log.answer_nll, log.answer_tokens), log.keys)
    if log.right_nll is not None and log.right_tokens is not None:
        document["paraphrased_loss"] = indexed(_totals(log.right_nll, log.right_tokens), log.keys)
    if log.wrong_nlls is not None and log.wrong_tokens is not None:
        rows = zip(log.wrong_nlls, log.wrong_tokens, strict=True)
        document["perturb_loss"] = indexed([None if row is None else _totals(row, counts) for row, counts in rows], log.keys)
    ratios = truth_ratios_of(log)
    if ratios is not None:
        document["truth_ratio"] = indexed(ratios, log.keys)
    if log.rows is not None:
        document[ROWS] = log.rows
    document.update({f"attack_{name}": indexed(column, log.keys) for name, column in log.attacks.items()})
    return document


def _totals(means: Sequence[float | None], counts: Sequence[int]) -> list[float | None]:
    return [None if mean is None else mean * count for mean, count in zip(means, counts, strict=True)]
