"""Influence unlearning: the closed forms it has to meet, and that neither cuts nor restarts show in its one step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from soul.cli import DEMO
from soul.config import Config
from soul.objectives.methods import NPO, Influence
from soul.optim.configs import OneShotConfig
from soul.optim.one_shot import OneShot
from soul.settings import load_config
from soul.train.engine import EngineConfig
from soul.train.loop import Progress
from soul.train.single import SingleEngine
from tests.train.engine_runs import VOCAB
from tests.train.loop_runs import ROWS, TRAIN, Run, assert_bit_equal, feed_of, go, new_run, whole_pass

METHOD = Influence()
PASS = TRAIN.model_copy(update={"epochs": 1, "max_steps": None})
FISHER = OneShotConfig(curvature="fisher")


def one_shot_run(optimizer: OneShotConfig) -> Run:
    return new_run(optimizer, dtype=torch.float64, max_grad_norm=None)


# --- closed forms


def test_least_squares_with_orthogonal_features_is_retrained_exactly() -> None:
    """There the Hessian of the retain rows is diagonal and the loss quadratic, so that one step from the optimum is the new optimum."""
    torch.manual_seed(0)
    axes = torch.arange(40) % 5  # each row measures one of five coordinates
    sizes, targets = torch.randn(40, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    features = nn.functional.one_hot(axes, 5).double() * sizes[:, None]
    forget, retain = torch.arange(40) < 7, torch.arange(40) >= 7

    def optimum(rows: Tensor) -> Tensor:
        return torch.linalg.lstsq(features[rows], targets[rows]).solution

    theta = nn.Parameter(optimum(forget | retain))
    start = theta.detach().clone()
    optimizer = OneShot([theta])
    for row in features[retain]:  # the Hessian of a mean of halved squares is the mean of squared features
        theta.grad = row / len(features[retain]) ** 0.5
        optimizer.update_hessian()
    optimizer.set_step(is_last=False, damping=0.0)
    optimizer.param_groups[0]["lr"] = 7 / 33  # n_f / n_r, because H is the retain rows'
    for i, row in enumerate(forget.nonzero()[:, 0].tolist()):
        assert torch.equal(theta.detach(), start), "nothing moves before the last step"
        optimizer.set_step(is_last=i == 6, damping=0.0)
        theta.grad = -features[row] * (features[row] @ theta.detach() - targets[row]) / 7  # ascent on the mean forget loss
        optimizer.step()
    torch.testing.assert_close(theta.detach(), optimum(retain), rtol=1e-12, atol=1e-12)


class Bigram(nn.Module):
    """A linear softmax: the logits behind a token are its own column of one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(VOCAB, VOCAB, bias=False, dtype=torch.float64)
        nn.init.normal_(self.head.weight, std=0.3, generator=torch.Generator().manual_seed(4))

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(nn.functional.one_hot(input_ids, VOCAB).double()))


def bigram_forms(weight: Tensor, data: str) -> tuple[Tensor, Tensor, float]:
    """Gradient of the mean log-likelihood of the forget rows, Gauss-Newton diagonal of the mean loss, forget share of all tokens."""
    pairs = {
        split: [(row.ids[t - 1], row.ids[t]) for row in ROWS[split] for t in range(row.num_prompt, len(row.ids))]
        for split in ("forget", "retain")
    }
    probs = weight.softmax(0)
    gradient, forget = torch.zeros_like(weight), pairs["forget"]
    for context, target in forget:
        gradient[:, context] -= probs[:, context] / len(forget)
        gradient[target, context] += 1 / len(forget)
    share = len(forget) / sum(map(len, pairs.values()))
    diagonal = torch.zeros_like(weight)
    for split, part in ({"forget": share, "retain": 1 - share} if data == "both" else {data: 1.0}).items():
        for context, _ in pairs[split]:
            diagonal[:, context] += part * probs[:, context] * (1 - probs[:, context]) / len(pairs[split])
    return gradient, diagonal, share


@pytest.mark.parametrize("data", ["both", "retain"])
def test_the_linear_softmax_takes_the_step_of_its_closed_form(data: Any) -> None:
    """The gradient is exact, the diagonal of sampled labels right in the mean. Eighteen passes over seven forget rows are fourteen over
    nine retain rows, so that every row counts alike."""
    optimizer = OneShotConfig(hessian_data=data, damping=0.5)
    engine = SingleEngine(EngineConfig(max_grad_norm=None).decided("cpu"))
    engine.prepare(Bigram, lambda model: optimizer.build(model.named_parameters()))
    [weight] = engine.model.parameters()
    start = weight.detach().clone()
    run = go(Run(engine, Progress()), METHOD, optimizer, PASS.model_copy(update={"epochs": 18}), stop=54)
    gradient, diagonal, share = bigram_forms(start, data)
    total, h = (engine.optimizer.state[weight][key] for key in ("exp_avg", "exp_avg_sq"))
    torch.testing.assert_close(total, gradient, rtol=1e-9, atol=1e-12)
    assert float(h.sum()) == pytest.approx(float(diagonal.sum()), rel=0.1)
    assert nn.functional.cosine_similarity(h.sum(0), diagonal.sum(0), dim=0) > 0.95  # by context: a single label is rarely drawn
    assert run.rows[-1]["learning_rate"] == pytest.approx(share)
    torch.testing.assert_close(weight.detach(), start - share * gradient / (h + 0.5 * h.mean()), rtol=1e-9, atol=1e-12)


def naive_fisher(model: nn.Module, weights: dict[str, float], indices: list[tuple[str, int]]) -> list[Tensor]:
    """Sum over rows of weight x the squared gradient of the row's own loss, every row forwarded alone and unpadded."""
    totals = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for split, i in indices:
        if split in weights:
            row = ROWS[split][i]
            logits = model(input_ids=torch.tensor([list(row.ids)])).logits[0, row.num_prompt - 1 : -1]
            nll = nn.functional.cross_entropy(logits, torch.tensor(list(row.ids[row.num_prompt :])), reduction="sum")
            for total, gradient in zip(totals, torch.autograd.grad(nll, list(model.parameters())), strict=True):
                total += weights[split] * gradient.square()
    return totals


@pytest.mark.parametrize("step_length", [None, 0.02])
def test_a_pass_ends_in_the_damped_fisher_step(step_length: float | None) -> None:
    optimizer = FISHER.model_copy(update={"step_length": step_length, "damping": 2.0})
    run = one_shot_run(optimizer)
    feed = feed_of(METHOD, PASS)
    whole, model = whole_pass(feed, PASS), run.engine.model
    drawn = [(split, int(i)) for step in range(3) for split, rows in feed.plan.step(step).items() for i in rows]
    assert sorted(i for split, i in drawn if split == "forget") == list(range(7)), "a pass sees every forget row once"
    fisher = naive_fisher(model, whole.token_weights("both"), drawn)
    logps = []
    for row in ROWS["forget"]:
        logits = model(input_ids=torch.tensor([list(row.ids)])).logits[0, row.num_prompt - 1 : -1]
        logps.append(logits.log_softmax(-1).gather(-1, torch.tensor(list(row.ids[row.num_prompt :]))[:, None]).sum())
    loss = torch.stack(logps).sum() / sum(row.num_supervised for row in ROWS["forget"])
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    mean = torch.cat([h.flatten() for h in fisher]).mean()
    share = sum(r.num_supervised for r in ROWS["forget"]) / sum(r.num_supervised for s in ("forget", "retain") for r in ROWS[s])
    length = share if step_length is None else step_length
    expected = [
        p.detach() - length * g / (h + 2.0 * mean)  # g is of the log-likelihood, hence the minus before what is added of the loss's
        for p, g, h in zip(model.parameters(), gradients, fisher, strict=True)
    ]
    go(run, METHOD, optimizer, PASS)
    for p, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-8, atol=1e-11)
    assert [row["update_norm"] for row in run.rows[:2]] == [0.0, 0.0] and run.rows[2]["update_norm"] > 0


# --- cuts, restarts, rows


@pytest.mark.parametrize("size", [1, 2])
def test_the_fisher_does_not_depend_on_the_cut(size: int) -> None:
    whole, cut = (go(one_shot_run(FISHER), METHOD, FISHER, PASS.model_copy(update={"micro_batch_size": n})) for n in (3, size))
    for name, value in cut.state().items():
        torch.testing.assert_close(value, whole.state()[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("optimizer", [FISHER, OneShotConfig()], ids=["fisher", "gnb"])
def test_resuming_inside_the_pass_changes_nothing(optimizer: OneShotConfig, tmp_path: Path) -> None:
    straight = go(one_shot_run(optimizer), METHOD, optimizer, PASS, save_to=tmp_path)
    for boundary in (1, 2, 3):
        run = one_shot_run(optimizer)
        with torch.no_grad():
            for parameter in run.engine.model.parameters():
                parameter.add_(1.0)
        run.progress = Progress(**run.engine.load(tmp_path / str(boundary)))
        go(run, METHOD, optimizer, PASS)
        assert run.rows == straight.rows[boundary:]
        assert_bit_equal(run.state(), straight.state())


def test_the_forget_loss_rises_and_the_retain_loss_less() -> None:
    optimizer = OneShotConfig(step_length=0.003, damping=1.0)
    run = one_shot_run(optimizer)
    feed = feed_of(METHOD, PASS)

    def losses() -> tuple[float, float]:
        probe = one_shot_run(optimizer)
        probe.engine.model.load_state_dict(run.engine.model.state_dict())
        terms = [row["terms"] for row in go(probe, METHOD, optimizer, PASS.model_copy(update={"max_steps": 1}), stop=1).rows]
        return -terms[0]["forget"], terms[0]["retain"]

    before = losses()
    go(run, METHOD, optimizer, PASS, steps=feed.steps(0, 3))
    after = losses()
    assert after[0] - before[0] > abs(after[1] - before[1]) > 0


# --- settings


def test_influence_brings_its_optimizer_one_pass_and_no_clipping() -> None:
    config = Config.model_validate({"method": "influence"})
    assert (config.optimizer, config.train.epochs, config.engine.max_grad_norm) == (OneShotConfig(), 1, None)
    assert Config.model_validate_json(config.model_dump_json()) == config
    given = Config.model_validate(
        {"method": "influence", "optimizer": {"damping": 0.1, "hessian_data": "retain"}, "train": {"epochs": 3}, "engine": "fsdp"}
    )
    assert given.optimizer == OneShotConfig(damping=0.1, hessian_data="retain")
    assert (given.train.epochs, given.engine.name, given.engine.max_grad_norm) == (3, "fsdp", None)
    assert Config(method=Influence(), optimizer=OneShotConfig(), engine=EngineConfig(max_grad_norm=None)).train.epochs == 1
    demo = load_config(None, {"method": "influence"}, preset=DEMO)
    assert demo.twin is None and demo.train.epochs == 1 and demo.train.batch_size == 4


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optimizer": "adamw"}, "one step of its own, got optimizer adamw"),
        ({"optimizer": {"name": "sophia", "rho": 0.1}}, "got optimizer sophia"),
        ({"twin": "adamw"}, "one step of its own, got twin adamw"),
        ({"engine": {"max_grad_norm": 1.0}}, r"clips none, got max_grad_norm 1\.0"),
        ({"optimizer": {"damping": -1.0}}, "greater than or equal to 0"),
        ({"optimizer": {"step_length": 0.0}}, "greater than 0"),
    ],
)
def test_what_does_not_fit_influence_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Config.model_validate({"method": "influence", **values})


def test_its_step_is_no_optimizer_of_other_methods() -> None:
    with pytest.raises(ValidationError, match="one_shot belongs to method influence, got npo"):
        Config(method=NPO(), optimizer=OneShotConfig())
    with pytest.raises(ValidationError, match="'soul_release'"):
        Config.model_validate({"twin": "one_shot"})
