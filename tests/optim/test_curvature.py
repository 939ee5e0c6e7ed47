"""Label sampling, and the estimator's claim by enumeration: E of the squared sampled-label gradient is the Gauss-Newton diagonal."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soul.optim.curvature import label_uniforms, sample_labels
from soul.optim.sophia import SophiaG

VOCABULARY, DIM, LENGTH = 4, 3, 4


class ToyCausal(nn.Module):
    """Embedding, running mean of the past, one hidden layer, head: position t sees ids up to t only."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, DIM)
        self.hidden = nn.Linear(DIM, DIM)
        self.head = nn.Linear(DIM, VOCABULARY)

    def forward(self, ids_T: Tensor) -> Tensor:
        past_TD = self.embedding(ids_T).cumsum(0) / torch.arange(1, len(ids_T) + 1)[:, None]
        logits_TV: Tensor = self.head(torch.tanh(self.hidden(past_TD)))
        return logits_TV


def gauss_newton_diagonal(model: nn.Module, ids_T: Tensor, weights_T: Tensor) -> list[Tensor]:
    """diag of sum_t w_t J_t^T (diag(p_t) - p_t p_t^T) J_t, with the Jacobian row by row."""
    params = list(model.parameters())
    logits_TV = model(ids_T)
    diagonal = [torch.zeros_like(p) for p in params]
    for t in range(len(ids_T)):
        p_V = logits_TV[t].softmax(-1).detach()
        rows = [torch.autograd.grad(logits_TV[t, v], params, retain_graph=True) for v in range(VOCABULARY)]
        for i, total in enumerate(diagonal):
            jacobian_V = torch.stack([row[i] for row in rows]).flatten(1)
            quadratic = (p_V[:, None] * jacobian_V**2).sum(0) - (p_V[:, None] * jacobian_V).sum(0) ** 2
            total += weights_T[t] * quadratic.view_as(total)
    return diagonal


def every_labelling(logits_TV: Tensor) -> list[tuple[Tensor, float]]:
    """All label tuples with their probabilities."""
    probabilities_TV = logits_TV.detach().softmax(-1)
    tuples = [torch.tensor(labels) for labels in itertools.product(range(VOCABULARY), repeat=len(logits_TV))]
    return [(labels_T, float(probabilities_TV.gather(1, labels_T[:, None]).prod())) for labels_T in tuples]


@pytest.mark.parametrize(
    "weights",
    [[1 / LENGTH] * LENGTH, [0.5, 0.5, 0.0, 1.5], [1 / 3, 1 / 3, 1 / 3, 2.0]],
    ids=["mean loss", "unequal weights", "forget mean + 2 x retain mean"],
)
def test_expected_square_is_the_gauss_newton_diagonal(weights: list[float]) -> None:
    torch.manual_seed(0)
    model = ToyCausal().double()
    ids_T, weights_T = torch.tensor([2, 0, 3, 1]), torch.tensor(weights, dtype=torch.float64)
    params = list(model.parameters())
    expected_square, expected_gradient = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    optimizer = SophiaG(params, lr=0.1, betas=(0.9, 0.0))  # h is the last squared gradient
    for labels_T, probability in every_labelling(model(ids_T)):
        optimizer.zero_grad()
        (weights_T.sqrt() * F.cross_entropy(model(ids_T), labels_T, reduction="none")).sum().backward()
        optimizer.update_hessian()
        for p, square, gradient in zip(params, expected_square, expected_gradient, strict=True):
            assert p.grad is not None
            square += probability * optimizer.hessian(p)
            gradient += probability * p.grad
    for square, gradient, exact in zip(expected_square, expected_gradient, gauss_newton_diagonal(model, ids_T, weights_T), strict=True):
        assert gradient.abs().max() < 1e-14
        assert (square - exact).norm() < 1e-10 * exact.norm()


def test_scaling_the_mean_loss_by_its_tokens_is_the_same_estimate() -> None:
    """T ghat^2 of the plain mean loss: what `update_hessian(scale=T)` stores."""
    torch.manual_seed(1)
    model = ToyCausal().double()
    ids_T = torch.tensor([1, 3, 0, 2])
    params = list(model.parameters())
    total = [torch.zeros_like(p) for p in params]
    optimizer = SophiaG(params, lr=0.1, betas=(0.9, 0.0))
    for labels_T, probability in every_labelling(model(ids_T)):
        optimizer.zero_grad()
        F.cross_entropy(model(ids_T), labels_T).backward()
        optimizer.update_hessian(scale=LENGTH)
        for p, expected in zip(params, total, strict=True):
            expected += probability * optimizer.hessian(p)
    exact = gauss_newton_diagonal(model, ids_T, torch.full((LENGTH,), 1 / LENGTH, dtype=torch.float64))
    for got, want in zip(total, exact, strict=True):
        assert (got - want).norm() < 1e-10 * want.norm()


def test_true_labels_do_not_give_the_gauss_newton_diagonal() -> None:
    """The released code's shortcut fails this oracle by far, so the oracle can tell."""
    torch.manual_seed(0)
    model = ToyCausal().double()
    ids_T = torch.tensor([2, 0, 3, 1])
    F.cross_entropy(model(ids_T), torch.tensor([0, 3, 1, 2])).backward()
    exact = gauss_newton_diagonal(model, ids_T, torch.full((LENGTH,), 1 / LENGTH, dtype=torch.float64))
    got = torch.cat([LENGTH * p.grad.flatten() ** 2 for p in model.parameters() if p.grad is not None])
    want = torch.cat([e.flatten() for e in exact])
    assert (got - want).norm() > 0.3 * want.norm()


def test_uniforms_depend_on_the_example_and_on_nothing_else() -> None:
    index_B, lengths_B, split_B = torch.tensor([7, 0, 399, 7]), torch.tensor([5, 0, 3, 4]), torch.tensor([0, 0, 1, 1])
    whole = label_uniforms(index_B, lengths_B, seed=3, update=2, split_B=split_B).split(lengths_B.tolist())
    for b in (3, 1, 0, 2):
        alone = label_uniforms(index_B[b : b + 1], lengths_B[b : b + 1], seed=3, update=2, split_B=split_B[b : b + 1])
        assert torch.equal(alone, whole[b])
    assert not torch.equal(whole[0][:4], whole[3]), "the same index in another split is another example"
    for other in ({"seed": 4, "update": 2}, {"seed": 3, "update": 1}):
        assert not torch.isin(label_uniforms(index_B, lengths_B, split_B=split_B, **other), torch.cat(whole)).any()


def test_each_copy_of_a_row_has_labels_of_its_own() -> None:
    """Whether the copies meet in one batch or are told which they are."""
    index_B, lengths_B = torch.tensor([7, 3, 7, 7]), torch.tensor([6, 6, 6, 6])
    together = label_uniforms(index_B, lengths_B, seed=3, update=2).split(6)
    assert len({tuple(numbers.tolist()) for numbers in together}) == 4
    for b, occurrence in enumerate([0, 0, 1, 2]):
        named = {"occurrence_B": torch.tensor([occurrence])}
        assert torch.equal(label_uniforms(index_B[b : b + 1], lengths_B[b : b + 1], seed=3, update=2, **named), together[b])


def test_a_longer_row_starts_with_the_same_numbers() -> None:
    short = label_uniforms(torch.tensor([5]), torch.tensor([3]), seed=0, update=0)
    assert torch.equal(short, label_uniforms(torch.tensor([5]), torch.tensor([9]), seed=0, update=0)[:3])


def test_uniforms_are_uniform_and_uncorrelated_between_neighbours() -> None:
    values = label_uniforms(torch.arange(2000), torch.full((2000,), 50), seed=1, update=0).view(2000, 50)
    assert values.dtype == torch.float64
    assert values.min() >= 0 and values.max() < 1
    counts = torch.histc(values, bins=100, min=0, max=1)
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert 50 < chi_square < 165  # 99 degrees of freedom, beyond 1e-4 on either side
    for pairs in (
        torch.stack([values[1:].flatten(), values[:-1].flatten()]),
        torch.stack([values[:, 1:].flatten(), values[:, :-1].flatten()]),
    ):
        assert torch.corrcoef(pairs)[0, 1].abs() < 0.015


def test_filler_rows_and_no_rows_draw_nothing() -> None:
    assert label_uniforms(torch.tensor([-1]), torch.tensor([0]), seed=0, update=0).shape == (0,)
    empty = torch.zeros(0, dtype=torch.long)
    assert label_uniforms(empty, empty, seed=0, update=0).dtype == torch.float64
    assert sample_labels(torch.zeros(0, 5), torch.zeros(0, dtype=torch.float64)).shape == (0,)


def test_labels_are_the_inverse_cdf() -> None:
    logits_NV = torch.tensor([0.125, 0.0, 0.375, 0.5]).log().double().repeat(7, 1)
    uniforms_N = torch.tensor([0.0, 0.124999, 0.125001, 0.3, 0.499999, 0.500001, 1 - 2**-53], dtype=torch.float64)
    assert sample_labels(logits_NV, uniforms_N).tolist() == [0, 0, 2, 2, 2, 3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_ids_without_probability_are_never_drawn(dtype: torch.dtype) -> None:
    """Also at the very ends, where the rounding of the CDF could step outside."""
    logits_NV = torch.randn(501, 1003, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits_NV[:, :5] = logits_NV[:, -5:] = -torch.inf
    for u in (0.0, 2**-53, 1 - 2**-53):
        labels_N = sample_labels(logits_NV, torch.full((501,), u, dtype=torch.float64), chunk=100)
        assert labels_N.min() >= 5 and labels_N.max() < 998


def test_labels_do_not_depend_on_the_chunk() -> None:
    generator = torch.Generator().manual_seed(2)
    logits_NV, uniforms_N = 3 * torch.randn(77, 31, generator=generator), torch.rand(77, generator=generator, dtype=torch.float64)
    whole = sample_labels(logits_NV, uniforms_N)
    for chunk in (1, 10, 77):
        assert torch.equal(sample_labels(logits_NV, uniforms_N, chunk=chunk), whole)
    assert torch.equal(sample_labels(logits_NV[40:50], uniforms_N[40:50]), whole[40:50])


def test_labels_follow_the_softmax() -> None:
    num = 40_000
    logits_V = torch.tensor([1.0, -1.0, 0.3, 2.0, -3.0])
    uniforms_N = label_uniforms(torch.arange(num // 40), torch.full((num // 40,), 40), seed=5, update=9)
    counts_V = torch.bincount(sample_labels(logits_V.expand(num, -1), uniforms_N), minlength=5)
    expected_V = num * logits_V.softmax(-1)
    assert ((counts_V - expected_V) ** 2 / expected_V).sum() < 23.5  # 4 degrees of freedom, p = 1e-4
