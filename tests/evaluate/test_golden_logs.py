"""Two logs published with TOFU give the published numbers, in whatever format they pass through on the way."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from soul.evaluate.eval_log import EvalLog
from soul.evaluate.logs import read_log, write_open_unlearning_log, write_tofu_log
from soul.evaluate.summary import score_log

LOGS = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "tofu_logs"
pytestmark = pytest.mark.skipif(not (LOGS / "golden.json").is_file(), reason="needs ../shared/data/tofu_logs beside the checkout")

FULL, RETAIN90 = "llama2-7b_full_wd0.01", "llama2-7b_retain90_wd0.01"
SPLITS = {"forget": "Forget", "retain": "Retain", "real_authors": "Real Authors", "world_facts": "Real World"}
METRICS = ("probability", "rougeL_recall", "truth_ratio")
MEANS = ("geometric", "arithmetic")


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads((LOGS / "golden.json").read_text())


@pytest.fixture(scope="module")
def logs() -> dict[str, EvalLog]:
    return {name: read_log(LOGS / f"{name}.json.gz") for name in (FULL, RETAIN90)}


def check_components(scores: dict[str, Any], golden: dict[str, Any], name: str, mean: str) -> None:
    expected = golden["logs"][name][f"components_{mean}"]
    for split, title in SPLITS.items():
        assert scores["rows"][split] == expected[title]["n"]
        for metric in METRICS:
            assert scores[split][metric] == pytest.approx(expected[title][metric], abs=1e-9), (split, metric)
    assert scores["model_utility"] == pytest.approx(expected["model_utility"], abs=1e-9)


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("name", [FULL, RETAIN90])
def test_components_and_utility(golden: dict[str, Any], logs: dict[str, EvalLog], name: str, mean: Any) -> None:
    check_components(score_log(logs[name], mean=mean), golden, name, mean)


@pytest.mark.parametrize("mean", MEANS)
def test_forget_quality_is_exact(golden: dict[str, Any], logs: dict[str, EvalLog], mean: Any) -> None:
    expected = golden["forget_quality"]["full_vs_retain90"][f"ks_{mean}"]
    scores = score_log(logs[FULL], logs[RETAIN90], mean=mean)
    assert scores["forget_quality_ks"] == pytest.approx(expected["statistic"], abs=1e-12)
    assert scores["forget_quality"] == pytest.approx(expected["pvalue_exact"], rel=1e-6)
    assert scores["tests"]["forget_quality"]["p_value"] == pytest.approx(scores["forget_quality"])
    assert "no scores of single" in scores["tests"]["mia_auc.loss"]["reason"]
    itself = score_log(logs[FULL], logs[FULL], mean=mean)
    assert (itself["forget_quality"], itself["forget_quality_ks"]) == (1.0, 0.0)


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("name", [FULL, RETAIN90])
def test_soul_self_ks_stands_apart(golden: dict[str, Any], logs: dict[str, EvalLog], name: str, mean: Any) -> None:
    expected = golden["logs"][name]["soul_style_self_ks"][mean]
    legacy = score_log(logs[name], mean=mean)["legacy"]
    assert legacy["legacy_self_ks"] == pytest.approx(expected["statistic"], abs=1e-12)
    assert legacy["legacy_self_ks_p"] == pytest.approx(expected["pvalue_exact"], rel=1e-6)


@pytest.mark.parametrize(
    ("write", "file"), [(write_tofu_log, "a.json.gz"), (write_tofu_log, "a.json"), (write_open_unlearning_log, "TOFU_EVAL.json")]
)
def test_published_logs_keep_their_scores_through_both_formats(logs: dict[str, EvalLog], tmp_path: Path, write: Any, file: str) -> None:
    copies = {}
    for name, log in logs.items():
        write(log, tmp_path / name / file)
        copies[name] = read_log(tmp_path / name / file)
    before, after = score_log(logs[FULL], logs[RETAIN90]), score_log(copies[FULL], copies[RETAIN90])
    crossed = score_log(logs[FULL], copies[RETAIN90])
    for scores in (after, crossed):
        scores["log"], scores["retrained"] = before["log"], before["retrained"]
        scores["not_compared"] = before["not_compared"]  # OpenUnlearning's format has no token counts
        assert scores == before


def test_single_files_and_folders_read_like_the_aggregate(golden: dict[str, Any], tmp_path: Path) -> None:
    document = json.loads(gzip.decompress((LOGS / f"{FULL}.json.gz").read_bytes()))
    for file, split in document.items():
        (tmp_path / file).write_text(json.dumps(split))
    check_components(score_log(read_log(tmp_path)), golden, FULL, "geometric")
    alone = score_log(read_log(tmp_path / "eval_log_forget.json"), read_log(LOGS / f"{RETAIN90}.json.gz"))
    assert alone["forget_quality"] == pytest.approx(golden["forget_quality"]["full_vs_retain90"]["ks_geometric"]["pvalue"], rel=1e-6)
    assert alone["model_utility"] is None
    assert "retain.probability" in alone["reasons"]["model_utility"]
