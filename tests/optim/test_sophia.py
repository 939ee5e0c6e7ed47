"""SophiaG against a plain loop over the formulas, against numbers worked out by hand, and against itself after a checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from soul.optim import base
from soul.optim.sophia import SophiaG
from soul.records import InputError

SHAPES = [(5, 7), (13,), (), (3, 1, 4), (0, 4), (64, 33)]


def make_params(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def set_grads(params: list[nn.Parameter], *, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)


class PlainSophia:
    """The formulas of the module docstring, one tensor at a time."""

    def __init__(self, params: list[nn.Parameter], *, lr: float, wd: float, b1: float, b2: float, rho: float, eps: float) -> None:
        self.params, self.lr, self.wd, self.b1, self.b2, self.rho, self.eps = params, lr, wd, b1, b2, rho, eps
        self.m = [torch.zeros_like(p.detach()) for p in params]
        self.h = [torch.zeros_like(p.detach()) for p in params]

    def update_hessian(self, scale: float) -> None:
        for p, h in zip(self.params, self.h, strict=True):
            assert p.grad is not None
            h.copy_(self.b2 * h).addcmul_(p.grad, p.grad, value=(1 - self.b2) * scale)

    def step(self, num_updates: int) -> None:
        rho = self.rho * (1 / (1 - self.b2**num_updates)) if num_updates else 0.0
        for p, m, h in zip(self.params, self.m, self.h, strict=True):
            assert p.grad is not None
            m.copy_(self.b1 * m).add_(p.grad, alpha=1 - self.b1)
            u = torch.clamp(m / torch.clamp(rho * h, min=self.eps), -1, 1)
            p.data.copy_(p.data * (1 - self.lr * self.wd)).add_(u, alpha=-self.lr)


@pytest.mark.parametrize("foreach", [True, False, None])
@pytest.mark.parametrize("chunk", [10, 64, base.CHUNK_NUMEL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bit_equal_to_a_plain_loop(monkeypatch: pytest.MonkeyPatch, foreach: bool | None, chunk: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(base, "CHUNK_NUMEL", chunk)
    params, plain_params = make_params(dtype), make_params(dtype)
    optimizer = SophiaG(params, lr=0.01, rho=0.3, weight_decay=0.1, eps=1e-9, foreach=foreach)
    plain = PlainSophia(plain_params, lr=0.01, wd=0.1, b1=0.9, b2=0.95, rho=0.3, eps=1e-9)
    num_updates = 0
    for step in range(12):
        if step % 3 == 1:
            num_updates += 1
            set_grads([*params], seed=100 + step)
            set_grads([*plain_params], seed=100 + step)
            optimizer.update_hessian(scale=7.0)
            plain.update_hessian(7.0)
            optimizer.set_hessian_updates(num_updates)
        set_grads(params, seed=step)
        set_grads(plain_params, seed=step)
        optimizer.step()
        plain.step(num_updates)
    for p, q, m, h in zip(params, plain_params, plain.m, plain.h, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.state[p]["exp_avg"], m)
        assert torch.equal(optimizer.hessian(p), h)


def test_transposed_and_strided_tensors_are_cut_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "CHUNK_NUMEL", 10)
    values, grads = torch.randn(7, 9), torch.randn(7, 9)
    strided, plain = nn.Parameter(values.t().contiguous().t()), nn.Parameter(values.clone())
    for p in (strided, plain):
        p.grad = grads.clone()
        optimizer = SophiaG([p], lr=0.1, rho=1.0)
        optimizer.update_hessian()
        optimizer.set_hessian_updates(1)
        optimizer.step()
    assert torch.equal(strided, plain)


def test_one_weight_by_hand() -> None:
    p = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = SophiaG([p], lr=0.1, betas=(0.5, 0.5), rho=0.25, weight_decay=0.5)
    p.grad = torch.tensor([4.0], dtype=torch.float64)
    optimizer.update_hessian(scale=2.0)  # h = 0.5 * 2 * 16 = 16, unbiased 32
    optimizer.set_hessian_updates(1)
    p.grad = torch.tensor([4.0], dtype=torch.float64)
    optimizer.step()  # m = 2, denominator 0.25 * 32 = 8, direction 0.25; 2 * 0.95 - 0.1 * 0.25
    assert optimizer.hessian(p).item() == 16.0
    assert p.item() == pytest.approx(1.875, abs=1e-15)
    optimizer.set_rho(0.01)  # denominator 0.32 < m = 3: clipped
    optimizer.step()
    assert p.item() == pytest.approx(1.875 * 0.95 - 0.1, abs=1e-15)


def test_without_curvature_the_step_is_a_sign_step() -> None:
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.tensor([3.0, -1e-9, 0.0, 1e-3])
    optimizer = SophiaG([p], lr=0.5)
    optimizer.hessian(p).fill_(1e9)  # not counted by the caller, so not used
    optimizer.step()
    assert p.tolist() == [-0.5, 0.5, 0.0, -0.5]


@pytest.mark.parametrize("num_updates", [1, 2, 5, 40])
def test_bias_corrected_curvature_of_a_constant_gradient_is_its_square(num_updates: int) -> None:
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = SophiaG([nn.Parameter(torch.zeros(0, 2)), p], lr=0.1)
    p.grad = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    for _ in range(num_updates):
        optimizer.update_hessian(scale=3.0)
    optimizer.set_hessian_updates(num_updates)
    stats = optimizer.curvature_stats()
    assert stats.mean.item() == pytest.approx((3 * 1 + 3 * 4 + 0) / 3, rel=1e-12)
    assert stats.maximum.item() == pytest.approx(12.0, rel=1e-12)
    assert stats.zero_fraction.item() == pytest.approx(1 / 3)


def test_gradients_survive_a_curvature_update_and_parameters_do_not_move() -> None:
    params = make_params()
    before = [p.detach().clone() for p in params]
    optimizer = SophiaG(params, lr=0.1, weight_decay=0.1)
    set_grads(params, seed=3)
    grads = [p.grad.clone() for p in params if p.grad is not None]
    optimizer.update_hessian(scale=2.0)
    for p, old, grad in zip(params, before, grads, strict=True):
        assert p.grad is not None
        assert torch.equal(p, old)
        assert torch.equal(p.grad, grad)
        assert not optimizer.state[p]["exp_avg"].any()


def test_hessian_mode_routes_step_to_the_curvature_update() -> None:
    routed, direct = make_params(), make_params()
    first, second = SophiaG(routed, lr=0.1, weight_decay=0.1), SophiaG(direct, lr=0.1, weight_decay=0.1)
    for params in (routed, direct):
        set_grads(params, seed=0)
    with first.doing("hessian"):
        first.step()
    second.update_hessian()
    for optimizer in (first, second):
        optimizer.set_hessian_updates(1)
        optimizer.step()
    for p, q in zip(routed, direct, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(first.hessian(p), second.hessian(q))


def advance(optimizer: SophiaG, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        set_grads(params, seed=step)
        if step % 2 == 0:
            optimizer.update_hessian(scale=3.0)
            optimizer.set_hessian_updates(step // 2 + 1)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_from_a_state_dict_continues_bit_for_bit(dtype: torch.dtype) -> None:
    straight, resumed = make_params(dtype), make_params(dtype)
    optimizer = SophiaG(straight, lr=0.02, rho=0.2, weight_decay=0.1)
    advance(optimizer, straight, range(5))
    saved = copy.deepcopy(optimizer.state_dict())
    for p, q in zip(resumed, straight, strict=True):
        p.data.copy_(q.data)
    other = SophiaG(resumed, lr=9.0, rho=9.0)
    storages = [other.hessian(p).data_ptr() for p in resumed]
    other.load_state_dict(saved)
    assert storages == [other.hessian(p).data_ptr() for p in resumed], "state is filled in place"
    assert all(other.state[p]["exp_avg"].dtype == torch.float32 for p in resumed), "float32 state of bfloat16 weights stays float32"
    assert other.param_groups[0]["hessian_updates"] == 3
    advance(optimizer, straight, range(5, 9))
    advance(other, resumed, range(5, 9))
    for p, q in zip(resumed, straight, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(other.hessian(p), optimizer.hessian(q))


def test_a_checkpoint_from_before_the_first_step_resets_the_state() -> None:
    p = nn.Parameter(torch.zeros(3))
    optimizer = SophiaG([p], lr=0.1)
    saved = SophiaG([nn.Parameter(torch.zeros(3))], lr=0.1, eager_state=False).state_dict()
    advance(optimizer, [p], range(3))
    optimizer.load_state_dict(saved)
    assert not optimizer.hessian(p).any() and not optimizer.state[p]["exp_avg"].any()


def test_a_checkpoint_of_another_model_is_refused() -> None:
    saved = SophiaG([nn.Parameter(torch.zeros(1))], lr=0.1).state_dict()
    with pytest.raises(InputError, match="exp_avg"):
        SophiaG([nn.Parameter(torch.zeros(4))], lr=0.1).load_state_dict(saved)


def test_narrow_storage_is_computed_wide_and_rounded_once() -> None:
    wide, narrow = make_params(torch.float32), make_params(torch.bfloat16)
    for p, q in zip(wide, narrow, strict=True):
        p.data.copy_(q.data)
    for params in (wide, narrow):
        optimizer = SophiaG(params, lr=0.01, rho=0.3, weight_decay=0.1)
        set_grads(params, seed=1)
        for p in params:
            assert p.grad is not None
            p.grad = p.grad.bfloat16().to(p.dtype)
        optimizer.update_hessian(scale=2.0)
        optimizer.set_hessian_updates(1)
        optimizer.step()
    for p, q in zip(wide, narrow, strict=True):
        assert torch.equal(p.detach().bfloat16(), q)


def test_state_is_created_eagerly_unless_told_otherwise() -> None:
    params = make_params()
    assert set(SophiaG(params, lr=0.1).state) == set(params)
    lazy = SophiaG(params, lr=0.1, eager_state=False)
    assert not lazy.state
    set_grads(params[:2], seed=0)
    lazy.step()
    assert set(lazy.state) == set(params[:2])


def test_a_closure_is_evaluated_with_gradients() -> None:
    p = nn.Parameter(torch.tensor([1.0]))
    optimizer = SophiaG([p], lr=0.5)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 1.0
    assert p.item() == 0.5


def test_without_groups_the_state_is_still_found() -> None:
    """ZeRO-3 empties the groups between steps and creates its flat partitions after the optimizer."""
    p = nn.Parameter(torch.zeros(3))
    optimizer = SophiaG([p], lr=0.1, eager_state=False)
    partition = torch.zeros(5)
    optimizer.init_state([partition])
    optimizer.hessian(partition).fill_(0.05)
    optimizer.set_hessian_updates(1)
    optimizer.param_groups[0]["params"] = []
    stats = optimizer.curvature_stats()
    assert stats.sums[0] == 5
    assert stats.mean.item() == pytest.approx(1.0)


@pytest.mark.parametrize("foreach", [True, False])
def test_buckets_hold_every_element_once_and_never_more_than_a_chunk(monkeypatch: pytest.MonkeyPatch, foreach: bool) -> None:
    monkeypatch.setattr(base, "CHUNK_NUMEL", 30)
    shapes = [(5, 7), (13,), (), (9,), (0, 4), (3, 40), (100,), (1, 2, 3)]
    params = [torch.full(shape, float(i), dtype=torch.float64 if i == 3 else torch.float32) for i, shape in enumerate(shapes)]
    seen = []
    for tensors, twins in base.buckets([(p, p + 0.5) for p in params], foreach=foreach):
        assert sum(t.numel() for t in tensors) <= 30 or (len(tensors) == 1 and tensors[0].shape == (1, 40)), "a row is not cut"
        assert len(tensors) == 1 or (foreach and len({t.dtype for t in tensors}) == 1)
        for tensor, twin in zip(tensors, twins, strict=True):
            assert tensor.numel() > 0
            assert torch.equal(tensor + 0.5, twin)
            seen += tensor.flatten().tolist()
    assert sorted(seen) == sorted(value for p in params for value in p.flatten().tolist())


def test_a_gradient_sharded_unlike_its_parameter_is_refused() -> None:
    p = torch.zeros(4, 1)
    with pytest.raises(InputError, match="alike"):
        list(base.buckets([(p, torch.zeros(4, 4))], foreach=True))


@pytest.mark.parametrize(
    "bad",
    [
        {"lr": -1.0},
        {"rho": 0.0},
        {"rho": -0.1},
        {"rho": float("nan")},
        {"eps": 0.0},
        {"weight_decay": -0.1},
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.9)},
        {"state_dtype": torch.float16},
        {"state_dtype": torch.bfloat16, "betas": (0.9, 0.999)},
    ],
)
def test_bad_hyperparameters_are_refused(bad: dict[str, object]) -> None:
    arguments: dict[str, object] = {"lr": 0.1, **bad}
    with pytest.raises(InputError):
        SophiaG([nn.Parameter(torch.zeros(2))], **arguments)  # type: ignore[arg-type]


def test_statistics_count_each_kind_of_coordinate_and_reset() -> None:
    p = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = SophiaG([p], lr=0.1, betas=(0.0, 0.0), rho=1.0)
    p.grad = torch.ones(5, dtype=torch.float64)
    optimizer.update_hessian()  # h = 1 everywhere
    optimizer.set_hessian_updates(1)
    p.grad = torch.tensor([0.0, 0.5, -0.25, 2.0, -3.0], dtype=torch.float64)
    optimizer.step()
    assert not optimizer.take_stats().sums.any(), "nothing is collected unasked"
    optimizer.collect_stats = True
    for _ in range(2):
        optimizer.step()
    stats = optimizer.take_stats()
    assert (stats.num_unclipped.item(), stats.num_moved.item(), stats.numel.item()) == (4, 8, 10)
    assert stats.unclipped_fraction.item() == 0.5
    assert stats.update_squared_norm.item() == pytest.approx(2 * 0.01 * (0.25 + 0.0625 + 1 + 1))
    assert not optimizer.take_stats().sums.any()


def test_statistics_do_not_depend_on_the_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    sums: list[Tensor] = []
    for chunk, foreach in ((10, True), (64, False), (base.CHUNK_NUMEL, True)):
        monkeypatch.setattr(base, "CHUNK_NUMEL", chunk)
        params = make_params(torch.float64)
        optimizer = SophiaG(params, lr=0.1, rho=0.2, foreach=foreach)
        optimizer.collect_stats = True
        advance(optimizer, params, range(3))
        sums.append(optimizer.take_stats().sums)
        assert 0 < sums[-1][0] < sums[-1][1]
    assert torch.allclose(sums[0], sums[1], rtol=1e-13)
    assert torch.allclose(sums[0], sums[2], rtol=1e-13)
