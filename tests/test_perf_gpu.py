"""The scripts of perf/gpu at their smallest, on the CPU: every part runs and writes its numbers. No timing is judged, and none means anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from perf.gpu import _training, serving, steps
from perf.gpu._models import random_model
from perf.gpu._training import Setting, Side
from soul.models.stored import in_memory
from soul.models.tiny import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--device", "cpu", "--models", "tiny", "--rounds", "1"]
STEPS = ["--rows", "4", "--batch-size", "2", "--micro-batch-size", "2", "--steps", "1", "--warm-up", "1"]


def written(main: Any, folder: Path, *flags: str) -> dict[str, Any]:
    main([*SMALL, *flags, "--data", str(folder / "absent"), "--json", str(folder / "out.json")])
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    assert found["header"]["card"] is None and found["header"]["torch"] == torch.__version__ and found["header"]["flags"]["device"] == "cpu"
    return found


def test_steps_writes_ratios_rates_and_memory_beside_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = written(steps.main, tmp_path, *STEPS, "--engines", "single,fsdp", "--precisions", "fp32", "--methods", "npo")
    sides = {(side["engine"], side["order"]): side for side in found["sides"]}
    assert set(sides) == {(engine, order) for engine in ("single", "fsdp") for order in ("FO", "SO")} and not found["skipped"]
    for side in sides.values():
        assert side["tokens_a_second"] > 0 and side["seconds_a_step"] > 0
        # weights, gradients and two moments of 0.5 to 0.9 M parameters (a vocabulary of few rows is small), and not a copy of them
        assert 0.4 < side["measured_over_planned"] == side["peak_bytes"] / side["planned_bytes"] < 1.3
    names = [item["name"] for item in found["comparisons"]]
    assert names == ["npo, single, step", "npo, single, peak", "npo, fsdp, step", "npo, fsdp, peak"]
    assert "measured / planned" in capsys.readouterr().out


def test_what_does_not_fit_is_named_with_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_training, "room", lambda device: 2**20)
    found = written(steps.main, tmp_path, *STEPS, "--engines", "single", "--precisions", "fp32", "--methods", "npo")
    assert not found["sides"] and not found["comparisons"]
    [left_out] = found["skipped"]
    assert left_out["engine"] == "single" and left_out["planned_bytes"] == sum(left_out["parts"].values()) > left_out["room_bytes"] == 2**20
    assert "SKIPPED tiny fp32, single, npo: needs" in capsys.readouterr().err


def test_memory_that_runs_out_against_the_plan_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(setting: Setting, side: Side, num_steps: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Setting, "run", run)
    found = written(steps.main, tmp_path, *STEPS, "--engines", "single", "--precisions", "fp32", "--methods", "npo")
    assert [item["order"] for item in found["skipped"]] == ["FO", "SO"] and not found["comparisons"]
    assert "OUT OF MEMORY tiny fp32, single SO, npo" in capsys.readouterr().err


def test_serving_writes_tokens_and_rows_a_second(tmp_path: Path) -> None:
    found = written(serving.main, tmp_path, "--rows", "2", "--batches", "1,2", "--new-tokens", "3")
    engines = {(side["engine"], side["batch"]): side for side in found["sides"] if "engine" in side}
    assert set(engines) == {(engine, batch) for engine in ("torch_engine", "generate") for batch in (1, 2)}
    assert [engines["generate", batch]["tokens"] for batch in (1, 2)] == [3, 6]
    passes = {(side["pass"], side["precision"]): side["rows"] for side in found["sides"] if "pass" in side}
    assert set(passes) == {(name, precision) for name in ("likelihoods", "generation") for precision in ("bf16", "fp32")}
    assert passes["generation", "bf16"] == 2 and passes["likelihoods", "fp32"] > 2
    assert [item["notes"]["answers_alike"] for item in found["comparisons"][:2]] == [1.0, 1.0], "fp32: the same tokens"


@pytest.mark.parametrize("script", [steps, serving], ids=["steps", "serving"])
@pytest.mark.parametrize("compute", [None, "cpu"])
def test_without_a_card_there_is_one_line_and_status_2(
    script: Any, compute: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: compute is not None)
    monkeypatch.delenv("SOUL_COMPUTE", raising=False)
    if compute is not None:
        monkeypatch.setenv("SOUL_COMPUTE", compute)
    with pytest.raises(SystemExit) as ended:
        script.main(["--models", "tiny"])
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and not out and err.count("\n") == 1 and "--device cpu" in err


def test_a_random_model_is_the_same_each_time_and_nowhere_before() -> None:
    tokenizer = tiny_tokenizer(["a b c"], 300)
    one, same, other = (
        in_memory(random_model("tiny", tokenizer, device=torch.device("cpu"), seed=seed)).state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(one[name], same[name]) for name in one) and not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    assert all(parameter.is_meta for parameter in random_model("7b", tokenizer, device=torch.device("cpu"), seed=0).skeleton.parameters())


@pytest.mark.slow
def test_every_engine_and_precision_runs(tmp_path: Path) -> None:
    """In a process of its own, because DeepSpeed leaves traces."""
    pytest.importorskip("deepspeed")
    flags = [*SMALL, *STEPS, "--data", str(tmp_path / "absent"), "--json", str(tmp_path / "out.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "perf/gpu/steps.py", *flags], cwd=ROOT, env=environment, check=True, timeout=280)
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["sides"]) == 3 * 2 * 2 * 2 and len(found["comparisons"]) == 4 * (3 + 2) * 2 and not found["skipped"]
    names = [item["name"] for item in found["comparisons"] if item["aim"] is None]
    assert {"npo, SO, step", "grad_diff, FO, peak"} <= set(names)
