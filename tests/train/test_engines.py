"""Every engine computes what `single` computes: losses, weights, momentum and curvature, exports and checkpoints, on 1 and 2 ranks.

One spawn runs everything that needs two ranks; the tests read its results. Unless a test says otherwise `single` takes a step at once
and two ranks take it row by row, so that what is compared has been cut as differently as can be.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from soul.batch import collate
from soul.models.hashes import RECORD
from soul.models.load import load_model
from soul.models.scoring import answer_logits
from soul.models.tiny import tiny_tokenizer
from soul.records import InputError
from soul.train.engine import EngineConfig, unwrap
from soul.train.engines import ENGINES, make_engine
from soul.train.job import state_bytes
from soul.train.loop import Progress
from tests.distributed import spawn
from tests.train.engine_runs import (
    CLIP,
    NUM_STEPS,
    OPTIMIZERS,
    cut_run,
    full_state,
    largest_difference,
    new_engine,
    poisoned_run,
    ragged_stores,
    resumed_run,
    run_steps,
    straight_run,
    summary,
    tiny_llama,
)

DISTRIBUTED = [name for name in ENGINES if name not in ("single", "deepspeed")]  # deepspeed has no float64: test_deepspeed.py
EXACT = 1e-12
DTYPES = {"as it is": None, "bf16": torch.bfloat16}


def tokenizer() -> Any:
    return tiny_tokenizer(["a b c"], 300)


def digests(folder: Path) -> dict[str, str]:
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir()) if path.name != RECORD}
    record = json.loads((folder / RECORD).read_text())
    assert {name: sha256 for name, (_, sha256) in record.items()} == found  # whichever engine wrote it
    return found


def probe_batch() -> Any:
    stores = ragged_stores()
    return collate([("forget", stores["forget"].row(i)) for i in range(4)], pad_id=0)


@torch.no_grad()
def probe_logits(model: nn.Module) -> torch.Tensor:
    return answer_logits(model, probe_batch()).clone()


def one_micro_batch_loss(model: nn.Module, rank: int) -> torch.Tensor:
    stores = ragged_stores()
    return answer_logits(model, collate([("forget", stores["forget"].row(rank))], pad_id=0)).square().sum()


def refuse() -> nn.Module:
    raise InputError("model folder nowhere does not exist.")


def two_ranks(rank: int, world: int, folder: str) -> dict[Any, Any]:
    """Everything below that needs two ranks; rank 0 returns tensors, rank 1 what concerns it."""
    root = Path(folder)
    results: dict[Any, Any] = {}
    for name in DISTRIBUTED:
        for optimizer in OPTIMIZERS:
            key = (name, optimizer)
            results["straight", *key] = straight_run(
                new_engine(name, optimizer, rank=rank, world=world), optimizer, root / f"{name}-{optimizer}-2"
            )
            for source in (f"{name}-{optimizer}-2", f"single-{optimizer}-1"):
                engine = new_engine(name, optimizer, rank=rank, world=world)
                results["resumed", source, *key] = resumed_run(engine, optimizer, root / source)
        for micro_batch in (1, 2, 4):
            results["cut", name, micro_batch] = cut_run(new_engine(name, "steered sophia", rank=rank, world=world), micro_batch)
        results["poisoned", name] = poisoned_run(new_engine(name, "smooth sophia", rank=rank, world=world))
        results |= {("float32", name, key): value for key, value in float32_runs(name, rank, world).items()}
        results |= {("pieces", name, key): value for key, value in pieces(name, rank, world, root).items()}
    results["refused"] = refused_on(rank, world)
    return results


def float32_runs(name: str, rank: int, world: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for precision in ("fp32", "bf16"):
        engine = new_engine(name, "sophia", rank=rank, world=world, dtype=torch.float32, precision=precision)
        results[precision] = straight_run(engine, "sophia", micro_batch=3)
        results["state bytes"] = state_bytes(engine)
        results["parameters"] = sum(parameter.numel() for parameter in engine.model.parameters())
    return results


def pieces(name: str, rank: int, world: int, root: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    engine = new_engine(name, "sophia", rank=rank, world=world)
    for label, dtype in DTYPES.items():
        engine.export(root / f"export-{name}-{label}", tokenizer=tokenizer(), dtype=dtype)
    results["logits"] = probe_logits(engine.model)
    results["state after a forward"] = full_state(engine)  # the root's parameters are whole now: their names must still lead to state

    engine.backward(one_micro_batch_loss(engine.model, rank), last=False)
    gradient = next(unwrap(engine.model).parameters()).grad
    results["gradient before the last"] = None if name == "fsdp" else gradient.clone()  # type: ignore[union-attr]
    engine.backward(one_micro_batch_loss(engine.model, rank + world), last=True)
    gradient = next(unwrap(engine.model).parameters()).grad
    results["gradient"] = gradient.full_tensor() if name == "fsdp" else gradient.clone()  # type: ignore[union-attr, operator]
    results["sum over ranks"] = engine.all_reduce_sum(torch.tensor([1 + rank])).tolist()

    checkpointed = new_engine(name, "sophia", rank=rank, world=world, gradient_checkpointing=True)
    results["checkpointed"] = summary(checkpointed, run_steps(checkpointed, "sophia", Progress(), NUM_STEPS))

    loaded = make_engine(EngineConfig(name=name, device="cpu", num_workers=world), rank=rank, world=world, local_rank=rank)  # type: ignore[arg-type]
    loaded.prepare(
        lambda: load_model(str(root / "export-single-as it is"), dtype=torch.float64),
        lambda model: OPTIMIZERS["sophia"].build(model.named_parameters()),
    )
    results["logits of the loaded"] = probe_logits(loaded.model)
    return results


def refused_on(rank: int, world: int) -> str:
    engine = make_engine(EngineConfig(name="fsdp", device="cpu", num_workers=world), rank=rank, world=world, local_rank=rank)
    with pytest.raises(InputError) as caught:
        engine.prepare(refuse, lambda model: torch.optim.SGD(model.parameters()))
    return str(caught.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def oracle(folder: Path) -> dict[str, dict[str, Any]]:
    """`single`'s runs; leaves its checkpoints and exports."""
    engine = new_engine("single", "sophia")
    for label, dtype in DTYPES.items():
        engine.export(folder / f"export-single-{label}", tokenizer=tokenizer(), dtype=dtype)
    return {
        optimizer: straight_run(new_engine("single", optimizer), optimizer, folder / f"single-{optimizer}-1") for optimizer in OPTIMIZERS
    }


@pytest.fixture(scope="module")
def ranks(folder: Path, oracle: dict[str, Any]) -> list[dict[Any, Any]]:
    results: list[dict[Any, Any]] = spawn(two_ranks, 2, str(folder), timeout_s=240)
    return results


@pytest.fixture(scope="module")
def pair(ranks: list[dict[Any, Any]]) -> dict[Any, Any]:
    return ranks[0]


def assert_same_run(run: dict[str, Any], reference: dict[str, Any], *, tail: bool = False) -> None:
    """Equal up to float64 rounding. `tail`: the run resumed, so its steps are the reference's last ones."""
    first = NUM_STEPS - len(run["losses"])
    assert (first > 0) == tail
    assert run["losses"] == pytest.approx(reference["losses"][first:], abs=EXACT)
    assert run["norms"] == pytest.approx(reference["norms"][first:], abs=EXACT * 100)
    for part in ("param/", "exp_avg/", "exp_avg_sq/"):
        assert largest_difference(run["state"], reference["state"], part) < EXACT, part


def assert_bit_equal(run: dict[str, Any], reference: dict[str, Any]) -> None:
    assert run["losses"] == reference["losses"][-len(run["losses"]) :]
    assert largest_difference(run["state"], reference["state"]) == 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_oracle_run_clips_and_moves_everything(optimizer: str, oracle: dict[str, Any]) -> None:
    assert min(oracle[optimizer]["norms"]) > CLIP
    start = dict(tiny_llama().named_parameters())
    moved = {name: float((oracle[optimizer]["state"][f"param/{name}"] - value).detach().abs().max()) for name, value in start.items()}
    assert min(moved.values()) > 1e-5
    assert min(float(value.max()) for key, value in oracle[optimizer]["state"].items() if key.startswith("exp_avg_sq/")) > 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", DISTRIBUTED)
def test_two_ranks_equal_single(name: str, optimizer: str, pair: dict[Any, Any], oracle: dict[str, Any]) -> None:
    assert_same_run(pair["straight", name, optimizer], oracle[optimizer])


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", DISTRIBUTED)
def test_one_rank_equals_single(name: str, optimizer: str, oracle: dict[str, Any]) -> None:
    assert_same_run(straight_run(new_engine(name, optimizer), optimizer), oracle[optimizer])


@pytest.fixture(scope="module")
def uncut() -> dict[str, Any]:
    """Steps of eight rows at once."""
    return cut_run(new_engine("single", "steered sophia"), 8)


def assert_same_cut(run: dict[str, Any], uncut: dict[str, Any]) -> None:
    assert run["losses"] == pytest.approx(uncut["losses"], abs=EXACT)
    for part in ("param/", "exp_avg/", "exp_avg_sq/"):
        assert largest_difference(run["state"], uncut["state"], part) < EXACT, part


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_curvature_and_weights_do_not_depend_on_the_micro_batch(micro_batch: int, uncut: dict[str, Any]) -> None:
    assert_same_cut(cut_run(new_engine("single", "steered sophia"), micro_batch), uncut)


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize("name", DISTRIBUTED)
def test_nor_on_the_micro_batch_and_the_number_of_ranks(name: str, micro_batch: int, pair: dict[Any, Any], uncut: dict[str, Any]) -> None:
    assert_same_cut(pair["cut", name, micro_batch], uncut)


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_every_rank_stops_before_curvature_of_one_that_is_not_finite(name: str, ranks: list[dict[Any, Any]]) -> None:
    assert [found["poisoned", name] for found in ranks] == ["curvature at step 4"] * 2


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_the_first_step_is_made_with_a_rho_that_was_measured(name: str, pair: dict[Any, Any], uncut: dict[str, Any]) -> None:
    for run in (uncut, pair["cut", name, 2]):
        assert run["first"]["unclipped_fraction"] == pytest.approx(0.3, abs=0.01)
    assert pair["cut", name, 2]["first"]["rho"] == pytest.approx(uncut["first"]["rho"], rel=1e-9)


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_gradient_checkpointing_changes_nothing(name: str, pair: dict[Any, Any], oracle: dict[str, Any]) -> None:
    assert_same_run(pair["pieces", name, "checkpointed"], oracle["sophia"])


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_gradients_are_sums_over_ranks_and_micro_batches(name: str, ranks: list[dict[Any, Any]]) -> None:
    model = tiny_llama()
    sum(one_micro_batch_loss(model, row) for row in range(4)).backward()  # type: ignore[union-attr]
    expected = next(model.parameters()).grad
    for results in ranks:
        torch.testing.assert_close(results["pieces", name, "gradient"], expected, rtol=1e-12, atol=1e-12)
        assert results["pieces", name, "sum over ranks"] == [3]


def test_ddp_reduces_only_with_the_last_micro_batch(ranks: list[dict[Any, Any]]) -> None:
    first, second = (results["pieces", "ddp", "gradient before the last"] for results in ranks)
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", DISTRIBUTED)
def test_resuming_on_as_many_ranks_is_bit_equal(name: str, optimizer: str, pair: dict[Any, Any]) -> None:
    assert_bit_equal(pair["resumed", f"{name}-{optimizer}-2", name, optimizer], pair["straight", name, optimizer])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resuming_single_is_bit_equal(optimizer: str, oracle: dict[str, Any], folder: Path) -> None:
    resumed = resumed_run(new_engine("single", optimizer), optimizer, folder / f"single-{optimizer}-1")
    assert_bit_equal(resumed, oracle[optimizer])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", DISTRIBUTED)
def test_one_rank_hands_over_to_two(name: str, optimizer: str, pair: dict[Any, Any], oracle: dict[str, Any]) -> None:
    assert_same_run(pair["resumed", f"single-{optimizer}-1", name, optimizer], oracle[optimizer], tail=True)


def back_on_two(rank: int, world: int, folder: str) -> dict[str, Any]:
    engine = new_engine("fsdp", "sophia", rank=rank, world=world)
    return summary(engine, run_steps(engine, "sophia", Progress(**engine.load(Path(folder))), NUM_STEPS))


@pytest.mark.usefixtures("ranks")
def test_two_ranks_hand_over_to_one_and_that_to_two(oracle: dict[str, Any], folder: Path) -> None:
    """Each with another micro-batch: row by row on two, the step at once on one."""
    engine = new_engine("single", "sophia")
    progress = Progress(**engine.load(folder / "fsdp-sophia-2"))
    run_steps(engine, "sophia", progress, NUM_STEPS - 2)
    engine.save(folder / "between", progress.to_json())
    assert_same_run(spawn(back_on_two, 2, str(folder / "between"), timeout_s=120)[0], oracle["sophia"], tail=True)


@pytest.mark.usefixtures("group_of_one", "ranks")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_shards_hand_over_to_single_and_that_to_ddp(optimizer: str, oracle: dict[str, Any], folder: Path) -> None:
    engine = new_engine("single", optimizer)
    progress = Progress(**engine.load(folder / f"fsdp-{optimizer}-2"))
    first = run_steps(engine, optimizer, progress, NUM_STEPS - 2)
    engine.save(folder / f"relay-{optimizer}", progress.to_json())
    engine = new_engine("ddp", optimizer)
    last = run_steps(engine, optimizer, Progress(**engine.load(folder / f"relay-{optimizer}")), NUM_STEPS)
    assert_same_run(summary(engine, first + last), oracle[optimizer], tail=True)


@pytest.mark.usefixtures("ranks")
@pytest.mark.parametrize("label", DTYPES)
@pytest.mark.parametrize("name", DISTRIBUTED)
def test_exports_are_the_same_folder(name: str, label: str, folder: Path) -> None:
    expected = digests(folder / f"export-single-{label}")
    assert "model.safetensors" in expected
    assert digests(folder / f"export-{name}-{label}") == expected


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_every_rank_scores_like_single(name: str, ranks: list[dict[Any, Any]], folder: Path) -> None:
    loaded = probe_logits(load_model(str(folder / "export-single-as it is"), dtype=torch.float64))
    for results in ranks:
        torch.testing.assert_close(results["pieces", name, "logits"], probe_logits(tiny_llama()), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(results["pieces", name, "logits of the loaded"], loaded, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_full_state_is_whole_after_a_forward_without_backward(name: str, pair: dict[Any, Any]) -> None:
    assert largest_difference(pair["pieces", name, "state after a forward"], full_state(new_engine("single", "sophia"))) == 0


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_float32_losses_equal_single(name: str, pair: dict[Any, Any]) -> None:
    reference = straight_run(new_engine("single", "sophia", dtype=torch.float32), "sophia", micro_batch=3)
    assert pair["float32", name, "fp32"]["losses"] == pytest.approx(reference["losses"], rel=1e-5)


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_bf16_computes_in_bf16_and_keeps_weights_and_state_in_fp32(name: str, pair: dict[Any, Any]) -> None:
    coarse, fine = pair["float32", name, "bf16"], pair["float32", name, "fp32"]
    assert {tensor.dtype for tensor in coarse["state"].values()} == {torch.float32}
    assert coarse["losses"] == pytest.approx(fine["losses"], rel=0.1)
    assert coarse["losses"][0] != pytest.approx(fine["losses"][0], rel=1e-5)
    moments = [tensor for key, tensor in coarse["state"].items() if key.startswith("exp_avg/")]
    assert any((tensor != tensor.bfloat16()).any() for tensor in moments)  # sums over ranks were not rounded either


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_state_bytes_per_rank(name: str, ranks: list[dict[Any, Any]]) -> None:
    num_parameters = sum(parameter.numel() for parameter in tiny_llama().parameters())
    expected = 2 * num_parameters * 4 / (2 if ENGINES[name].sharded else 1)
    for results in ranks:
        assert results["float32", name, "parameters"] == num_parameters
        assert results["float32", name, "state bytes"] == pytest.approx(expected, rel=0.02)


def test_bad_input_on_rank_zero_is_refused_on_every_rank(ranks: list[dict[Any, Any]]) -> None:
    assert [results["refused"] for results in ranks] == ["model folder nowhere does not exist."] * 2


def test_single_refuses_several_ranks() -> None:
    with pytest.raises(InputError, match="1 worker, got 2"):
        make_engine(EngineConfig(name="single"), rank=0, world=2, local_rank=0)


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_a_missing_process_group_is_named(name: str) -> None:
    assert not dist.is_initialized()
    with pytest.raises(AssertionError, match="needs a process group"):
        make_engine(EngineConfig(name=name), rank=0, world=1, local_rank=0)  # type: ignore[arg-type]


@pytest.mark.usefixtures("group_of_one")
def test_a_wrong_rank_is_named() -> None:
    with pytest.raises(AssertionError, match="rank 1 of 2, the process group says rank 0 of 1"):
        make_engine(EngineConfig(name="ddp"), rank=1, world=2, local_rank=1)
