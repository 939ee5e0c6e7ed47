"""perf/compare.py at its smallest: every part runs, refuses sides that do different work, and writes its numbers. No timing is judged."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from perf import _evaluation, _ray, _steps, _trainer
from perf._measure import Moment, compare, interleaved, peak_bytes, table
from perf._steps import run_steps
from perf._workload import Workload, make_workload
from perf.compare import main
from soul.objectives.methods import NPO, GradDiff
from soul.optim.configs import AdamWConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    nowhere = tmp_path_factory.mktemp("data") / "absent"
    return make_workload(model="tiny", device="cpu", precision="fp32", rows=6, batch_size=3, micro_batch_size=3, data=nowhere)


def run(part: str, folder: Path) -> list[dict[str, Any]]:
    size = ["--rounds", "1", "--steps", "2", "--rows", "4", "--batch-size", "2", "--micro-batch-size", "2"]
    main(["--part", part, *size, "--data", str(folder / "absent"), "--json", str(folder / "out.json")])
    written = json.loads((folder / "out.json").read_text())
    assert written["environment"]["source"] == "fictitious" and written["environment"]["rows"] == {"forget": 4, "retain": 8}
    found: list[dict[str, Any]] = written["comparisons"]
    return found


def test_parts_without_ray_write_their_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_evaluation, "TRAINING_STEPS", 2)
    monkeypatch.setattr(_evaluation, "CAP", 8)
    for module in (_steps, _trainer):
        monkeypatch.setattr(module, "WARM_UP", 1)
    found = run("a,b,c", tmp_path)
    assert {item["part"] for item in found} == set("abc")
    assert all(item["ratio"] > 0 and item["quartiles"] == [item["ratio"]] * 2 for item in found)
    aims = {(item["part"], item["name"]): (item["aim"], item["at_least"]) for item in found if item["aim"] is not None}
    assert aims == {
        ("a", "grad_diff step, wall time"): (1.05, False),
        ("a", "grad_diff peak memory"): (1.0, False),
        ("a", "npo step, wall time"): (1.05, False),
        ("a", "npo peak memory"): (1.0, False),
        ("b", "grad_diff step, wall time"): (2.0, True),
        ("b", "npo step, wall time"): (3.0, True),
        ("c", "evaluation, wall time"): (5.0, True),
    }
    assert "grad_diff step, wall time" in capsys.readouterr().out


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)  # two Ray clusters, four runs
def test_ray_part_writes_its_ratios(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    found = run("d", tmp_path)
    assert [item["name"] for item in found if item["aim"] is not None] == ["1 worker, seconds a step", "2 workers, ddp, seconds a step"]


def test_ray_part_is_left_out_where_ray_is_not_installed(
    workload: Workload, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(_ray.importlib.util, "find_spec", lambda name: None)
    assert _ray.compare_with_ray(workload, rounds=1, steps=1) == []
    assert "needs ray" in capsys.readouterr().out


@pytest.mark.parametrize("method", [GradDiff(), NPO()], ids=lambda method: method.name)
def test_another_loss_on_one_side_is_no_comparison(workload: Workload, method: GradDiff | NPO) -> None:
    feed = workload.feed(reference=method.name == "npo")
    pairs = _trainer.Pairs(feed, steps=_trainer.CHECKED_STEPS)
    assert _trainer.check_losses(workload, feed, pairs, method) < 1e-5
    for pair in pairs.items:
        pair["retain"] = pair["forget"]
    with pytest.raises(AssertionError, match="not the same work"):
        _trainer.check_losses(workload, feed, pairs, method)


def test_another_likelihood_or_text_on_one_side_is_no_comparison(workload: Workload) -> None:
    asked = _evaluation.questions(workload)
    model = workload.build_model().eval()
    splits = {"forget": asked.records}
    ours = _evaluation.evaluate_model(
        model, workload.tokenizer, splits, _evaluation.EvalSettings(max_new_tokens=_evaluation.CAP), device=CPU
    )
    nlls = _evaluation.padded_mean_nlls(workload, model, asked.rows)
    texts = _evaluation.generate_each(workload, model, asked.prompts)
    assert _evaluation.check_equal(workload, ours, nlls, texts) < 1e-4
    with pytest.raises(AssertionError, match="mean losses differ"):
        _evaluation.check_equal(workload, ours, [*nlls[:-1], nlls[-1] + 1e-3], texts)
    with pytest.raises(AssertionError, match="texts differ"):
        _evaluation.check_equal(workload, ours, nlls, [*texts[:-1], texts[-1] + "x"])


def test_a_clock_covers_the_last_steps_only(workload: Workload) -> None:
    run = run_steps(workload, workload.feed(reference=False), GradDiff(), AdamWConfig(), steps=3)
    first, second, third = run.moments
    assert run.per_step(2).wall == pytest.approx((third.wall - first.wall) / 2)
    assert first.wall < second.wall < third.wall and len(run.losses) == 3


def test_ratios_are_paired_and_turns_alternate() -> None:
    turns: list[str] = []

    def side(name: str, seconds: Sequence[float]) -> Any:
        values = iter(seconds)

        def once() -> Moment:
            turns.append(name)
            return Moment(next(values), 0.0)

        return once

    moments = interleaved({"x": side("x", [1.0, 30.0, 6.0]), "y": side("y", [2.0, 10.0, 3.0])}, rounds=3)
    assert "".join(turns) == "xyyxxy"
    walls = {name: [moment.wall for moment in side] for name, side in moments.items()}
    found = compare("a", "n", ("x", walls["x"]), ("y", walls["y"]), unit="s", aim=1.9)
    assert (found.ratio, found.quartiles) == (2.0, (1.25, 2.5)) and found.is_met is False
    assert compare("a", "n", ("x", walls["x"]), ("y", walls["y"]), unit="s", aim=1.9, at_least=True).is_met is True
    assert "<= 1.9 MISSED" in table([found]) and "6.00 s" in table([found])


def test_peak_counts_tensors_that_exist_together() -> None:
    def work() -> None:
        kept = torch.ones(2**20)
        for _ in range(3):
            torch.ones(2**20)
        nn.functional.relu(kept)

    assert 2 * 2**22 <= peak_bytes(work, CPU) < 2.1 * 2**22
