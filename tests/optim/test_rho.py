"""The auto-rho controller: histograms that merge over shards, the exact solution, and a fraction held in its band."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from soul.optim.rho import RhoController, log_ratio_histogram, rho_for, unclipped_fraction
from soul.optim.sophia import SophiaG
from soul.optim.stats import NUM_BINS, CurvatureStats, log_histogram, quantile
from soul.records import InputError


def sophia(m: torch.Tensor, h: torch.Tensor, *, num_updates: int = 3) -> SophiaG:
    """An optimizer whose state is given: the curvature as it is after bias correction."""
    p = nn.Parameter(torch.zeros_like(m))
    optimizer = SophiaG([p], lr=1e-3)
    optimizer.set_hessian_updates(num_updates)
    optimizer.state[p]["exp_avg"].copy_(m)
    optimizer.hessian(p).copy_(h * (1 - 0.95**num_updates))
    return optimizer


@pytest.mark.parametrize("target", [0.01, 0.1, 0.3, 0.5, 0.9])
def test_the_solution_leaves_the_target_fraction_unclipped(target: float) -> None:
    generator = torch.Generator().manual_seed(0)
    m = torch.randn(20_001, generator=generator, dtype=torch.float64)
    h = (2 * torch.randn(20_001, generator=generator, dtype=torch.float64)).exp()
    rho = rho_for(log_ratio_histogram(sophia(m, h)), target)
    assert (m.abs() < rho * h).double().mean().item() == pytest.approx(target, abs=0.005)
    assert unclipped_fraction(log_ratio_histogram(sophia(m, h)), rho) == pytest.approx(target, abs=1e-9)


def test_histograms_of_shards_add_up_to_the_histogram_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(1)
    m, h = torch.randn(999, generator=generator), torch.rand(999, generator=generator)
    m[::7], h[::5] = 0.0, 0.0
    whole = log_ratio_histogram(sophia(m, h))
    parts = [log_ratio_histogram(sophia(m[cut], h[cut])) for cut in (slice(0, 100), slice(100, 101), slice(101, None))]
    assert torch.equal(whole, torch.stack(parts).sum(0))
    assert whole.sum() == ((m != 0) & (h != 0)).sum(), "neither what does not move nor what has no curvature is counted"


def test_coordinates_without_curvature_have_no_say() -> None:
    """They take sign steps whatever rho is: half of an adapter's, before the other half has moved."""
    generator = torch.Generator().manual_seed(5)
    m, h = torch.randn(999, generator=generator), torch.rand(999, generator=generator)
    both = sophia(torch.cat([m, torch.ones(2000)]), torch.cat([h, torch.zeros(1000), -torch.ones(1000)]))
    assert torch.equal(log_ratio_histogram(both), log_ratio_histogram(sophia(m, h)))


def test_the_ratios_of_a_step_are_known_before_it_is_made() -> None:
    generator = torch.Generator().manual_seed(6)
    p = nn.Parameter(torch.zeros(5000))
    optimizer = SophiaG([p], lr=1e-3)
    for step in range(3):
        p.grad = torch.randn(p.shape, generator=generator)
        optimizer.update_hessian()
        optimizer.set_hessian_updates(step + 1)
        p.grad = torch.randn(p.shape, generator=generator)
        before = [tensor.clone() for tensor in (p, *optimizer.state[p].values())]
        with optimizer.doing("ratios"):
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before, (p, *optimizer.state[p].values()), strict=True))
        foreseen = optimizer.take_ratios()
        optimizer.step()
        assert torch.equal(foreseen, log_ratio_histogram(optimizer))
    assert not optimizer.take_ratios().any()


def test_the_histogram_agrees_with_the_step_statistics() -> None:
    generator = torch.Generator().manual_seed(2)
    p = nn.Parameter(torch.zeros(30_000))
    optimizer = SophiaG([p], lr=1e-3, rho=0.7)
    p.grad = torch.randn(p.shape, generator=generator)
    optimizer.update_hessian()
    optimizer.set_hessian_updates(1)
    p.grad = torch.randn(p.shape, generator=generator)
    optimizer.collect_stats = True
    optimizer.step()
    assert unclipped_fraction(log_ratio_histogram(optimizer), 0.7) == pytest.approx(
        optimizer.take_stats().unclipped_fraction.item(), abs=0.003
    )


def test_the_controller_brings_a_drifting_problem_into_its_band() -> None:
    """A noisy quadratic whose curvature grows a hundredfold and whose gradients shrink: no fixed rho fits all of it."""
    generator = torch.Generator().manual_seed(3)
    curvature = (1.5 * torch.randn(4000, generator=generator)).exp()
    p = nn.Parameter(torch.randn(4000, generator=generator))
    optimizer, controller = SophiaG([p], lr=3e-3), RhoController(target=0.3, band=0.05)
    optimizer.collect_stats = True
    fractions, rhos = [], []
    for step in range(240):
        growth = 100 ** (step / 240)
        if step % 10 == 0:
            p.grad = (growth * curvature).sqrt() * torch.randn(4000, generator=generator)
            optimizer.update_hessian()
            optimizer.set_hessian_updates(step // 10 + 1)
        p.grad = growth**-0.5 * (curvature * p.detach() + torch.randn(4000, generator=generator))
        optimizer.step()
        fractions.append(optimizer.take_stats().unclipped_fraction.item())
        if step % 5 == 0:
            optimizer.set_rho(controller.update(log_ratio_histogram(optimizer)))
            rhos.append(controller.rho)
    assert all(0.1 < fraction < 0.45 for fraction in fractions)
    assert sum(0.23 < fraction < 0.37 for fraction in fractions[20:]) > 0.8 * 220
    assert max(rhos) > 5 * min(rhos), "a fixed rho would not have done"


def histogram_of(*ratios: float) -> torch.Tensor:
    return log_histogram(torch.tensor(ratios, dtype=torch.float64))


def test_within_the_band_rho_stays_and_outside_it_goes_part_of_the_way() -> None:
    ratios = torch.logspace(-3, 3, 6001, dtype=torch.float64)  # uniform in log space: fraction f is at 10^(6 f - 3)
    histogram = log_histogram(ratios)
    controller = RhoController(target=0.5, band=0.1, smoothing=0.5)
    assert controller.update(histogram) == pytest.approx(1.0, rel=0.02)
    settled = controller.rho
    assert controller.update(log_histogram(ratios * 10**0.5)) == settled  # fraction 0.42
    assert controller.update(log_histogram(ratios * 100)) == pytest.approx(10.0, rel=0.03)  # fraction 0.17, solution 100


@pytest.mark.parametrize(
    "histogram", [torch.zeros(NUM_BINS, dtype=torch.int64), histogram_of(math.inf, math.inf, 1.0), histogram_of(math.inf)]
)
def test_without_a_solution_nothing_changes(histogram: torch.Tensor) -> None:
    controller = RhoController(target=0.5, rho=0.07)
    assert controller.update(histogram) == 0.07
    assert not controller.is_measured


def test_rho_stays_within_its_bounds() -> None:
    controller = RhoController(bounds=(1e-2, 1e2))
    assert controller.update(histogram_of(1e9, 1e9, 1e9)) == 1e2
    assert RhoController(bounds=(1e-2, 1e2)).update(histogram_of(1e-9, 1e-9, 1e-9)) == 1e-2


def test_a_restored_controller_continues_the_same() -> None:
    generator = torch.Generator().manual_seed(4)
    histograms = [log_histogram(torch.rand(500, generator=generator) * 10**k) for k in range(6)]
    straight, resumed = RhoController(), RhoController()
    for histogram in histograms[:3]:
        straight.update(histogram)
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    assert [straight.update(h) for h in histograms[3:]] == [resumed.update(h) for h in histograms[3:]]


@pytest.mark.parametrize("bad", [{"target": 0.0}, {"target": 1.0}, {"band": -0.1}, {"smoothing": 0.0}, {"rho": 0.0}, {"rho": 1e9}])
def test_bad_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(InputError):
        RhoController(**bad)  # type: ignore[arg-type]


def test_quantiles_of_the_histogram_are_those_of_the_values() -> None:
    values = (3 * torch.randn(10_000, generator=torch.Generator().manual_seed(5), dtype=torch.float64)).exp()
    for q in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert quantile(log_histogram(values), q) == pytest.approx(values.quantile(q).item(), rel=0.04)


def test_extreme_values_are_counted_at_the_ends() -> None:
    histogram = log_histogram(torch.tensor([0.0, 1e-40, math.inf, math.nan, 1e35]))
    assert [int(histogram[0]), int(histogram[-1]), int(histogram.sum())] == [2, 3, 5]
    assert quantile(histogram, 0.3) == 0.0
    assert quantile(histogram, 0.9) == math.inf


def test_curvature_statistics_merge_over_shards() -> None:
    h = torch.tensor([0.0, 0.0, 1.0, 4.0, 5.0])
    whole, parts = CurvatureStats.of([h]), CurvatureStats.of([h[:2], h[2:3], h[3:]])
    assert torch.equal(whole.sums, parts.sums) and torch.equal(whole.histogram, parts.histogram)
    assert [whole.mean.item(), whole.maximum.item(), whole.zero_fraction.item()] == pytest.approx([2.0, 5.0, 0.4])
    assert whole.quantile(0.2) == 0.0
    assert whole.quantile(0.6) == pytest.approx(1.0, rel=0.08)
