"""Every engine, alone on a GPU, computes what `single` computes on the CPU: losses, weights, momentum, curvature, reference, checkpoints.

In float32 without TF32 what differs is the order of sums; the optimizers' steps are smooth, so that rounding stays rounding. bf16 is held
to a few percent.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from soul.device import Device, torch_device
from soul.objectives.methods import NPO
from soul.optim.configs import OneShotConfig
from soul.optim.curvature import label_uniforms, probe_signs, sample_labels
from soul.train import objective
from soul.train.engine import Engine
from soul.train.loop import Progress
from soul.train.reference import score_rows
from tests.devices import DEVICES, exact_products, rank_of_one
from tests.train import engine_runs
from tests.train.engine_runs import (
    SMOOTH,
    VOCAB,
    full_state,
    largest_difference,
    new_engine,
    ragged_stores,
    resumed_run,
    run_steps,
    straight_run,
    summary,
    tiny_llama,
)

ENGINES: dict[str, dict[str, Any]] = {
    "single": {},
    "ddp": {},
    "fsdp": {},
    "fsdp, offloaded": {"offload": "all"},
    "zero 2": {"zero_stage": 2},
    "zero 3": {"zero_stage": 3},
    "zero 3, offloaded": {"zero_stage": 3, "offload": "all"},
}
PARTS = ("param/", "exp_avg/", "exp_avg_sq/")
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LOSSES, STATE = 1e-4, 1e-3  # relative; of the largest number of its kind
ROUNDED = 0.05


@pytest.fixture(params=DEVICES, scope="module")  # DeepSpeed remembers the first process group it meets
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    before = {name: os.environ.get(name) for name in LAUNCHER}
    with exact_products(), rank_of_one(request.param), pytest.MonkeyPatch.context() as patch:
        patch.setitem(engine_runs.METHODS, "smooth sophia", NPO(retain_weight=0.7))
        yield request.param
    assert before == {name: os.environ.get(name) for name in LAUNCHER}


@pytest.fixture(autouse=True)
def launcher() -> Iterator[None]:
    """What DeepSpeed looks for, and leaves, in the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(LAUNCHER, ("0", "0", "1", "1", "127.0.0.1", "29500"), strict=True):
            patch.setenv(name, value)
        yield


def engine_of(label: str, optimizer: str, device: Device, precision: str = "fp32") -> Engine:
    name = "deepspeed" if label.startswith("zero") else label.partition(",")[0]
    if name == "deepspeed":
        pytest.importorskip("deepspeed")
    engine = new_engine(name, optimizer, dtype=torch.float32, device=device, precision=precision, **ENGINES[label])
    assert engine.device.type == torch_device(device).type
    return engine


def three_steps(engine: Engine, optimizer: str) -> dict[str, Any]:
    return summary(engine, run_steps(engine, optimizer, Progress(), 3))


def agree(found: dict[str, Any], wanted: dict[str, Any], *, losses: float = LOSSES, state: float = STATE) -> None:
    assert found["losses"] == pytest.approx(wanted["losses"], rel=losses)
    assert found["norms"] == pytest.approx(wanted["norms"], rel=10 * losses)
    for part in PARTS:
        size = max(float(value.abs().max()) for key, value in wanted["state"].items() if key.startswith(part))
        assert largest_difference(found["state"], wanted["state"], part) < state * size, part


@pytest.mark.parametrize("optimizer", SMOOTH)
@pytest.mark.parametrize("label", ENGINES)
def test_an_engine_on_a_gpu_computes_what_the_cpu_does(label: str, optimizer: str, device: Device) -> None:
    wanted = three_steps(engine_of("single", optimizer, "cpu"), optimizer)
    agree(three_steps(engine_of(label, optimizer, device), optimizer), wanted)
    if optimizer == "smooth sophia":
        assert max(float(value.abs().max()) for key, value in wanted["state"].items() if key.startswith("exp_avg_sq/")) > 1e-4


@pytest.mark.parametrize("optimizer", SMOOTH)
@pytest.mark.parametrize("label", [label for label in ENGINES if "offloaded" not in label])
def test_bf16_on_a_gpu_is_the_cpus_float32_rounded(label: str, optimizer: str, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The curvature's labels are given: where one is drawn on the edge of two, rounding decides, and few of them make up h here."""
    monkeypatch.setattr(objective, "sample_labels", lambda logits_NV, uniforms_N: (uniforms_N * VOCAB).long().to(logits_NV.device))
    start = {f"param/{name}": value.detach() for name, value in tiny_llama(torch.float32).named_parameters()}
    wanted = three_steps(engine_of("single", optimizer, "cpu"), optimizer)
    found = three_steps(engine_of(label, optimizer, device, "bf16"), optimizer)
    assert found["losses"] == pytest.approx(wanted["losses"], rel=ROUNDED)
    moves = [torch.cat([(run["state"][key] - value).flatten() for key, value in start.items()]) for run in (found, wanted)]
    assert float(torch.cosine_similarity(*moves, dim=0)) > 1 - ROUNDED


@pytest.mark.parametrize("label", ["single", "fsdp", "zero 3"])
@pytest.mark.parametrize("written_on", ["the device", "the cpu"])
@pytest.mark.parametrize("optimizer", SMOOTH)
def test_a_checkpoint_goes_from_one_kind_of_device_to_the_other(
    label: str, optimizer: str, written_on: str, device: Device, tmp_path: Path
) -> None:
    places: tuple[Device, Device] = (device, "cpu") if written_on == "the device" else ("cpu", device)
    labels = (label, "single") if written_on == "the device" else ("single", label)
    wanted = straight_run(engine_of(labels[0], optimizer, places[0]), optimizer, tmp_path / "saved")
    found = resumed_run(engine_of(labels[1], optimizer, places[1]), optimizer, tmp_path / "saved")
    agree(found, {key: value if key == "state" else value[-len(found[key]) :] for key, value in wanted.items()})


@pytest.mark.parametrize("label", ["single", "ddp", "fsdp", "zero 3"])
def test_reference_log_probabilities_are_the_cpus(label: str, device: Device) -> None:
    store = ragged_stores()["forget"]
    wanted = score_rows(engine_of("single", "smooth adamw", "cpu"), store, "forget")
    found = score_rows(engine_of(label, "smooth adamw", device), store, "forget")
    assert found == pytest.approx(wanted, rel=1e-5)


def test_labels_and_probes_are_the_same_draws_everywhere(device: Device) -> None:
    logits_NV = 3 * torch.randn(700, 61, generator=torch.Generator().manual_seed(1))
    index_B, lengths_B = torch.arange(70), torch.full((70,), 10)
    where = torch_device(device)
    uniforms_N = label_uniforms(index_B.to(where), lengths_B.to(where), seed=3, update=2)
    assert torch.equal(uniforms_N, label_uniforms(index_B, lengths_B, seed=3, update=2))
    found_N = sample_labels(logits_NV.to(where), uniforms_N)
    assert found_N.device.type == where.type and torch.equal(found_N.cpu(), sample_labels(logits_NV, uniforms_N))
    assert probe_signs("x", (5, 7), seed=1, update=1).to(where).cpu().abs().eq(1).all()


@pytest.mark.parametrize("estimator", ["sophia_h", "gnb", "fisher"])
def test_second_order_methods_on_a_gpu(estimator: str, device: Device) -> None:
    from tests.train.test_second_order_ranks import CASES, run

    found = run("single", estimator, torch.float64, device=device, precision="fp32")
    wanted = run("single", estimator, torch.float64, device="cpu", precision="fp32")
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-9)
    for part in PARTS:
        assert largest_difference(found["state"], wanted["state"], part) < 1e-8, part
    assert isinstance(CASES["gnb"][1], OneShotConfig)


def test_what_an_engine_gives_away_is_on_the_cpu(device: Device) -> None:
    engine = engine_of("single", "smooth sophia", device)
    run_steps(engine, "smooth sophia", Progress(), 1)
    assert {value.device.type for value in full_state(engine).values()} == {"cpu"}
