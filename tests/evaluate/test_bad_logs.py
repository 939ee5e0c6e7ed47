"""A bad log is refused with its file and key named, and with nothing of the rows' text."""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from soul.evaluate.logs import read_log
from soul.evaluate.summary import score_log
from soul.records import InputError

SECRET = "Basil Mahfouz"


def tofu() -> dict[str, Any]:
    rows = ("0", "1", "2")
    split = {
        "avg_gt_loss": dict.fromkeys(rows, 0.5),
        "avg_paraphrased_loss": dict.fromkeys(rows, 1.0),
        "average_perturb_loss": {row: [2.0, 3.0] for row in rows},
        "rougeL_recall": dict.fromkeys(rows, 0.5),
        "generated_text": {row: [SECRET, SECRET, SECRET] for row in rows},
    }
    return {"eval_log.json": copy.deepcopy(split), "eval_log_forget.json": split}


def open_unlearning() -> dict[str, Any]:
    return {
        "forget_truth_ratio": {"agg_value": 0.5, "value_by_index": {str(row): {"score": 0.5 + row} for row in range(3)}},
        "forget_Q_A_Prob": {"agg_value": 0.5, "value_by_index": {str(row): {"prob": 0.5, "avg_loss": 0.7} for row in range(3)}},
        "mia_loss": {"agg_value": 0.5, "auc": 0.5},
        "forget_quality": {"agg_value": None},
    }


def write(path: Path, document: object) -> Path:
    path.write_text(json.dumps(document))
    return path


def changed(document: dict[str, Any], keys: list[str], value: object) -> dict[str, Any]:
    place = document
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return document


TOFU_FAULTS = [
    (["eval_log_forget.json"], [1], "eval_log_forget.json"),
    (["eval_log_forget.json"], {"rougeL_recall": {}}, "avg_gt_loss"),
    (["eval_log_forget.json", "avg_gt_loss"], {}, "avg_gt_loss"),
    (["eval_log_forget.json", "avg_gt_loss"], {"zero": 1.0}, "avg_gt_loss"),
    (["eval_log_forget.json", "avg_gt_loss", "1"], SECRET, "avg_gt_loss > 1"),
    (["eval_log_forget.json", "avg_gt_loss", "1"], float("nan"), "avg_gt_loss > 1"),
    (["eval_log_forget.json", "avg_gt_loss", "1"], -3.0, "avg_gt_loss > 1"),
    (["eval_log_forget.json", "rougeL_recall", "2"], 50.0, "rougeL_recall > 2"),
    (["eval_log_forget.json", "average_perturb_loss", "0"], [], "average_perturb_loss > 0"),
    (["eval_log_forget.json", "average_perturb_loss", "0"], [1.0, True], "average_perturb_loss > 0"),
    (["eval_log_forget.json", "rougeL_recall"], {"0": 1.0}, "rougeL_recall"),
]
OPEN_UNLEARNING_FAULTS = [
    (["forget_truth_ratio", "value_by_index"], [], "forget_Truth_Ratio > value_by_index"),
    (["forget_truth_ratio", "value_by_index", "1"], {"prob": 1}, "value_by_index > 1 > score"),
    (["forget_truth_ratio", "value_by_index", "1", "score"], SECRET, "value_by_index > 1 > score"),
    (["forget_truth_ratio", "value_by_index"], {"0": {"score": 1.0}}, "forget_Truth_Ratio"),
    (["mia_loss", "agg_value"], 7, "mia_loss > agg_value"),
]


@pytest.mark.parametrize(("keys", "value", "named"), TOFU_FAULTS)
def test_tofu_faults(tmp_path: Path, keys: list[str], value: object, named: str) -> None:
    check_refused(write(tmp_path / "log.json", changed(tofu(), keys, value)), named)


@pytest.mark.parametrize(("keys", "value", "named"), OPEN_UNLEARNING_FAULTS)
def test_open_unlearning_faults(tmp_path: Path, keys: list[str], value: object, named: str) -> None:
    check_refused(write(tmp_path / "log.json", changed(open_unlearning(), keys, value)), named)


def check_refused(path: Path, named: str) -> None:
    with pytest.raises(InputError) as caught:
        read_log(path)
    assert str(path) in str(caught.value) and named in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b"{"),
        ("b.json", b"[1, 2]"),
        ("c.json", b"{}"),
        ("d.json", b'{"forget_quality": 0.5, "model_utility": 0.6}'),
        ("e.json.gz", gzip.compress(b'{"eval_log.json": {}}', mtime=0)[:-9]),
        ("f.json", b"\xff\xfe\x00"),
        ("g.json", json.dumps(tofu()["eval_log.json"]).encode()),
    ],
)
def test_files_that_are_no_logs(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    check_refused(tmp_path / name, "")


def test_missing_files_and_empty_folders(tmp_path: Path) -> None:
    check_refused(tmp_path / "nothing.json", "does not exist")
    check_refused(tmp_path, "no evaluation log")


def test_good_logs_are_read_and_every_null_has_a_reason(tmp_path: Path) -> None:
    first = score_log(read_log(write(tmp_path / "tofu.json", tofu())), read_log(write(tmp_path / "ou.json", open_unlearning())))
    second = score_log(read_log(tmp_path / "ou.json"), read_log(tmp_path / "tofu.json"), mean="arithmetic")
    assert first["forget_quality"] is not None and first["mia_auc"] is None
    assert second["forget_quality"] is None and "geometric" in second["reasons"]["forget_quality"]
    assert second["mia_auc"]["loss"] == 0.5 and second["mia_auc"]["zlib"] is None
    for scores in (first, second):
        json.dumps(scores, allow_nan=False)
        reasons = scores["reasons"]
        for path in null_paths({key: value for key, value in scores.items() if key not in ("reasons", "retrained")}):
            assert path in reasons, path
        assert all(reasons.values())


def null_paths(value: object, path: str = "") -> list[str]:
    if value is None:
        return [path]
    if isinstance(value, dict):
        return [found for key, item in value.items() for found in null_paths(item, f"{path}.{key}" if path else key)]
    return []


def test_rows_are_ordered_by_number_not_by_text(tmp_path: Path) -> None:
    document = tofu()["eval_log_forget.json"]
    rows = {str(row): {"10": 0.0}.get(str(row), 1.0) for row in (10, 9, 2, 11, 0)}
    for key in ("avg_gt_loss", "avg_paraphrased_loss", "rougeL_recall"):
        document[key] = dict(rows)
    document["average_perturb_loss"] = {row: [1.0] for row in rows}
    log = read_log(write(tmp_path / "eval_log_forget.json", document))
    assert log.splits["forget"].keys == ("0", "2", "9", "10", "11")
    assert log.splits["forget"].answer_nll == (1.0, 1.0, 1.0, 0.0, 1.0)
