"""How curvature is measured on the rows of a step: which rows, which weights, and the estimates of the diagonal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from soul.batch import IGNORE_INDEX, Batch
from soul.objectives.methods import Method
from soul.optim.configs import OneShotConfig, OptimizerConfig
from soul.optim.curvature import count_before, probe_signs
from soul.optim.sophia import SophiaG
from soul.records import InputError
from soul.train.divisors import Divisors, WholePass
from soul.train.engine import Engine, unwrap
from soul.train.objective import Part, root_weighted_nll, sampled_loss, select, splits_of, supervised_rows, take, weighted_nll


def hessian_splits(method: Method, optimizer: OptimizerConfig) -> tuple[str, ...]:
    """Which streamed splits curvature is measured on: retain rows where the method has them (influence theory), else the leading split.

    Raises:
        InputError: retain rows are asked for, and the method does not train on any.
    """
    if isinstance(optimizer, OneShotConfig):
        return ("forget", "retain") if optimizer.hessian_data == "both" else (optimizer.hessian_data,)
    streamed = tuple(term.split for term in method.terms() if term.weight > 0)
    choice = getattr(optimizer, "hessian_data", None)
    if choice == "both":
        return streamed
    if choice == "retain" and "retain" not in streamed:
        raise InputError(
            f"hessian_data retain needs a method that trains on retain rows, got {method.name} without. "
            "Set optimizer.hessian_data (--hessian-data) to forget, or choose a method with a retain weight."
        )
    return ("retain",) if "retain" in streamed and choice != "forget" else streamed[:1]


def measure_curvature(
    engine: Engine,
    batches: Sequence[Batch],
    method: Method,
    optimizer: OptimizerConfig,
    divisors: Divisors,
    *,
    seed: int,
    update: int,
) -> bool:
    """Update h from the rows of a step, whose gradients are never norm-clipped; whether this rank's h is finite behind it.

    `update`: number of the update, which names its noise.
    """
    parts = _parts(method, optimizer, divisors)
    match optimizer.estimator:
        case "hutchinson":
            fold_hutchinson(engine, batches, parts, seed=seed, update=update)
        case "fisher":
            fold_fisher(engine, batches, parts)
        case _:
            fold_gauss_newton(engine, batches, parts, seed=seed, update=update)
    assert isinstance(engine.optimizer, SophiaG)
    return all(bool(h.isfinite().all()) for _, hessians in engine.optimizer.state_buckets() for h in hessians)


def _parts(method: Method, optimizer: OptimizerConfig, divisors: Divisors) -> list[Part]:
    """The terms whose curvature is wanted, and the factor of each in the objective."""
    if isinstance(optimizer, OneShotConfig):
        assert isinstance(divisors, WholePass)
        weights = divisors.token_weights(optimizer.hessian_data)
        return [(term, weights[term.split]) for term in method.terms() if term.split in weights]
    splits = hessian_splits(method, optimizer)
    return [(term, term.weight / divisors.of_term(term)) for term in method.terms() if term.split in splits]


def curvature_mean(engine: Engine) -> float:
    """Mean of h over all weights, wherever they are."""
    optimizer = engine.optimizer
    assert isinstance(optimizer, SophiaG)
    local = optimizer.curvature_stats(quantiles=False)
    sums = local.sums.to(engine.device)
    return float(replace(local, sums=engine.all_reduce_sum(sums) if engine.sharded else sums).mean)


def fold_gauss_newton(engine: Engine, batches: Sequence[Batch], parts: Sequence[Part], *, seed: int, update: int) -> None:
    """Gauss-Newton-Bartlett: sampled labels, the gradient of the whole step squared once, so that no cut of the step changes h."""
    chosen = [select(batch, splits_of(parts)) for batch in batches]
    for i, (batch, occurrence_B) in enumerate(zip(chosen, occurrences(engine, chosen), strict=True)):
        loss = sampled_loss(engine, batch, parts, occurrence_B, seed=seed, update=update)
        engine.backward(loss, last=i == len(chosen) - 1)
    engine.hessian_step()


def occurrences(engine: Engine, batches: Sequence[Batch]) -> list[Tensor]:
    """How often each row is in the step before: in earlier rows and micro-batches of this rank, and on the ranks before it.

    A row without labels is a filler and no occurrence of what it was made of.
    """
    names = [(batch.split_B, batch.index_B.where((batch.labels_BT != IGNORE_INDEX).any(1), -1)) for batch in batches]
    rows = torch.cat([torch.stack(name, dim=1) for name in names])
    start = 0
    if engine.world > 1:
        sizes = torch.zeros(engine.world, dtype=torch.float64, device=engine.device)
        sizes[engine.rank] = len(rows)
        ends = [int(end) for end in engine.all_reduce_sum(sizes).cumsum(0).tolist()]
        start = ends[engine.rank] - len(rows)
        table = torch.zeros(ends[-1], 2, dtype=torch.float64, device=engine.device)  # holds every index below 2^53
        table[start : start + len(rows)] = rows.double()
        rows = engine.all_reduce_sum(table)[: start + len(rows)].long()
    counted = count_before([(split, index) for split, index in rows.tolist()])[start:]
    return list(torch.tensor(counted, dtype=torch.long).split([len(batch.index_B) for batch in batches]))


def fold_fisher(engine: Engine, batches: Sequence[Batch], parts: Sequence[Part]) -> None:
    """Empirical Fisher: the squared gradient of every row's own loss.

    Gradients meet over ranks before anything is squared, so that one row at a time is in work, on one rank; the others run a filler.
    """
    for batch in batches:
        rows = supervised_rows(batch, splits_of(parts))
        shares = torch.zeros(engine.world, dtype=torch.float64, device=engine.device)
        shares[engine.rank] = len(rows)
        for rank, num_rows in enumerate(engine.all_reduce_sum(shares).int().tolist()):
            for i in range(num_rows):
                row = take(batch, [rows[i]]) if rank == engine.rank else select(batch, ())
                engine.backward(root_weighted_nll(engine, row, parts), last=True)
                engine.hessian_step()


def fold_hutchinson(engine: Engine, batches: Sequence[Batch], parts: Sequence[Part], *, seed: int, update: int) -> None:
    """Hutchinson's estimate u * (H u) of the diagonal of the Hessian of the weighted loss, with an exact product.

    H u is a sum over rows, so neither micro-batches nor ranks change it. Whole parameters are needed: what shards them reduces in the
    backward pass, through which nothing can be differentiated again.
    """
    assert not engine.sharded, "the config refuses sharded engines"
    model = unwrap(engine.model)  # DDP's hooks have no part in this
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    probes = {name: probe_signs(name, tuple(p.shape), seed=seed, update=update).to(p) for name, p in parameters.items()}
    products = {name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in parameters.items()}
    for batch in batches:
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative; checkpointed blocks run again in the product
            loss = weighted_nll(engine, model, batch, parts)
            for name, product in hessian_product(loss, parameters, probes).items():
                products[name] += product
    for name, parameter in parameters.items():
        parameter.grad = engine.all_reduce_sum(products.pop(name)).to(parameter.dtype).mul_(probes.pop(name))
    engine.hessian_step()


def hessian_product(loss: Tensor, parameters: Mapping[str, Tensor], vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """H v of a loss by double backward; a parameter that the loss does not depend on is left out.

    Raises:
        InputError: the model holds an operation without a second derivative.
    """
    names, values = list(parameters), list(parameters.values())
    gradients = torch.autograd.grad(loss, values, create_graph=True, allow_unused=True)
    inner = torch.stack([(g * vector[name]).sum() for name, g in zip(names, gradients, strict=True) if g is not None]).sum()
    if not inner.requires_grad:  # linear, or no rows
        return {}
    missing = "an autograd function that can be differentiated once" if _has_dead_end(inner) else ""
    if not missing:
        try:
            products = torch.autograd.grad(inner, values, allow_unused=True)
        except RuntimeError as error:
            if "derivative" not in str(error):
                raise
            missing = str(error)
    if missing:
        raise InputError(f"sophia_h needs second derivatives, which this model has not ({missing}). Use --optimizer sophia.")
    return {name: product for name, product in zip(names, products, strict=True) if product is not None}


def _has_dead_end(tensor: Tensor) -> bool:
    """Whether a once-differentiable function lies behind `tensor`. Autograd is silent there: the path ends, and its share is missing."""
    waiting, seen = [tensor.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            return True
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
    return False
