"""Adapters: nothing at first, the only thing trained and kept, alike on every engine, and one set of weights again in the export."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import FileSystemReader

from soul.batch import collate
from soul.config import Config
from soul.models.load import load_model
from soul.models.scoring import answer_logits, answer_logps
from soul.models.stored import in_memory, stored_model
from soul.records import InputError
from soul.train.engine import EngineConfig
from soul.train.engines import make_engine
from soul.train.lora import add_adapters, add_stored_adapters
from soul.train.reference import score_rows
from tests.distributed import spawn
from tests.train.engine_runs import CLIP, CONFIGS, full_state, largest_difference, ragged_stores, resumed_run, straight_run, tiny_llama
from tests.train.test_engines import probe_batch, tokenizer
from tests.train.test_families import FAMILIES, assert_same_ties, family, ragged_batch

pytest.importorskip("peft")
OPTIMIZER, LINEARS, RANK = "smooth sophia", 7 * 3, 2
ENGINES: dict[str, dict[str, Any]] = {"ddp": {}, "fsdp": {}, "deepspeed": {"zero_stage": 2}, "deepspeed 3": {"zero_stage": 3}}


def adapted(*, moved: bool = False) -> nn.Module:
    """The tests' Llama with adapters; `moved`: with other adapters than those it starts with."""
    model = add_adapters(tiny_llama(torch.float32), RANK, seed=4)
    for parameter in model.parameters() if moved else ():
        if parameter.requires_grad:
            nn.init.constant_(parameter, 0.01)
    return model


def engine_of(name: str, rank: int = 0, world: int = 1, *, build: Callable[[], nn.Module] = adapted) -> Any:
    settings = ENGINES.get(name, {})
    config = EngineConfig(name=name.split()[0], device="cpu", num_workers=world, max_grad_norm=CLIP, **settings)  # type: ignore[arg-type]
    engine = make_engine(config, rank=rank, world=world, local_rank=rank)
    engine.prepare(build, lambda model: CONFIGS[OPTIMIZER].build(model.named_parameters()))
    return engine


def trained(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if ".lora_" in name}


def two_ranks(rank: int, world: int, folder: str) -> dict[str, Any]:
    results = {}
    for name in ENGINES:
        engine = engine_of(name, rank, world)
        results[name] = straight_run(engine, OPTIMIZER, Path(folder) / name)
        results[name]["reference"] = score_rows(engine, ragged_stores()["forget"], "forget").tolist()
        engine.export(Path(folder) / f"export-{name}", tokenizer=tokenizer())
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = spawn(two_ranks, 2, str(folder), timeout_s=240)[0]
    return results


@pytest.fixture(scope="module")
def oracle(folder: Path) -> dict[str, Any]:
    engine = engine_of("single")
    run = straight_run(engine, OPTIMIZER, folder / "single")
    engine.export(folder / "export-single", tokenizer=tokenizer())
    with torch.no_grad():
        return run | {"logits": answer_logits(engine.model, probe_batch()).clone()}


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_of_every_family_are_nothing_at_first_and_cover_the_blocks(name: str, tmp_path: Path) -> None:
    plain, batch = family(name), ragged_batch()
    with torch.no_grad():
        expected = answer_logits(plain, batch)
        model = add_adapters(plain, RANK, seed=0)
        torch.testing.assert_close(answer_logits(model, batch), expected)
    names = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert names and all(".lora_" in key for key in names)


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_of_a_stored_model_are_those_of_the_loaded_one(name: str, tmp_path: Path) -> None:
    family(name).save_pretrained(tmp_path)  # type: ignore[operator]
    stored, state = stored_model(str(tmp_path)), torch.get_rng_state()
    if stored is None:
        pytest.skip("transformers converts its weights")
    found = add_stored_adapters(stored, RANK, seed=3)
    assert torch.equal(torch.get_rng_state(), state) and all(parameter.is_meta for parameter in found.skeleton.parameters())
    loaded = add_adapters(load_model(str(tmp_path)), RANK, seed=3)
    assert list(found.weights) == [key for key, _ in loaded.named_parameters()] and len(found.weights) == len(list(found.weights))
    model = in_memory(found)
    assert_same_ties(model, loaded)
    for (key, one), (other_key, other) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert key == other_key and torch.equal(one, other) and one.requires_grad == other.requires_grad, key
    with torch.no_grad():
        assert torch.equal(answer_logits(model, ragged_batch()), answer_logits(loaded, ragged_batch()))


def test_only_adapters_are_trained(oracle: dict[str, Any]) -> None:
    start = dict(adapted().named_parameters())
    moved = {key for key, value in start.items() if not torch.equal(oracle["state"][f"param/{key}"], value)}
    assert len(moved) == 2 * LINEARS and all(".lora_" in key for key in moved)


@pytest.mark.parametrize("name", ["single", *ENGINES])
@pytest.mark.usefixtures("runs", "oracle")
def test_only_adapters_are_in_checkpoints(name: str, folder: Path) -> None:
    names = FileSystemReader(folder / name).read_metadata().state_dict_metadata
    weights = [key for key in names if key.startswith("model/")]
    assert len(weights) == 2 * LINEARS and all(".lora_" in key for key in names)
    assert json.loads((folder / name / "extra.json").read_text())["step"] == 2


@pytest.mark.parametrize("name", ENGINES)
def test_two_ranks_equal_single(name: str, runs: dict[str, Any], oracle: dict[str, Any]) -> None:
    assert runs[name]["losses"] == pytest.approx(oracle["losses"], rel=2e-6)
    one, other = trained(runs[name]["state"]), trained(oracle["state"])
    for part in ("param/", "exp_avg/", "exp_avg_sq/"):
        scale = max(float(value.abs().max()) for key, value in other.items() if key.startswith(part))
        assert largest_difference(one, other, part) <= 5e-6 * scale, part


@pytest.mark.parametrize("name", ENGINES)
def test_the_reference_is_the_model_without_its_trained_adapters(name: str, runs: dict[str, Any]) -> None:
    model, rows = tiny_llama(torch.float32), ragged_stores()["forget"].rows()
    with torch.no_grad():
        expected = [float(answer_logps(model, collate([("forget", row)], pad_id=0)).sum_B()) for row in rows]
    assert runs[name]["reference"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["single", *ENGINES])
@pytest.mark.usefixtures("runs")
def test_checkpoints_continue_on_single(name: str, folder: Path, oracle: dict[str, Any]) -> None:
    run = resumed_run(engine_of("single", build=lambda: adapted(moved=True)), OPTIMIZER, folder / name)
    assert run["losses"] == pytest.approx(oracle["losses"][2:], rel=0 if name == "single" else 2e-6)


@pytest.mark.parametrize("name", ["single", *ENGINES])
@pytest.mark.usefixtures("runs")
def test_the_export_is_one_plain_model(name: str, folder: Path, oracle: dict[str, Any]) -> None:
    model = load_model(str(folder / f"export-{name}"))
    # the tests' Llama has torch's norms, which transformers' loader replaces by its own: equal up to rounding
    assert {key for key, _ in model.named_parameters()} == {key for key, _ in tiny_llama().named_parameters()}
    with torch.no_grad():
        torch.testing.assert_close(answer_logits(model, probe_batch()), oracle["logits"], rtol=1e-4, atol=1e-4)
        assert (oracle["logits"] - answer_logits(tiny_llama(torch.float32), probe_batch())).abs().max() > 1e-2


def test_transposed_layers_merge_too(tmp_path: Path) -> None:
    model = add_adapters(family("gpt2"), RANK, seed=0)
    engine = engine_of("single", build=lambda: model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    engine.export(tmp_path / "export", tokenizer=tokenizer())
    with torch.no_grad():
        loaded = answer_logits(load_model(str(tmp_path / "export")), ragged_batch())
        torch.testing.assert_close(loaded, answer_logits(model, ragged_batch()), rtol=1e-4, atol=1e-4)
    assert full_state(engine)


def test_deepspeed_in_bf16_is_refused() -> None:
    values = {"train": {"lora_rank": 4}, "engine": {"name": "deepspeed", "precision": "bf16"}}
    with pytest.raises(ValueError, match="lora_rank under deepspeed in bf16 would round the weights"):
        Config.model_validate(values)
    assert Config.model_validate({**values, "engine": "fsdp"}).train.lora_rank == 4


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_peft(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "peft":
            raise ImportError("No module named 'peft'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(InputError, match=r"--lora-rank needs the peft package.*soul-unlearning\[peft\]"):
        add_adapters(tiny_llama(), RANK, seed=0)
