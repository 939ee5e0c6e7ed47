"""What curvature is an estimate of: repeated rows, the weights of a term, adapters, numbers that are not finite, rho."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import soul.train.curvature
from soul.batch import Batch, collate
from soul.objectives.methods import NPO, GradDiff
from soul.objectives.terms import Term, nll
from soul.optim.configs import OneShotConfig, SophiaConfig
from soul.records import TokenRow
from soul.train.curvature import fold_gauss_newton
from soul.train.engine import Engine, EngineConfig
from soul.train.engines import make_engine
from soul.train.job import run_job
from soul.train.loop import NonFiniteCurvature
from soul.train.lora import add_adapters
from soul.train.objective import Part, token_weights
from soul.train.single import SingleEngine
from tests.distributed import spawn
from tests.train.engine_runs import tiny_llama
from tests.train.loop_runs import ROWS, TRAIN, assert_bit_equal, go, new_run
from tests.train.test_job import folder as folder  # the fixture
from tests.train.test_job import job_in
from tests.train.test_loop import row_logits

SOPHIA = SophiaConfig(learning_rate=1e-3, hessian_every=3)
MANY, FEW = 120, 3  # seeds
ONCE, OFTEN = sorted(range(len(ROWS["retain"])), key=lambda i: ROWS["retain"][i].num_supervised)[:2]  # the shortest answers
COPIES = [ONCE, OFTEN, OFTEN, OFTEN, OFTEN]


def small_engine(name: str = "single", rank: int = 0, world: int = 1) -> Engine:
    def build_model() -> nn.Module:
        model = tiny_llama()
        del model.model.layers[1:]  # type: ignore[union-attr, operator]
        return model

    engine = make_engine(EngineConfig(name=name, num_workers=world, device="cpu"), rank=rank, world=world, local_rank=rank)  # type: ignore[arg-type]
    engine.prepare(build_model, lambda model: SOPHIA.build(model.named_parameters()))
    return engine


def batch_of(numbers: Sequence[int]) -> Batch:
    return collate([("retain", ROWS["retain"][i]) for i in numbers], pad_id=0)


PARTS: list[Part] = [(Term("retain", "retain", "tokens", 1.0, nll), 0.25)]


def mean_trace(engine: Engine, batches: Sequence[Batch], num_seeds: int) -> float:
    """Sum of h over all weights after one update, over its decay, averaged over seeds."""
    traces = []
    for seed in range(num_seeds):
        engine.optimizer.reset_hessian()  # type: ignore[attr-defined]
        fold_gauss_newton(engine, batches, PARTS, seed=seed, update=0)
        traces.append(sum(float(h.double().sum()) for _, hs in engine.optimizer.state_buckets() for h in hs))  # type: ignore[attr-defined]
    return sum(traces) / len(traces) / (1 - SOPHIA.betas[1])


def exact_trace(numbers: Sequence[int]) -> float:
    """Of the Gauss-Newton matrix of the weighted loss: every label of every token by its probability, one at a time."""
    engine, total = small_engine(), 0.0
    parameters = list(engine.model.parameters())
    for number in numbers:
        for logits in row_logits(engine.model, ROWS["retain"][number]):
            logps = logits.log_softmax(-1)
            for logp in logps:
                gradients = torch.autograd.grad(logp, parameters, retain_graph=True)
                total += 0.25 * math.exp(logp.item()) * sum(float(gradient.square().sum()) for gradient in gradients)
    return total


def two_ranks(rank: int, world: int) -> float:
    """The copies lie on both ranks, in two micro-batches of the second."""
    batches = [batch_of([ONCE, OFTEN]), batch_of([])] if rank == 0 else [batch_of([OFTEN, OFTEN]), batch_of([OFTEN])]
    return mean_trace(small_engine("ddp", rank, world), batches, FEW)


def test_a_row_that_comes_several_times_counts_as_often_and_not_squared() -> None:
    """Within a micro-batch, and with the same labels across micro-batches and across ranks."""
    assert mean_trace(small_engine(), [batch_of(COPIES)], MANY) == pytest.approx(exact_trace(COPIES), rel=0.1)
    cuts = [[COPIES], [COPIES[:3], COPIES[3:]], [[number] for number in COPIES]]
    found = [mean_trace(small_engine(), [batch_of(part) for part in cut], FEW) for cut in cuts]
    assert found + spawn(two_ranks, 2, timeout_s=120) == pytest.approx([found[0]] * 5, rel=1e-9)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_weights_of_npo_are_its_derivative(reduction: str) -> None:
    """By hand: 2 sigmoid(beta r) of each row, over the number of rows, and over its tokens for a mean."""
    beta, engine = 0.3, small_engine()
    method = NPO(beta=beta, reduction=reduction)  # type: ignore[arg-type]
    rows = ROWS["forget"][:4]
    batch = collate([("forget", row) for row in rows] + [("retain", ROWS["retain"][0])], pad_id=0)
    forget, retain = method.terms()
    logits = torch.cat([row_logits(engine.model, row) for row in (*rows, ROWS["retain"][0])])
    found = token_weights(batch, logits, [(forget, 1 / 3), (retain, 0.2)])
    expected: list[float] = []
    for row in rows:
        labels = torch.tensor(list(row.ids[row.num_prompt :]))
        ratio = float(row_logits(engine.model, row).log_softmax(-1).gather(-1, labels[:, None]).sum()) - float(row.reference_logp or 0.0)
        length = len(labels) if reduction == "mean" else 1
        expected += [2 / (1 + math.exp(-beta * ratio / length)) / length / 3] * len(labels)
    expected += [0.2] * ROWS["retain"][0].num_supervised
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert max(expected) > 1.5 * min(expected[: -ROWS["retain"][0].num_supervised])


def test_at_the_target_npo_has_the_curvature_of_its_rows_likelihood() -> None:
    """r is 0 there, so that every token of a full step of B rows weighs 1/B: whatever the number of tokens."""
    engine = small_engine()
    rows = []
    for row in ROWS["forget"][:3]:
        labels = torch.tensor(list(row.ids[row.num_prompt :]))
        logp = float(row_logits(engine.model, row).log_softmax(-1).gather(-1, labels[:, None]).sum())
        rows.append(replace(row, reference_logp=logp))
    forget, _ = NPO().terms()
    logits = torch.cat([row_logits(engine.model, row) for row in rows])
    found = token_weights(collate([("forget", row) for row in rows], pad_id=0), logits, [(forget, 1 / 3)])
    torch.testing.assert_close(found, torch.full_like(found, 1 / 3))


def adapted_run(stop: int) -> tuple[dict[str, Tensor], list[dict[str, object]], int]:
    """h of every adapter, what was reported, and how many updates it is averaged over."""
    run = new_run(SOPHIA, dtype=torch.float64)
    engine = SingleEngine(EngineConfig().decided("cpu"))
    engine.prepare(lambda: add_adapters(run.engine.model, 2, seed=4), lambda model: SOPHIA.build(model.named_parameters()))
    run.engine = engine
    go(run, GradDiff(), SOPHIA, TRAIN.model_copy(update={"lora_rank": 2, "telemetry_every": 1}), stop=stop)
    curvature = {name: engine.optimizer.state[p]["exp_avg_sq"].clone() for name, p in engine.model.named_parameters() if p.requires_grad}
    return curvature, run.rows, engine.optimizer.param_groups[0]["hessian_updates"]


def test_adapters_have_curvature_when_they_first_move() -> None:
    """B is zero in the first step, so that A has neither gradient nor curvature; in the second both have, of that step alone."""
    first, rows, num_updates = adapted_run(1)
    assert num_updates == 1
    assert all(bool((h == 0).all()) == ("lora_A" in name) for name, h in first.items())
    assert rows[0]["unclipped_fraction"] == pytest.approx(0.3, abs=0.02)
    second, rows, num_updates = adapted_run(2)
    assert num_updates == 1, "the average begins with the second measurement"
    assert all(float((h > 0).double().mean()) > 0.9 for h in second.values())
    assert rows[1]["unclipped_fraction"] == pytest.approx(0.3, abs=0.02)
    later, _, num_updates = adapted_run(4)
    assert num_updates == 2  # that before step 3
    assert all(float((h > 0).double().mean()) > 0.9 for h in later.values())


@pytest.mark.parametrize("last", [False, True])
def test_curvature_that_is_not_finite_never_reaches_the_weights(last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = 4 if last else 9
    config = TRAIN.model_copy(update={"max_steps": 4 if last else 5})
    run = go(new_run(SOPHIA), GradDiff(), SOPHIA, config, stop=3)
    before = {name: value.clone() for name, value in run.engine.model.state_dict().items()}
    real = soul.train.curvature.sampled_loss
    monkeypatch.setattr(soul.train.curvature, "sampled_loss", lambda *args, **names: real(*args, **names) * math.inf)
    with pytest.raises(NonFiniteCurvature, match=r"the curvature is not finite at step 3; .*Lower --learning-rate") as caught:
        go(run, GradDiff(), SOPHIA, config, stop=stop)
    assert caught.value.step == 3 and run.progress.step == 3
    assert_bit_equal(run.engine.model.state_dict(), before)


@pytest.mark.parametrize("poisoned", [0, 3])
def test_nor_the_only_step_of_influence(poisoned: int, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = OneShotConfig()
    run = new_run(optimizer, max_grad_norm=None)
    before = {name: value.clone() for name, value in run.engine.model.state_dict().items()}
    real = soul.train.curvature.sampled_loss

    def loss(*args: object, **names: object) -> Tensor:
        return real(*args, **names) * (math.nan if names["update"] == poisoned else 1.0)  # type: ignore[arg-type]

    monkeypatch.setattr(soul.train.curvature, "sampled_loss", loss)
    with pytest.raises(NonFiniteCurvature, match=f"step {poisoned}"):
        go(run, GradDiff(), optimizer, TRAIN.model_copy(update={"max_steps": 4}), stop=4)
    assert_bit_equal(run.engine.model.state_dict(), before)


class SecondOfTwo(SingleEngine):
    """A rank whose own curvature is finite and the other's is not: of the sums it hears the other rank's vote."""

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        votes = len(GradDiff().terms()) * 2 + 2
        return tensor + torch.eye(votes, dtype=tensor.dtype)[-1] if len(tensor) == votes else tensor


def test_every_rank_stops_where_one_has_curvature_that_is_not_finite() -> None:
    run = new_run(SOPHIA)
    before = {name: value.clone() for name, value in run.engine.model.state_dict().items()}
    run.engine.__class__ = SecondOfTwo
    with pytest.raises(NonFiniteCurvature, match="step 0"):
        go(run, GradDiff(), SOPHIA, stop=1)
    assert_bit_equal(run.engine.model.state_dict(), before)


def test_a_job_that_ends_in_such_a_step_exports_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_in(folder, tmp_path, max_steps=3)
    real = soul.train.curvature.sampled_loss
    calls = []

    def poisoned(*args: object, **names: object) -> Tensor:
        calls.append(1)
        return real(*args, **names) * (math.nan if names["update"] == 1 else 1.0)  # type: ignore[arg-type]

    monkeypatch.setattr(soul.train.curvature, "sampled_loss", poisoned)
    with pytest.raises(NonFiniteCurvature, match="step 2"):
        run_job(job, SingleEngine(job.engine.decided("cpu")), resume_from=None, save_checkpoint=lambda engine, progress: None)
    assert calls and not Path(job.export).exists()


def test_what_is_logged_does_not_move_the_weights() -> None:
    runs = [go(new_run(SOPHIA), GradDiff(), SOPHIA, TRAIN.model_copy(update={"telemetry_every": every})) for every in (1, 3, 1000)]
    assert runs[0].progress.rho["is_measured"]
    for run in runs[1:]:
        assert_bit_equal(run.state(), runs[0].state())
        assert run.progress.rho == runs[0].progress.rho


def test_a_row_without_labels_is_no_occurrence() -> None:
    row = ROWS["retain"][1]
    filler = TokenRow(row.index, row.ids, len(row.ids))
    plain, filled = (
        mean_of_one([batch_of([1])]),
        mean_of_one([collate([("retain", filler)], pad_id=0), batch_of([1])]),
    )
    assert plain == pytest.approx(filled, rel=1e-12)


def mean_of_one(batches: Sequence[Batch]) -> float:
    engine = small_engine()
    fold_gauss_newton(engine, batches, PARTS, seed=1, update=0)
    return sum(float(h.sum()) for _, hs in engine.optimizer.state_buckets() for h in hs)  # type: ignore[attr-defined]
