"""perf/gpu at its smallest, on the CPU: every script runs end to end and writes a head and its numbers. No timing is judged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from perf.gpu import _card, evaluation, serving, steps
from soul.models.stored import in_memory
from tests.project.test_layers import imported_modules

CPU = torch.device("cpu")
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 320}
SCRIPTS = (steps.main, serving.main, evaluation.main)


@pytest.fixture(autouse=True)
def smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_card.MODELS, "tiny", {**SHAPE, "tie_word_embeddings": True})


def run(main: Callable[..., None], folder: Path, flags: str) -> dict[str, Any]:
    main(["--device", "cpu", "--models", "tiny", "--rounds", "1", "--json", str(folder / "out.json"), *flags.split()])
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    assert {"device", "torch", "cuda", "commit", "date", "flags"} <= found["head"].keys()
    assert found["head"]["is_performance"] is False and "no speed" in found["head"]["device"]
    assert all(item["ratio"] > 0 for item in found["comparisons"])
    return found


def test_steps_write_ratios_and_memory_beside_the_plans(tmp_path: Path) -> None:
    found = run(steps.main, tmp_path, "--methods npo --engines fsdp --precisions bf16 --steps 1 --warm-up 1 --length 16 --rows 2")
    assert [(item["part"], item["unit"]) for item in found["comparisons"]] == [("order", "s"), ("order", "bytes")]
    assert [row["side"] for row in found["measured"]] == ["FO bf16 fsdp", "SO bf16 fsdp"]
    for row in found["measured"]:
        assert row["predicted_over_measured"] == row["predicted_bytes"] / row["peak_bytes"]
        assert row["tokens_per_s"] == pytest.approx(2 * 2 * 16 / row["step_s"])


def test_sides_are_compared_that_differ_in_one_thing() -> None:
    sides = [
        steps.Side("tiny", "npo", order, precision, engine)
        for engine in ("fsdp", "deepspeed")
        for precision in ("bf16", "fp32")
        for order in ("FO", "SO")
    ]
    walls = {side.name: [1.0 + place] for place, side in enumerate(sides)}
    found = steps.ratios(sides, walls, [{"side": side.name, "peak_bytes": 10 + place} for place, side in enumerate(sides)])
    pairs = {(item.part, item.above, item.below) for item in found}
    assert len(found) == 2 * 12 and len(pairs) == 12
    assert ("engine", "SO fp32 deepspeed", "SO fp32 fsdp") in pairs and ("precision", "FO bf16 fsdp", "FO fp32 fsdp") in pairs
    for item in found:
        values = walls if item.unit == "s" else {name: [9 + wall[0]] for name, wall in walls.items()}
        assert item.ratio == values[item.above][0] / values[item.below][0]


def test_what_does_not_fit_is_named_with_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(steps, "memory_bytes", lambda device: 1000)
    monkeypatch.setattr(steps.importlib.util, "find_spec", lambda name: None)
    found = run(steps.main, tmp_path, "--methods npo --engines single,deepspeed --precisions fp32 --rows 2 --length 16")
    assert [item["what"] for item in found["skipped"]] == ["ZeRO-3", "tiny npo, FO fp32 single", "tiny npo, SO fp32 single"]
    assert found["comparisons"] == [] and capsys.readouterr().out.count("SKIPPED") == 3


def test_serving_says_the_same_tokens(tmp_path: Path) -> None:
    found = run(serving.main, tmp_path, "--batches 1,2 --prompt-tokens 8 --new-tokens 4")
    assert [(row["batch"], row["rows_equal"]) for row in found["measured"]] == [(1, 1), (1, 1), (2, 2), (2, 2)]


def test_evaluation_measures_both_passes_in_both_types(tmp_path: Path) -> None:
    found = run(evaluation.main, tmp_path, "--authors 2 --limit 1 --new-tokens 2")
    assert [(row["pass"], row["side"]) for row in found["measured"]] == [(p, kind) for p in evaluation.PASSES for kind in evaluation.DTYPES]
    one, other = (row["forget_probability"] for row in found["measured"][:2])
    assert one == pytest.approx(other, rel=0.05)


@pytest.mark.parametrize("main", SCRIPTS)
def test_without_a_card_there_is_one_line_and_no_fallback(
    main: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit) as ended:
        main([])
    told = capsys.readouterr()
    assert ended.value.code == 2 and told.out == "" and told.err.count("\n") == 1 and "--device cpu" in told.err


def test_weights_are_the_same_whoever_draws_them() -> None:
    one, other = (dict(in_memory(_card.random_llama("tiny", seed=4, device=CPU)).named_parameters()) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["model.layers.0.mlp.up_proj.weight"], one["model.layers.1.mlp.up_proj.weight"])
    assert 0.015 < float(one["model.embed_tokens.weight"].detach().std()) < 0.025


def test_published_sizes() -> None:
    assert {name: round(_card.shape(name).num_params / 1e6) for name in ("135m", "1b", "7b")} == {"135m": 135, "1b": 1236, "7b": 6738}


def test_scripts_for_a_card_need_no_ray() -> None:
    scripts = list(Path(steps.__file__).parent.glob("*.py"))
    assert {script.stem for script in scripts} == {"_card", "steps", "serving", "evaluation"}
    for script in scripts:
        found = set(imported_modules(script.read_text()))
        assert not any(name.split(".")[0] == "ray" or name.startswith("soul.orchestration") for name in found)
