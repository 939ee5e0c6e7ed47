"""Published evaluation logs, whoever wrote them: `read_log` tells TOFU's format from OpenUnlearning's by the keys."""

from __future__ import annotations

from pathlib import Path

from soul.evaluate.eval_log import EvalLog
from soul.evaluate.log_json import load_json
from soul.evaluate.open_unlearning_log import FILE, is_open_unlearning, parse_open_unlearning, write_open_unlearning_log
from soul.evaluate.tofu_log import AGGREGATED, is_tofu, parse_tofu, read_tofu_folder, write_tofu_log
from soul.records import InputError

__all__ = ["read_log", "write_open_unlearning_log", "write_tofu_log"]


def read_log(path: str | Path) -> EvalLog:
    """A .json or .json.gz file, an evaluation folder that holds one under its usual name, or a run directory.

    Raises:
        InputError: no log there, or a bad one; names the file and the key.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    document = load_json(path)
    if is_tofu(document):
        return parse_tofu(document, path)
    if is_open_unlearning(document):
        return parse_open_unlearning(document, path)
    raise InputError(
        f"{path} is no evaluation log: expected TOFU's keys (eval_log_forget.json, ... or avg_gt_loss) or OpenUnlearning's "
        "(forget_truth_ratio with value_by_index). A summary file has no row values: pass the full log."
    )


def _read_folder(folder: Path) -> EvalLog:
    for name in (AGGREGATED, f"{AGGREGATED}.gz"):
        if (folder / name).is_file():
            return parse_tofu(load_json(folder / name), folder / name)
    log = read_tofu_folder(folder)
    if log is not None:
        return log
    if (folder / FILE).is_file():
        return parse_open_unlearning(load_json(folder / FILE), folder / FILE)
    if (folder / "logs").is_dir():  # a run directory, or what `soul evaluate` left
        return _read_folder(folder / "logs")
    raise InputError(f"folder {folder} holds no evaluation log. Expected {AGGREGATED}, eval_log_forget.json or {FILE}.")
