"""Every method's terms against float64 numpy, written from the papers' formulas, on ragged answers; a method is one row of TABLE."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from soul.models.scoring import AnswerLogps
from soul.objectives.methods import METHODS, TITLES, Finetune, GradDiff, Method, MethodConfig, needs_reference, streamed_splits
from soul.objectives.terms import Term

Floats = NDArray[np.float64]
SPLITS = ("forget", "retain", "refusal")


@dataclass(frozen=True)
class Answers:
    """One split's answers: per row the log-probabilities of its tokens, and the reference's for the whole answer."""

    rows: Sequence[Floats]
    reference: Floats

    def take(self, chosen: Sequence[int]) -> Answers:
        return Answers([self.rows[i] for i in chosen], self.reference[list(chosen)])

    def scores(self) -> tuple[AnswerLogps, torch.Tensor]:
        owners = np.repeat(np.arange(len(self.rows)), [len(row) for row in self.rows])
        logps = torch.tensor(np.concatenate([*self.rows, np.empty(0)]), requires_grad=True)
        return AnswerLogps(logps, torch.from_numpy(owners), len(self.rows)), torch.from_numpy(self.reference)


def answers(seed: int, num: int) -> Answers:
    """Rows of 1 to 12 tokens; a rowless answer (the filler) among them."""
    rng = np.random.default_rng(seed)
    rows = [np.log(rng.uniform(0.01, 1.0, int(rng.integers(1, 13)))) for _ in range(num - 1)]
    rows.insert(num // 2, np.empty(0))
    reference = np.array([row.sum() + rng.normal(scale=5) if len(row) else np.nan for row in rows])
    return Answers(rows, reference)


BATCH = {split: answers(seed, num) for seed, (split, num) in enumerate(zip(SPLITS, (6, 9, 5), strict=True))}


def cross_entropy(data: Answers) -> float:
    return float(sum(-row.sum() for row in data.rows))


def ascent(data: Answers) -> float:
    return -cross_entropy(data)


def npo_per_sequence(beta: float, *, per_token: bool) -> Callable[[Answers], float]:
    """Sum over sequences of -(2 / beta) log sigmoid(beta (S - S_ref)), S the answer's negative log-likelihood."""

    def total(data: Answers) -> float:
        value = 0.0
        for row, reference in zip(data.rows, data.reference, strict=True):
            if len(row):
                length = len(row) if per_token else 1
                margin = (-row.sum() - -reference) / length
                value += -(2 / beta) * np.log(1 / (1 + np.exp(-beta * margin)))
        return value

    return total


# name of the term: (split, unit, weight, the sum in numpy)
Expected = Mapping[str, tuple[str, str, float, Callable[[Answers], float]]]
TABLE: list[tuple[str, dict[str, Any], Expected]] = [
    ("influence", {}, {"forget": ("forget", "tokens", 1.0, ascent), "retain": ("retain", "tokens", 0.0, cross_entropy)}),
    ("ga", {}, {"forget": ("forget", "tokens", 1.0, ascent)}),
    ("grad_diff", {}, {"forget": ("forget", "tokens", 1.0, ascent), "retain": ("retain", "tokens", 1.0, cross_entropy)}),
    (
        "grad_diff",
        {"retain_weight": 2.5},
        {"forget": ("forget", "tokens", 1.0, ascent), "retain": ("retain", "tokens", 2.5, cross_entropy)},
    ),
    (
        "po",
        {"retain_weight": 5.0},
        {"refusal": ("refusal", "tokens", 1.0, cross_entropy), "retain": ("retain", "tokens", 5.0, cross_entropy)},
    ),
    (
        "npo",
        {},
        {
            "forget": ("forget", "sequences", 1.0, npo_per_sequence(0.1, per_token=False)),
            "retain": ("retain", "tokens", 1.0, cross_entropy),
        },
    ),
    (
        "npo",
        {"beta": 0.7, "reduction": "mean", "retain_weight": 0.3},
        {
            "forget": ("forget", "sequences", 1.0, npo_per_sequence(0.7, per_token=True)),
            "retain": ("retain", "tokens", 0.3, cross_entropy),
        },
    ),
]
ROWS = pytest.mark.parametrize(("name", "settings", "expected"), TABLE, ids=[f"{name}-{settings}" for name, settings, _ in TABLE])


def total(term: Term, data: Answers) -> float:
    return float(term.loss(*data.scores()).detach())


def gradient(term: Term, data: Answers) -> Floats:
    """With respect to the tokens' log-probabilities, all rows in order."""
    scores, reference = data.scores()
    [found] = torch.autograd.grad(term.loss(scores, reference), scores.logps_N)
    return found.numpy()


def test_the_table_has_a_row_of_every_method() -> None:
    assert {name for name, _, _ in TABLE} == METHODS.keys()
    assert METHODS.keys() < TITLES.keys()


@ROWS
def test_terms_equal_their_formulas(name: str, settings: dict[str, Any], expected: Expected) -> None:
    terms = METHODS[name](**settings).terms()
    assert [term.name for term in terms] == list(expected)
    for term in terms:
        split, unit, weight, formula = expected[term.name]
        assert (term.split, term.unit, term.weight) == (split, unit, weight)
        assert total(term, BATCH[split]) == pytest.approx(formula(BATCH[split]), rel=1e-9)


@ROWS
def test_gradients_equal_differences_of_the_formulas(name: str, settings: dict[str, Any], expected: Expected) -> None:
    step = 1e-6
    for term in METHODS[name](**settings).terms():
        formula, data, found = expected[term.name][3], BATCH[term.split], []
        for row in data.rows:
            for t in range(len(row)):
                value, ends = row[t], []
                for row[t] in (value + step, value - step):
                    ends.append(formula(data))
                row[t] = value
                found.append((ends[0] - ends[1]) / (2 * step))
        np.testing.assert_allclose(gradient(term, data), found, rtol=1e-6, atol=1e-7)


@ROWS
def test_a_sum_does_not_depend_on_the_cut(name: str, settings: dict[str, Any], expected: Expected) -> None:
    rng = np.random.default_rng(5)
    for term in METHODS[name](**settings).terms():
        data = BATCH[term.split]
        whole, order = total(term, data), rng.permutation(len(data.rows)).tolist()
        for num_cuts in (2, 3, len(order)):
            pieces = [data.take(order[i::num_cuts]) for i in range(num_cuts)]
            assert sum(total(term, piece) for piece in pieces) == pytest.approx(whole, rel=1e-12)
        assert total(term, data.take([])) == 0.0


@ROWS
def test_the_first_term_leads_and_only_npo_compares(name: str, settings: dict[str, Any], expected: Expected) -> None:
    method = METHODS[name](**settings)
    assert streamed_splits(method) == tuple(split for split, *_ in expected.values())
    assert needs_reference(method) == (name == "npo")


def test_the_refusal_takes_the_place_of_the_forget_answer() -> None:
    assert streamed_splits(METHODS["po"]()) == ("refusal", "retain")


def test_fine_tuning_is_the_likelihood_of_one_split() -> None:
    [term] = Finetune().terms()
    assert (term.split, term.unit, term.weight) == ("retain", "tokens", 1.0)
    assert total(term, BATCH["retain"]) == pytest.approx(cross_entropy(BATCH["retain"]), rel=1e-12)
    assert "finetune" not in METHODS


def npo_term(**settings: Any) -> Term:
    return METHODS["npo"](**settings).terms()[0]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("beta", [0.01, 0.1, 3.0])
def test_npo_at_the_reference_is_the_same_for_every_sequence(beta: float, reduction: str) -> None:
    data = BATCH["forget"]
    at_reference = Answers(data.rows, np.array([row.sum() if len(row) else np.nan for row in data.rows]))
    num_sequences = sum(len(row) > 0 for row in data.rows)
    assert num_sequences == len(data.rows) - 1
    loss = total(npo_term(beta=beta, reduction=reduction), at_reference)
    assert loss == pytest.approx(num_sequences * 2 / beta * np.log(2), rel=1e-12)


@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_npo_weighs_each_sequence_by_how_much_of_it_is_left(beta: float) -> None:
    data, found = BATCH["forget"], []
    for row, reference in zip(data.rows, data.reference, strict=True):
        weight = 2 * np.exp(beta * row.sum()) / (np.exp(beta * row.sum()) + np.exp(beta * reference))
        found += [weight] * len(row)
    np.testing.assert_allclose(gradient(npo_term(beta=beta), data), found, rtol=1e-9)


def test_npo_without_temperature_is_gradient_ascent() -> None:
    ascend = gradient(METHODS["ga"]().terms()[0], BATCH["forget"])
    distances = [float(np.abs(gradient(npo_term(beta=beta), BATCH["forget"]) - ascend).max()) for beta in (1e-1, 1e-3, 1e-5)]
    assert distances[0] > 0.01 and distances[1] < 1e-2 * 1.1 * distances[0] and distances[2] < 1e-4 * 1.1 * distances[0]


def test_npo_by_the_mean_is_the_released_loss_of_a_batch_of_one() -> None:
    beta, data = 0.1, BATCH["forget"]
    term = npo_term(beta=beta, reduction="mean")
    for i, row in enumerate(data.rows):
        if len(row):
            current, reference = -row.mean(), -data.reference[i] / len(row)
            released = -(2 / beta) * np.log(1 / (1 + np.exp(-beta * (current - reference))))
            assert total(term, data.take([i])) == pytest.approx(released, rel=1e-9)


def test_npo_stays_finite_far_from_the_reference() -> None:
    data = Answers([np.full(40, -700.0), np.full(40, -0.1)], np.array([-4.0, -90_000.0]))
    term = npo_term(beta=1.0)
    assert total(term, data) == pytest.approx(2 * (90_000 - 4), rel=1e-12)
    np.testing.assert_allclose(gradient(term, data), [0.0] * 40 + [2.0] * 40, atol=1e-12)


def test_npo_without_reference_is_not_a_number() -> None:
    assert np.isnan(total(npo_term(), Answers([np.array([-1.0])], np.array([np.nan]))))


@pytest.mark.parametrize("name", METHODS)
def test_unknown_fields_and_senseless_values_are_refused(name: str) -> None:
    parse = TypeAdapter[Method](MethodConfig).validate_python
    assert parse({"name": name}) == METHODS[name]()
    for field, value in (("gamma", 1.0), ("retain_weights", 1.0), ("retain_weight", -1.0), ("beta", 0.0), ("beta", -0.1)):
        with pytest.raises(ValidationError, match=field):
            parse({"name": name, field: value})
    with pytest.raises(ValidationError):
        parse({"name": f"{name}x"})


def test_a_method_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        GradDiff().retain_weight = 2.0  # type: ignore[misc]
