"""The laws of the training loop: cuts do not matter, curvature sees its rows unclipped, bad losses never reach the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import soul.train.loop
import soul.train.objective
from soul.batch import SPLITS, Batch, TokenRow
from soul.objectives.methods import GA, METHODS, NPO, PO, GradDiff, Method, streamed_splits
from soul.objectives.terms import Term
from soul.optim.configs import AdamWConfig, OptimizerConfig, SignumConfig, SophiaConfig
from soul.optim.curvature import label_uniforms, sample_labels
from soul.optim.schedule import lr_factor
from soul.records import InputError
from soul.train.config import TrainConfig
from soul.train.curvature import hessian_splits
from soul.train.engine import Engine
from soul.train.loop import NonFiniteGradient, NonFiniteLoss
from soul.train.objective import term_sums
from tests.train.loop_runs import (
    ADAMW,
    METHODS_BY_NAME,
    NUM_STEPS,
    OPTIMIZERS_BY_NAME,
    ROWS,
    STEPS_PER_EPOCH,
    TRAIN,
    Run,
    assert_bit_equal,
    feed_of,
    go,
    new_run,
)

SOPHIA = SophiaConfig(learning_rate=1e-3, rho=2.0, hessian_every=3)
CUTS = (1, 2, 3)


def trained(method: Method, optimizer: OptimizerConfig, config: TrainConfig = TRAIN, **settings: Any) -> Run:
    return go(new_run(optimizer, dtype=torch.float64), method, optimizer, config, **settings)


def curvature(run: Run) -> dict[str, Tensor]:
    return {name: value for name, value in run.state().items() if name.startswith("exp_avg_sq/")}


def numbers(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in {**row, **row["terms"]}.items() if isinstance(value, int | float)}


def rows_at(step: int, method: Method, config: TrainConfig = TRAIN) -> list[tuple[str, TokenRow]]:
    return [(split, ROWS[split][i]) for split, indices in feed_of(method, config).plan.step(step).items() for i in indices]


def row_logits(model: nn.Module, row: TokenRow) -> Tensor:
    """Logits of one unpadded row's answer, by the whole forward."""
    logits: Tensor = model(input_ids=torch.tensor([list(row.ids)])).logits[0]
    return logits[row.num_prompt - 1 : -1]


# --- the objective


def naive_terms(model: nn.Module, method: Method, step: int) -> tuple[dict[str, Tensor], Tensor]:
    """The terms' means over the whole step, and what is differentiated: sums over what a full step has on average. No batches."""
    sums: dict[str, list[Tensor]] = {}
    tokens: dict[str, int] = {}
    for split, row in rows_at(step, method):
        labels = torch.tensor(list(row.ids[row.num_prompt :]))
        logp = row_logits(model, row).log_softmax(-1).gather(-1, labels[:, None]).sum()
        tokens[split] = tokens.get(split, 0) + len(labels)
        if isinstance(method, NPO) and split == "forget":
            assert row.reference_logp is not None
            logp = -(2 / method.beta) * torch.log(torch.sigmoid(-method.beta * (logp - row.reference_logp)))
        elif split != "forget":
            logp = -logp
        sums.setdefault(split, []).append(logp)
    by_row = {split: isinstance(method, NPO) and split == "forget" for split in sums}
    totals = {split: torch.stack(values).sum() for split, values in sums.items()}
    means = {split: total / (len(sums[split]) if by_row[split] else tokens[split]) for split, total in totals.items()}
    usual = {split: total / (TRAIN.batch_size if by_row[split] else mean_tokens(split)) for split, total in totals.items()}
    weight = getattr(method, "retain_weight", 0.0)
    return means, sum((weight if split == "retain" else 1.0) * value for split, value in usual.items())  # type: ignore[return-value]


def mean_tokens(split: str) -> float:
    """Answer tokens of a full step's rows, on average over the rows of the split."""
    return TRAIN.batch_size * sum(row.num_supervised for row in ROWS[split]) / len(ROWS[split])


@pytest.mark.parametrize("step", [0, 2])  # the last step of an epoch has one row of each split
@pytest.mark.parametrize("method", [GA(), GradDiff(retain_weight=0.7), PO(retain_weight=2.0), NPO(beta=0.3, retain_weight=0.7)])
def test_losses_and_gradients_are_those_of_a_loop_over_rows(method: Method, step: int) -> None:
    run = new_run(ADAMW, dtype=torch.float64, max_grad_norm=None)
    run.progress.step = step
    model = run.engine.model
    means, loss = naive_terms(model, method, step)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    [row] = go(run, method, ADAMW, stop=step + 1).rows
    assert row["terms"] == pytest.approx({name: value.item() for name, value in means.items()}, rel=1e-10)
    weights = {"retain": getattr(method, "retain_weight", 0.0)}
    assert row["loss"] == pytest.approx(sum(weights.get(name, 1.0) * value.item() for name, value in means.items()), rel=1e-10)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-10)
    momenta = run.engine.optimizer.state
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(momenta[parameter]["exp_avg"], 0.1 * gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("optimizer_name", ["adamw", "soul_release"])
@pytest.mark.parametrize("method_name", METHODS)
def test_cutting_a_batch_into_micro_batches_changes_nothing(method_name: str, optimizer_name: str) -> None:
    method, optimizer = METHODS_BY_NAME[method_name], OPTIMIZERS_BY_NAME[optimizer_name]
    runs = [trained(method, optimizer, TRAIN.model_copy(update={"micro_batch_size": size})) for size in CUTS]
    for run in runs[:-1]:
        for row, expected in zip(run.rows, runs[-1].rows, strict=True):
            assert numbers(row) == pytest.approx(numbers(expected), rel=1e-9, abs=1e-12)
        for (name, value), expected_value in zip(run.state().items(), runs[-1].state().values(), strict=True):
            torch.testing.assert_close(value, expected_value, rtol=1e-9, atol=1e-12, msg=name)


def test_empty_micro_batches_change_nothing() -> None:
    """What a rank without rows runs, between and behind the others."""
    method = NPO()
    feed = feed_of(method)
    filler = feed_of(method, TRAIN).step(0)[0]
    filler = replace(
        filler, labels_BT=torch.full_like(filler.labels_BT, -100), reference_logps_B=torch.full((len(filler.split_B),), torch.nan)
    )
    steps: list[Sequence[Batch]] = [[filler, *feed.step(step), filler] for step in range(NUM_STEPS)]
    padded, plain = trained(method, SOPHIA, steps=steps), trained(method, SOPHIA)
    for row, expected in zip(padded.rows, plain.rows, strict=True):
        assert numbers(row) == pytest.approx(numbers(expected), rel=1e-9, abs=1e-12)


# --- what a step reports


def test_rows_count_steps_epochs_and_tokens() -> None:
    method = METHODS_BY_NAME["po"]
    run = trained(method, ADAMW)
    assert [row["step"] for row in run.rows] == [1, 2, 3, 4, 5]
    assert {row["total_steps"] for row in run.rows} == {NUM_STEPS}
    assert [row["epoch"] for row in run.rows] == [step / STEPS_PER_EPOCH for step in range(1, NUM_STEPS + 1)]
    tokens = 0
    for step, row in enumerate(run.rows):
        tokens += sum(row.num_supervised for _, row in rows_at(step, method))
        assert row["tokens"] == tokens
        assert row["loss"] == pytest.approx(row["terms"]["refusal"] + method.terms()[1].weight * row["terms"]["retain"], rel=1e-12)
    assert run.epochs == [(1, 3), (2, 5)]  # the second one is cut short by max_steps


def test_steps_beyond_the_last_are_not_taken() -> None:
    run = trained(GA(), ADAMW, stop=NUM_STEPS + 4)
    assert run.progress.step == NUM_STEPS
    again = go(run, GA(), ADAMW, stop=NUM_STEPS + 4)
    assert again.progress.step == NUM_STEPS and len(again.rows) == NUM_STEPS


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_learning_rate_follows_its_schedule(schedule: Any) -> None:
    optimizer = SignumConfig(learning_rate=1e-3, weight_decay=0.0, momentum=0.0)
    config = TRAIN.model_copy(update={"schedule": schedule, "warmup_fraction": 0.4})
    run, before = new_run(optimizer, dtype=torch.float64), {}
    for step in range(NUM_STEPS):
        before = {name: parameter.detach().clone() for name, parameter in run.engine.model.named_parameters()}
        go(run, GradDiff(), optimizer, config, stop=step + 1)
        rate = 1e-3 * lr_factor(step, total_steps=NUM_STEPS, warmup_fraction=0.4, schedule=schedule)
        assert run.rows[-1]["learning_rate"] == rate
        moved = torch.cat([(parameter - before[name]).abs().flatten() for name, parameter in run.engine.model.named_parameters()])
        torch.testing.assert_close(moved[moved > 0], torch.full_like(moved[moved > 0], rate), rtol=1e-6, atol=1e-15)


# --- curvature


@pytest.mark.parametrize(
    ("method", "data", "expected"),
    [
        (GA(), None, ("forget",)),
        (GradDiff(), None, ("retain",)),
        (GradDiff(), "forget", ("forget",)),
        (GradDiff(), "both", ("forget", "retain")),
        (GradDiff(retain_weight=0.0), None, ("forget",)),  # what weighs nothing has no curvature
        (GradDiff(retain_weight=0.0), "both", ("forget",)),
        (PO(), None, ("retain",)),
        (PO(), "forget", ("refusal",)),
        (NPO(), "both", ("forget", "retain")),
    ],
)
def test_which_rows_define_the_curvature(method: Method, data: Any, expected: tuple[str, ...]) -> None:
    assert hessian_splits(method, SophiaConfig(hessian_data=data)) == expected


@pytest.mark.parametrize("method", [GA(), GradDiff(retain_weight=0.0), NPO(retain_weight=0.0)])
def test_retain_rows_that_are_not_there_are_not_replaced_by_others(method: Method) -> None:
    with pytest.raises(InputError, match=rf"hessian_data retain .* got {method.name} without.*--hessian-data"):
        hessian_splits(method, SophiaConfig(hessian_data="retain"))


@pytest.mark.parametrize("data", ["retain", "forget", "both"])
def test_curvature_is_measured_on_these_rows_only(data: Any) -> None:
    method, optimizer = GradDiff(), SOPHIA.model_copy(update={"hessian_data": data})
    expected = curvature(trained(method, optimizer, stop=1))
    for split in streamed_splits(method):
        altered = {name: [_altered(row) for row in rows] if name == split else rows for name, rows in ROWS.items()}
        found = curvature(trained(method, optimizer, rows=altered, stop=1))
        same = all(torch.equal(value, expected[name]) for name, value in found.items())
        assert same == (split not in hessian_splits(method, optimizer)), split


def _altered(row: TokenRow) -> TokenRow:
    """Other tokens, the same lengths: these fix the order and the divisors."""
    return replace(row, ids=[3 + (token + 1) % 50 for token in row.ids])


def naive_curvature(model: nn.Module, weights: dict[str, float], rows: Sequence[tuple[str, TokenRow]]) -> list[Tensor]:
    """The squared gradient of sum_rows sum_tokens sqrt(weight / T) CE(sampled label), T the split's tokens a step."""
    loss = torch.zeros((), dtype=torch.float64)
    for split, row in rows:
        if split in weights:
            logits = row_logits(model, row)
            uniforms = label_uniforms(
                torch.tensor([row.index]),
                torch.tensor([row.num_supervised]),
                seed=TRAIN.seed,
                update=0,
                split_B=torch.tensor([SPLITS.index(split)]),
            )
            labels = sample_labels(logits.detach(), uniforms)
            logps = logits.log_softmax(-1).gather(-1, labels[:, None])
            loss = loss - math.sqrt(weights[split] / mean_tokens(split)) * logps.sum()
    return [gradient.square() for gradient in torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("data", ["retain", "both"])
def test_curvature_is_the_squared_gradient_of_the_sampled_labels_of_the_whole_step(data: Any, cut: int) -> None:
    method, config = GradDiff(retain_weight=0.7), TRAIN.model_copy(update={"micro_batch_size": cut})
    optimizer = SOPHIA.model_copy(update={"hessian_data": data})
    run = new_run(optimizer, dtype=torch.float64)
    weights = {"retain": 0.7} if data == "retain" else {"forget": 1.0, "retain": 0.7}
    expected = naive_curvature(run.engine.model, weights, rows_at(0, method, config))
    go(run, method, optimizer, config, stop=1)
    for parameter, value in zip(run.engine.model.parameters(), expected, strict=True):
        found = run.engine.optimizer.state[parameter]["exp_avg_sq"]
        torch.testing.assert_close(found, (1 - optimizer.betas[1]) * value, rtol=1e-8, atol=1e-14)


def test_the_gradient_is_clipped_and_the_curvature_is_not() -> None:
    runs = []
    for max_grad_norm in (None, 1e-3):
        run = new_run(SOPHIA, dtype=torch.float64, max_grad_norm=max_grad_norm)
        runs.append(go(run, GradDiff(), SOPHIA, stop=1))
    free, clipped = runs
    assert free.rows[0]["grad_norm"] == clipped.rows[0]["grad_norm"] > 1.0
    assert_bit_equal(curvature(free), curvature(clipped))
    momenta = [torch.cat([value.flatten() for name, value in run.state().items() if name.startswith("exp_avg/")]) for run in runs]
    assert float(momenta[0].norm()) > 100 * float(momenta[1].norm()) == pytest.approx(100 * 0.1 * 1e-3, rel=1e-3)


def test_the_update_divides_by_the_bias_corrected_curvature() -> None:
    """theta -= lr clip(m / (rho h), 1) with h its first, uncorrected mean: the second moment's decay must not show."""
    method, optimizer = GradDiff(), SOPHIA.model_copy(update={"weight_decay": 0.0})
    run = new_run(optimizer, dtype=torch.float64, max_grad_norm=None)
    before = [parameter.detach().clone() for parameter in run.engine.model.parameters()]
    go(run, method, optimizer, stop=1)
    rate, unclipped = run.rows[0]["learning_rate"], 0
    for parameter, old in zip(run.engine.model.parameters(), before, strict=True):
        state = run.engine.optimizer.state[parameter]
        h = state["exp_avg_sq"] / (1 - optimizer.betas[1])
        direction = (state["exp_avg"] / (2.0 * h).clamp(min=optimizer.eps)).clamp(-1, 1)
        unclipped += int(((direction.abs() < 1) & (direction != 0)).sum())
        torch.testing.assert_close(parameter.detach(), old - rate * direction, rtol=1e-9, atol=1e-14)
    assert unclipped > 100


def test_curvature_is_updated_before_the_first_step_and_then_at_its_interval() -> None:
    run = new_run(SOPHIA, dtype=torch.float64)
    updates, hessians = [], [curvature(run)]
    for step in range(NUM_STEPS):
        go(run, GradDiff(), SOPHIA, stop=step + 1)
        updates.append(run.progress.hessian_updates)
        hessians.append(curvature(run))
    assert updates == [1, 1, 1, 2, 2]
    changed = [any(not torch.equal(value, old[name]) for name, value in new.items()) for old, new in pairwise(hessians)]
    assert changed == [True, False, False, True, False]


def test_every_update_draws_labels_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[int, int]] = []

    def spy(*rows: Tensor, seed: int, update: int, **names: Tensor) -> Tensor:
        drawn.append((seed, update))
        return label_uniforms(*rows, seed=seed, update=update, **names)

    monkeypatch.setattr(soul.train.objective, "label_uniforms", spy)
    trained(GradDiff(), SOPHIA, TRAIN.model_copy(update={"micro_batch_size": 3}))
    assert drawn == [(TRAIN.seed, 0), (TRAIN.seed, 1)]


def test_sampled_labels_do_not_depend_on_the_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[tuple[int, int], list[int]]] = []

    def spy_uniforms(index_B: Tensor, lengths_B: Tensor, *, seed: int, update: int, split_B: Tensor, occurrence_B: Tensor) -> Tensor:
        owners.extend((s, i) for s, i, n in zip(split_B.tolist(), index_B.tolist(), lengths_B.tolist(), strict=True) for _ in range(n))
        return label_uniforms(index_B, lengths_B, seed=seed, update=update, split_B=split_B, occurrence_B=occurrence_B)

    def spy_labels(logits_NV: Tensor, uniforms_N: Tensor) -> Tensor:
        labels_N = sample_labels(logits_NV, uniforms_N)
        labels.extend(labels_N.tolist())
        return labels_N

    monkeypatch.setattr(soul.train.objective, "label_uniforms", spy_uniforms)
    monkeypatch.setattr(soul.train.objective, "sample_labels", spy_labels)
    optimizer = SOPHIA.model_copy(update={"hessian_data": "both"})
    for cut in CUTS:
        owners: list[tuple[int, int]] = []
        labels: list[int] = []
        trained(GradDiff(), optimizer, TRAIN.model_copy(update={"micro_batch_size": cut}), stop=1)
        by_row: dict[tuple[int, int], list[int]] = {}
        for owner, label in zip(owners, labels, strict=True):
            by_row.setdefault(owner, []).append(label)
        found.append(by_row)
    assert len(found[0]) == 6  # three forget and three retain rows
    assert found[0] == found[1] == found[2]


# --- losses that are not finite


def poisoned(run: Run) -> Run:
    with torch.no_grad():
        run.engine.model.get_output_embeddings().weight[5] = torch.inf  # type: ignore[operator]
    return run


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS_BY_NAME)
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(optimizer_name: str) -> None:
    optimizer = OPTIMIZERS_BY_NAME[optimizer_name]
    run = go(new_run(optimizer), GradDiff(), optimizer, stop=2)
    poisoned(run)
    before = {name: value.clone() for name, value in run.engine.model.state_dict().items()}
    with pytest.raises(NonFiniteLoss, match=r"the forget and retain loss is not finite at step 2; .*Lower --learning-rate") as caught:
        go(run, GradDiff(), optimizer)
    assert (caught.value.step, caught.value.terms) == (2, ("forget", "retain"))
    assert_bit_equal(run.engine.model.state_dict(), before)
    assert run.progress.step == 2 and len(run.rows) == 2


@pytest.mark.parametrize("reference", [None, -math.inf])  # a loss of nan, and one of infinity
def test_the_term_that_is_not_finite_is_named(reference: float | None) -> None:
    rows = ROWS | {"forget": [replace(row, reference_logp=reference) for row in ROWS["forget"]]}
    with pytest.raises(NonFiniteLoss, match="the forget loss is not finite at step 0") as caught:
        trained(NPO(), ADAMW, rows=rows)
    assert caught.value.terms == ("forget",)


def test_a_gradient_that_is_not_finite_under_a_finite_loss_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def overflowing(engine: Engine, batch: Batch, terms: Sequence[Term]) -> list[Tensor]:
        return [value + torch.sqrt(value - value.detach()) * 0 for value in term_sums(engine, batch, terms)]  # sqrt'(0) is infinite

    monkeypatch.setattr(soul.train.loop, "term_sums", overflowing)
    with pytest.raises(NonFiniteGradient, match="the gradient is not finite at step 0, though the loss is") as caught:
        trained(GradDiff(), ADAMW)
    assert caught.value.step == 0


def test_a_run_that_diverges_is_stopped() -> None:
    optimizer = AdamWConfig(learning_rate=1e30)
    run = new_run(optimizer)
    with pytest.raises((NonFiniteLoss, NonFiniteGradient)):
        go(run, GradDiff(), optimizer)
    assert all(math.isfinite(row["loss"]) for row in run.rows)
