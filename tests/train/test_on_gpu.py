"""Training on a GPU computes what it computes on the CPU: losses, weights, curvature, checkpoints both ways, reference scores.

The same code runs on the CPU as well, slowly marked, so that only what a GPU does is left to a machine that has one. Differences are
relative: of a step's loss, and as a share of the expected tensors' length (of the weights: of how far they have moved). In fp32, TF32
off, both devices add the same numbers in another order. In bf16 the CPU stays in fp32, and what is compared is the direction of the
move: rounded probabilities give some tokens another sampled label, and with a few hundred tokens that shows in Sophia's curvature.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from soul import device as devices
from soul.objectives.methods import NPO
from soul.optim.curvature import label_uniforms, sample_labels
from soul.train.engine import Engine, EngineConfig
from soul.train.engines import make_engine
from soul.train.loop import Hooks, Progress, train
from soul.train.reference import score_rows
from tests.distributed import spawn
from tests.train.engine_runs import CLIP, SMOOTH, STEPS_PER_EPOCH, TRAIN, feed_of, full_state, ragged_stores, tiny_llama

DEVICES = [pytest.param("gpu", marks=pytest.mark.gpu), pytest.param("cpu", marks=pytest.mark.slow)]
PLAIN: dict[str, dict[str, Any]] = {
    "single": {},
    "ddp": {},
    "fsdp": {},
    "deepspeed": {},
    "deepspeed, stage 2": {"zero_stage": 2},
}
OFFLOADED: dict[str, dict[str, Any]] = {"fsdp, offloaded": {"offload": "all"}, "deepspeed, offloaded": {"offload": "all"}}
ENGINES = [*PLAIN, *OFFLOADED]
STEPS, SAVED_AT = 3, 1  # curvature before steps 0 and 2
METHOD = NPO(retain_weight=0.7)
LOSSES = {"fp32": 1e-5, "bf16": 3e-2}
MOVES = 1e-3
BF16_ALIKE = {"smooth adamw": 0.98, "smooth sophia": 0.5}
CURVATURE = 1e-3
SCORES = {"fp32": 1e-5, "bf16": 2e-2}

Run = dict[str, Any]


def engine_of(name: str, optimizer: str, device: str, precision: str) -> Engine:
    settings = {**PLAIN, **OFFLOADED}[name]
    config = EngineConfig(name=name.partition(",")[0], device=device, precision=precision, max_grad_norm=CLIP, **settings)  # type: ignore[arg-type]
    engine = make_engine(config, rank=0, world=1, local_rank=0)
    engine.prepare(lambda: tiny_llama(torch.float32), lambda model: SMOOTH[optimizer].build(model.named_parameters()))
    return engine


def steps(engine: Engine, optimizer: str, progress: Progress, stop: int) -> list[float]:
    losses: list[float] = []
    train(
        engine,
        method=METHOD,
        optimizer=SMOOTH[optimizer],
        config=TRAIN,
        steps=feed_of(engine).steps(progress.step, stop),
        steps_per_epoch=STEPS_PER_EPOCH,
        progress=progress,
        hooks=Hooks(after_step=lambda row: losses.append(row["loss"])),
    )
    return losses


def run(engine: Engine, optimizer: str, save: Path | None = None, load: Path | None = None) -> Run:
    """All steps, from the model or from a checkpoint; `save` is left behind step SAVED_AT."""
    progress, losses = Progress(), []
    if load is not None:
        steps(engine, optimizer, Progress(), 1)  # other weights than the checkpoint's
        progress = Progress(**engine.load(load))
        assert progress.step == SAVED_AT
    if save is not None:
        losses = steps(engine, optimizer, progress, SAVED_AT)
        engine.save(save, progress.to_json())
    losses += steps(engine, optimizer, progress, STEPS)
    return {"losses": losses, "state": full_state(engine)}


def scores(engine: Engine) -> Any:
    return score_rows(engine, ragged_stores()["forget"], "forget")


def on_device(rank: int, world: int, device: str, names: list[str], folder: str) -> dict[Any, Any]:
    """Everything that a device computes, in a process of its own: DeepSpeed and NCCL leave traces."""
    devices.TF32 = "highest"
    found: dict[Any, Any] = {"compute": devices.torch_device(device).type}  # type: ignore[arg-type]
    for name in names:
        for optimizer in SMOOTH:
            saved = Path(folder) / f"{device} {name} {optimizer}"
            found[name, optimizer, "fp32"] = run(engine_of(name, optimizer, device, "fp32"), optimizer, save=saved)
            found[name, optimizer, "bf16"] = run(engine_of(name, optimizer, device, "bf16"), optimizer)
            brought = Path(folder) / f"single {optimizer}"
            found[name, optimizer, "resumed"] = run(engine_of(name, optimizer, device, "fp32"), optimizer, load=brought)
        for precision in SCORES:
            found[name, "scores", precision] = scores(engine_of(name, "smooth adamw", device, precision))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[Any, Any]:
    """`single` on the CPU in fp32."""
    found: dict[Any, Any] = {"start": full_state(engine_of("single", "smooth sophia", "cpu", "fp32"))}
    for optimizer in SMOOTH:
        found[optimizer] = run(engine_of("single", optimizer, "cpu", "fp32"), optimizer, save=folder / f"single {optimizer}")
    found["scores"] = scores(engine_of("single", "smooth adamw", "cpu", "fp32"))
    return found


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(devices.COMPUTE, raising=False)
        yield request.param


@pytest.fixture(scope="module")
def found(device: str, folder: Path, expected: dict[Any, Any]) -> dict[Any, Any]:
    pytest.importorskip("deepspeed")
    backends = {"gpu": ("nccl", "cpu:gloo,cuda:nccl"), "cpu": ("gloo", "gloo")}[device]  # those of soul.orchestration.train
    results: dict[Any, Any] = {}
    for names, backend in zip((list(PLAIN), list(OFFLOADED)), backends, strict=True):
        results |= spawn(on_device, 1, device, names, str(folder), timeout_s=280, backend=backend)[0]
    return results


def moves(state: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([(state[name] - start[name]).double().flatten() for name in sorted(start) if name.startswith("param/")])


def curvature(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([state[name].double().flatten() for name in sorted(state) if name.startswith("exp_avg_sq/")])


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def check(run: Run, wanted: Run, start: dict[str, torch.Tensor]) -> None:
    assert run["losses"] == pytest.approx(wanted["losses"][-len(run["losses"]) :], rel=LOSSES["fp32"])
    assert relative(moves(run["state"], start), moves(wanted["state"], start)) <= MOVES


def test_it_computes_on_the_device_that_it_was_given(found: dict[Any, Any], device: str) -> None:
    assert found["compute"] == {"gpu": "cuda", "cpu": "cpu"}[device]


@pytest.mark.parametrize("optimizer", SMOOTH)
@pytest.mark.parametrize("name", ENGINES)
def test_losses_weights_and_curvature_are_those_of_the_cpu(
    found: dict[Any, Any], expected: dict[Any, Any], name: str, optimizer: str
) -> None:
    run = found[name, optimizer, "fp32"]
    check(run, expected[optimizer], expected["start"])
    assert len(run["losses"]) == STEPS
    assert relative(curvature(run["state"]), curvature(expected[optimizer]["state"])) <= CURVATURE


@pytest.mark.parametrize("optimizer", SMOOTH)
@pytest.mark.parametrize("name", ENGINES)
def test_bf16_is_near(found: dict[Any, Any], expected: dict[Any, Any], name: str, optimizer: str) -> None:
    run, wanted = found[name, optimizer, "bf16"], expected[optimizer]
    assert run["losses"] == pytest.approx(wanted["losses"], rel=LOSSES["bf16"])
    assert run["losses"] != pytest.approx(wanted["losses"], rel=LOSSES["fp32"]), "computed in fp32"
    ours, theirs = (moves(side["state"], expected["start"]) for side in (run, wanted))
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) >= BF16_ALIKE[optimizer]


@pytest.mark.parametrize("optimizer", SMOOTH)
@pytest.mark.parametrize("name", ENGINES)
def test_checkpoints_go_from_one_device_to_the_other(
    found: dict[Any, Any], expected: dict[Any, Any], folder: Path, device: str, name: str, optimizer: str
) -> None:
    check(found[name, optimizer, "resumed"], expected[optimizer], expected["start"])
    back = run(engine_of("single", optimizer, "cpu", "fp32"), optimizer, load=folder / f"{device} {name} {optimizer}")
    check(back, expected[optimizer], expected["start"])


@pytest.mark.parametrize("precision", SCORES)
@pytest.mark.parametrize("name", ENGINES)
def test_reference_scores_are_those_of_the_cpu(found: dict[Any, Any], expected: dict[Any, Any], name: str, precision: str) -> None:
    np.testing.assert_allclose(found[name, "scores", precision], expected["scores"], rtol=SCORES[precision])


def test_the_same_labels_are_drawn(device: str) -> None:
    """Of a vocabulary of real size. Sums in another order move a border by a rounding: a label in ten thousand may be its neighbour."""
    on = devices.torch_device(device)  # type: ignore[arg-type]
    logits_NV = torch.randn(4096, 32000, generator=torch.Generator().manual_seed(0)) * 3
    logits_NV[:, ::7] = float("-inf")
    uniforms_N = label_uniforms(torch.arange(64), torch.full((64,), 64), seed=1, update=2)
    wanted_N, labels_N = sample_labels(logits_NV, uniforms_N), sample_labels(logits_NV.to(on), uniforms_N).cpu()
    assert (wanted_N != labels_N).float().mean() <= 1e-2
    assert torch.isfinite(logits_NV.gather(1, labels_N[:, None])).all(), "an id without probability"
