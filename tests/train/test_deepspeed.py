"""ZeRO 1, 2 and 3 compute what `single` computes, in and out of CPU memory, and share checkpoints and exports with the other engines.

DeepSpeed has no float64, so these runs are in float32 with optimizers whose steps are smooth: a coordinate with no curvature takes a
step of the sign of its momentum, which rounding can turn around. One spawn runs everything that needs two ranks.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from soul.models.scoring import answer_logits
from soul.records import InputError
from soul.train import deepspeed as deepspeed_engine
from soul.train.engine import EngineConfig
from soul.train.job import state_bytes
from tests.distributed import spawn
from tests.train.engine_runs import (
    SAVED_AT,
    SIGNS,
    SMOOTH,
    full_state,
    largest_difference,
    new_engine,
    poisoned_run,
    resumed_run,
    straight_run,
    tiny_llama,
)
from tests.train.test_engines import digests, probe_batch, tokenizer

PLAIN = {f"stage {stage}": {"zero_stage": stage} for stage in (1, 2, 3)}
OFFLOADED: dict[str, dict[str, Any]] = {f"stage {stage}, optimizer": {"zero_stage": stage, "offload": "optimizer"} for stage in (1, 2, 3)}
OFFLOADED["stage 3, all"] = {"zero_stage": 3, "offload": "all"}
VARIANTS: dict[str, dict[str, Any]] = {**PLAIN, **OFFLOADED}
RUNS = [(variant, name) for variant in VARIANTS for name in SMOOTH if variant in PLAIN or name == "smooth sophia"]
SIGN_RUNS = [("stage 2", "signum"), ("stage 3", "soul_release")]
SOURCES_OF_FSDP = [("stage 1", "smooth sophia"), ("stage 2", "smooth sophia"), ("stage 3", "smooth sophia"), ("stage 3", "smooth adamw")]
PARTS = ("param/", "exp_avg/", "exp_avg_sq/")


def engine_of(variant: str, optimizer: str, rank: int, world: int, **settings: Any) -> Any:
    return new_engine("deepspeed", optimizer, rank=rank, world=world, dtype=torch.float32, **VARIANTS[variant], **settings)


def two_ranks(rank: int, world: int, folder: str) -> dict[Any, Any]:
    root = Path(folder)
    results: dict[Any, Any] = {}
    for name in SMOOTH:
        engine = new_engine("fsdp", name, rank=rank, world=world, dtype=torch.float32)
        results["fsdp", name] = straight_run(engine, name, root / f"fsdp-{name}")
    engine = new_engine("fsdp", "smooth sophia", rank=rank, world=world, dtype=torch.float32, precision="bf16")
    results["fsdp", "bf16"] = straight_run(engine, "smooth sophia", micro_batch=3)
    for variant, name in RUNS:
        engine = engine_of(variant, name, rank, world)
        results[variant, name] = straight_run(engine, name, root / f"{variant}-{name}")
        results[variant, name, "bytes"] = state_bytes(engine)
    for variant, name in SIGN_RUNS:
        results[variant, name] = straight_run(engine_of(variant, name, rank, world), name)
    for variant, name in SOURCES_OF_FSDP:
        results["resumed", variant, f"fsdp-{name}"] = resumed_run(engine_of(variant, name, rank, world), name, root / f"fsdp-{name}")
    for variant in PLAIN:
        results["poisoned", variant] = poisoned_run(engine_of(variant, "smooth sophia", rank, world))
        results["steered", variant] = straight_run(engine_of(variant, "steered sophia", rank, world), "steered sophia")["first"]
        for name in SMOOTH:
            source = f"{variant}-{name}"
            results["resumed", variant, source] = resumed_run(engine_of(variant, name, rank, world), name, root / source)
        engine = engine_of(variant, "smooth sophia", rank, world, precision="bf16", gradient_checkpointing=True)
        results["state at first", variant] = full_state(engine)
        results["bf16", variant] = straight_run(engine, "smooth sophia", micro_batch=3)
        engine = engine_of(variant, "smooth sophia", rank, world)
        engine.export(root / f"export-{variant}", tokenizer=tokenizer(), dtype=None)
        with torch.no_grad():
            results["logits", variant] = answer_logits(engine.model, probe_batch()).clone()
    engine = new_engine("fsdp", "smooth sophia", rank=rank, world=world, dtype=torch.float32)
    results["fsdp after deepspeed"] = resumed_run(engine, "smooth sophia", root / "stage 3-smooth sophia")
    return results


def one_rank(rank: int, world: int, folder: str) -> dict[Any, Any]:
    results: dict[Any, Any] = {}
    for variant, name in (*((variant, "smooth sophia") for variant in PLAIN), ("stage 2", "smooth adamw")):
        results[variant, name] = resumed_run(engine_of(variant, name, rank, world), name, Path(folder) / f"stage 3-{name}")
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deepspeed")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[Any, Any]]:
    return spawn(two_ranks, 2, str(folder), timeout_s=280)


@pytest.fixture(scope="module")
def pair(ranks: list[dict[Any, Any]]) -> dict[Any, Any]:
    return ranks[0]


@pytest.fixture(scope="module")
def oracle() -> dict[str, dict[str, Any]]:
    names = (*SMOOTH, *SIGNS)
    return {name: straight_run(new_engine("single", name, dtype=torch.float32), name) for name in names}


def assert_close(run: dict[str, Any], expected: dict[str, Any]) -> None:
    """Losses, gradient norms, weights, m and h, within the rounding of float32; `run` may be the end of `expected`."""
    for what in ("losses", "norms"):
        assert run[what] == pytest.approx(expected[what][-len(run[what]) :], rel=2e-6), what
    for part in PARTS:
        scale = max(float(value.abs().max()) for key, value in expected["state"].items() if key.startswith(part))
        assert largest_difference(run["state"], expected["state"], part) <= 2e-6 * scale, part
        # a square is twice as far off as what is squared
        assert relative_distance(run["state"], expected["state"], part) <= (1.5e-6 if part == "exp_avg_sq/" else 1e-6), part


def relative_distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], prefix: str) -> float:
    """Length of the difference over that of `other`, over all tensors whose names begin with `prefix`."""
    names = [name for name in other if name.startswith(prefix)]
    difference = sum(float((one[name].double() - other[name].double()).square().sum()) for name in names)
    return (difference / sum(float(other[name].double().square().sum()) for name in names)) ** 0.5


@pytest.mark.parametrize(("variant", "name"), RUNS)
def test_two_ranks_equal_single(variant: str, name: str, pair: dict[Any, Any], oracle: dict[str, Any]) -> None:
    assert_close(pair[variant, name], oracle[name])


@pytest.mark.parametrize("variant", PLAIN)
def test_every_rank_stops_before_curvature_of_one_that_is_not_finite(variant: str, ranks: list[dict[Any, Any]]) -> None:
    assert [found["poisoned", variant] for found in ranks] == ["curvature at step 4"] * 2


@pytest.mark.parametrize("variant", PLAIN)
def test_the_first_step_is_made_with_a_rho_that_was_measured(variant: str, pair: dict[Any, Any]) -> None:
    single = straight_run(new_engine("single", "steered sophia", dtype=torch.float32), "steered sophia")["first"]
    assert pair["steered", variant] == pytest.approx(single, rel=1e-3)
    assert single["unclipped_fraction"] == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize(("variant", "name"), SIGN_RUNS)
def test_optimizers_of_signs_follow_single(variant: str, name: str, pair: dict[Any, Any], oracle: dict[str, Any]) -> None:
    """Rounding turns around some steps, and each differs by two learning rates: the first losses are equal, the last ones close."""
    assert pair[variant, name]["losses"][:2] == pytest.approx(oracle[name]["losses"][:2], rel=1e-4)
    assert pair[variant, name]["losses"] == pytest.approx(oracle[name]["losses"], rel=0.02)


@pytest.mark.parametrize("variant", PLAIN)
def test_bf16_is_fsdps(variant: str, pair: dict[Any, Any]) -> None:
    """Weights start as they were, not rounded; gradients are accumulated and reduced in fp32."""
    first = {f"param/{name}": value for name, value in tiny_llama(torch.float32).named_parameters()}
    assert all(torch.equal(pair["state at first", variant][key], value) for key, value in first.items())
    run, expected = pair["bf16", variant], pair["fsdp", "bf16"]
    assert run["losses"] == pytest.approx(expected["losses"], rel=2e-3)
    for part in PARTS:
        scale = max(float(value.abs().max()) for key, value in expected["state"].items() if key.startswith(part))
        assert largest_difference(run["state"], expected["state"], part) <= 0.02 * scale, part


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("variant", PLAIN)
def test_resuming_at_the_same_world_size_changes_no_bit(variant: str, name: str, pair: dict[Any, Any]) -> None:
    resumed, straight = pair["resumed", variant, f"{variant}-{name}"], pair[variant, name]
    assert resumed["losses"] == straight["losses"][SAVED_AT:]
    assert resumed["norms"] == straight["norms"][SAVED_AT:]
    assert largest_difference(resumed["state"], straight["state"]) == 0


@pytest.mark.parametrize(("variant", "name"), SOURCES_OF_FSDP)
def test_checkpoints_of_fsdp_continue(variant: str, name: str, pair: dict[Any, Any], oracle: dict[str, Any]) -> None:
    assert_close(pair["resumed", variant, f"fsdp-{name}"], oracle[name])


@pytest.mark.parametrize(("variant", "name"), RUNS)
@pytest.mark.usefixtures("ranks")
def test_checkpoints_continue_on_single(variant: str, name: str, folder: Path, oracle: dict[str, Any]) -> None:
    engine = new_engine("single", name, dtype=torch.float32)
    assert_close(resumed_run(engine, name, folder / f"{variant}-{name}"), oracle[name])


def test_checkpoints_continue_on_fsdp(pair: dict[Any, Any], oracle: dict[str, Any]) -> None:
    assert_close(pair["fsdp after deepspeed"], oracle["smooth sophia"])


@pytest.mark.usefixtures("ranks")
def test_checkpoints_continue_on_one_rank_at_any_stage(folder: Path, oracle: dict[str, Any]) -> None:
    for (_, name), run in spawn(one_rank, 1, str(folder))[0].items():
        assert_close(run, oracle[name])


@pytest.mark.parametrize(("variant", "name"), RUNS)
def test_state_bytes_per_rank(variant: str, name: str, ranks: list[dict[Any, Any]]) -> None:
    num_parameters = sum(parameter.numel() for parameter in tiny_llama().parameters())
    for results in ranks:
        assert results[variant, name, "bytes"] == pytest.approx(2 * num_parameters * 4 / 2, rel=0.02)


@pytest.mark.parametrize("variant", PLAIN)
def test_exports_are_the_same_folder(variant: str, ranks: list[dict[Any, Any]], folder: Path) -> None:
    new_engine("single", "smooth sophia", dtype=torch.float32).export(folder / "export-single", tokenizer=tokenizer())
    assert digests(folder / f"export-{variant}") == digests(folder / "export-single")
    with torch.no_grad():
        expected = answer_logits(tiny_llama(torch.float32), probe_batch())
    for results in ranks:
        torch.testing.assert_close(results["logits", variant], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "fsdp", "zero_stage": 2}, "zero_stage belongs to deepspeed, got engine fsdp"),
        ({"name": "ddp", "offload": "all"}, "offload belongs to fsdp and deepspeed, got engine ddp"),
        ({"name": "fsdp", "offload": "optimizer"}, "fsdp offloads all or nothing"),
        ({"name": "deepspeed", "zero_stage": 2, "offload": "all"}, "zero_stage 2 offloads the optimizer only"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**settings)
    assert EngineConfig(name="deepspeed").stage == 3


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(InputError, match=r"needs the deepspeed package.*Install it, or use --engine fsdp"):
        deepspeed_engine.import_deepspeed(has_gpu=False)


def test_other_engines_do_not_import_deepspeed() -> None:
    code = "import sys, soul.train.engines; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
