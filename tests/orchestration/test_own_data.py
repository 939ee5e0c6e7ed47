"""Own model, own files: what cannot be measured is null with a reason, and every kind of gold standard does what it says."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from soul.config import Config, EvaluateConfig
from soul.evaluate.logs import read_log
from soul.orchestration import arm, pipeline
from soul.orchestration.evaluate import Judge
from soul.orchestration.gold import given_standard
from soul.orchestration.outcome import NO_RETRAINED
from soul.orchestration.prepare import Prepared
from soul.records import InputError
from soul.report.results import ModelResults, Results, load_results
from tests.orchestration.mini import NUM_FORGET as MINI_FORGET
from tests.orchestration.mini import Finished, fingerprint, settings, splits, steps, write_rows

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
NUM_FORGET, NUM_RETAIN = 7, 11


@dataclass(frozen=True)
class Own:
    config: Config
    run: Path
    results: Results


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions and answers under names of their own, in two formats; nothing but questions and answers."""
    folder, made = tmp_path_factory.mktemp("own"), splits()
    rows = [{"ask": record.prompt, "reply": record.response, "source": "x"} for record in made["forget05"][:NUM_FORGET]]
    write_rows(folder / "forget.jsonl", rows)
    kept = [{"ask": record.prompt, "reply": record.response} for record in made["retain95"][:NUM_RETAIN]]
    pq.write_table(pa.Table.from_pylist(kept), folder / "retain.parquet")
    return folder


def own_settings(files: Path, model: Path, output: Path, **sections: Any) -> dict[str, Any]:
    made = settings(files, output, **sections)
    made["benchmark"] = "own"
    made["data"] = {"forget": str(files / "forget.jsonl"), "retain": str(files / "retain.parquet"), "columns": "prompt=ask,response=reply"}
    made["model"] = {"path": str(model), **{name: value for name, value in made["model"].items() if name != "tiny"}}
    del made["prepare"]
    return made


@pytest.fixture(scope="module")
def own(finished: Finished, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Own:
    folder = tmp_path_factory.mktemp("own-runs")
    config = Config.model_validate(own_settings(files, finished.target, folder / "run", train={"epochs": 2, "batch_size": 4}))
    run = pipeline.run(config)
    return Own(config, run, load_results(run))


def again(own: Own, output: Path, retrained: Path | str, monkeypatch: pytest.MonkeyPatch, **model: Any) -> Results:
    """The same run against a gold standard. Its training is done: nothing trains."""
    shutil.copytree(own.run, output)
    config = own.config.model_copy(
        update={
            "output": str(output),
            "model": own.config.model.model_copy(update={"retrained": str(retrained), **model}),
            "cache": own.config.cache_folder,
        }
    )
    (output / "config.json").write_text(config.model_dump_json())

    def refuse(**_: Any) -> None:
        raise AssertionError("a finished stage was repeated")

    monkeypatch.setattr(arm, "TrainJob", refuse)
    return load_results(pipeline.run(config))


def entry(results: Results, name: str) -> ModelResults:
    found = results.models[name]  # type: ignore[index]
    assert found is not None
    return found


def test_what_own_rows_cannot_tell_is_null_with_a_reason(own: Own) -> None:
    assert own.results.benchmark == "own" and own.results.splits == {"forget": NUM_FORGET, "retain": NUM_RETAIN}
    for name in ("target", "unlearned"):
        model = entry(own.results, name)
        for path in ("forget.probability", "forget.rougeL_recall", "retain.probability"):
            assert model.value(path) is not None
        for path, reason in {
            "forget.truth_ratio": "no right answer with wrong ones beside it",
            "real_authors": "no real_authors split",
            "model_utility": "needs nine components",
            "mia_auc": "holdout",
            "forget_quality": "--retrained",
        }.items():
            assert model.value(path) is None and reason in model.reason(path), path
    assert own.results.models["retrained"] is None
    assert own.results.reasons["models.retrained"] == NO_RETRAINED and "--retrained" in NO_RETRAINED


def test_own_rows_train(own: Own) -> None:
    assert len(steps(own.run)) == 4
    assert fingerprint(own.run / "model") != fingerprint(Path(str(own.config.model.path)))
    assert (own.run / "report.html").is_file()


def test_a_model_as_the_gold_standard_is_evaluated(own: Own, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = again(own, tmp_path / "run", finished.retrained, monkeypatch)
    assert entry(results, "retrained").value("forget.probability") is not None
    for split in ("forget", "retain"):
        assert getattr(entry(results, "unlearned"), split) == getattr(entry(own.results, "unlearned"), split)
    assert "models.retrained" not in results.reasons


def test_a_run_as_the_gold_standard_lends_its_own(own: Own, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a log was evaluated again")

    monkeypatch.setattr(Judge, "evaluate", refuse)
    with pytest.raises(InputError, match=f"forget: {MINI_FORGET} rows against {NUM_FORGET}.*--allow-mismatch"):
        again(own, tmp_path / "refused", finished.run, monkeypatch)
    results = again(own, tmp_path / "run", finished.run, monkeypatch, allow_mismatch=True)
    assert f"{MINI_FORGET} rows against {NUM_FORGET}" in str(results.settings["compared_despite"])
    theirs = load_results(finished.run)
    assert entry(results, "retrained").value("forget.probability") == pytest.approx(entry(theirs, "retrained").value("forget.probability"))
    # its forget rows are others than ours: no test may compare them
    assert entry(results, "unlearned").forget_quality is None
    assert given_standard(str(finished.run)) == read_log(finished.run / "logs" / "retrained")


def test_a_published_log_of_other_rows_is_no_gold_standard_for_ours(finished: Finished, shared_data: Path, tmp_path: Path) -> None:
    published = shared_data / "tofu_logs" / "llama2-7b_retain90_wd0.01.json.gz"
    log = given_standard(str(published))
    assert not isinstance(log, Prepared)
    num_theirs = len(log.splits["forget"].keys)
    assert num_theirs > MINI_FORGET
    with pytest.raises(InputError, match=f"forget: {num_theirs} rows against {MINI_FORGET}.*--allow-mismatch"):
        evaluated(finished, tmp_path, published)
    assert not (tmp_path / "evaluation").exists()


def evaluated(finished: Finished, folder: Path, retrained: Path) -> Path:
    """`soul evaluate` of the finished run's model."""
    made = settings(finished.data, folder / "evaluation")
    sections = {name: made[name] for name in ("data", "evaluate", "output", "progress")}
    sections["precision"] = "fp32"
    config = EvaluateConfig.model_validate({**sections, "model": {"path": str(finished.run / "model"), "retrained": str(retrained)}})
    return pipeline.evaluate_folder(config)


def test_an_evaluated_folder_is_a_gold_standard(finished: Finished, tmp_path: Path) -> None:
    out = evaluated(finished, tmp_path, finished.run)
    found, known = json.loads((out / "evaluation.json").read_text()), entry(load_results(finished.run), "unlearned")
    for path in ("forget.probability", "forget.truth_ratio", "retain.rougeL_recall", "model_utility", "forget_quality", "mia_auc.min_k"):
        section, _, metric = path.partition(".")
        value = found[section][metric] if metric else found[section]
        assert value == pytest.approx(known.value(path), rel=1e-5), path
    standard = given_standard(str(out))
    assert not isinstance(standard, Prepared)
    for file in ("eval_log_aggregated.json", "TOFU_EVAL.json"):
        log = read_log(out / "logs" / file)
        assert log.splits["forget"].answer_nll == pytest.approx(standard.splits["forget"].answer_nll)


def test_an_unfinished_run_is_no_gold_standard(own: Own, tmp_path: Path) -> None:
    (tmp_path / ".stages").mkdir()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"measured against no gold standard.* soul resume"):
        given_standard(str(tmp_path))
