"""How curvature is measured on the rows of a step: which rows, which weights, and the estimates of the diagonal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from soul.batch import Batch
from soul.objectives.methods import Method
from soul.optim.configs import OneShotConfig, OptimizerConfig
from soul.optim.curvature import probe_signs
from soul.optim.sophia import SophiaG
from soul.records import InputError
from soul.train.divisors import Divisors, WholePass
from soul.train.engine import Engine, unwrap
from soul.train.objective import root_weighted_nll, sampled_loss, select, supervised_rows, take, weighted_nll


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
) -> None:
    """Update h from the rows of a step; its gradients are never norm-clipped. `update`: number of the update, which names its noise."""
    if isinstance(optimizer, OneShotConfig):
        assert isinstance(divisors, WholePass)
        token_weights = divisors.token_weights(optimizer.hessian_data)
    else:
        token_weights = _step_weights(method, optimizer, divisors)
    match optimizer.estimator:
        case "hutchinson":
            fold_hutchinson(engine, batches, token_weights, seed=seed, update=update)
        case "fisher":
            fold_fisher(engine, batches, token_weights)
        case _:
            fold_gauss_newton(engine, batches, token_weights, seed=seed, update=update)


def _step_weights(method: Method, optimizer: OptimizerConfig, divisors: Divisors) -> dict[str, float]:
    """The weight of each token in the loss of the step."""
    splits = hessian_splits(method, optimizer)
    return {term.split: term.weight / divisors.counts[term.split, "tokens"] for term in method.terms() if term.split in splits}


def curvature_mean(engine: Engine) -> float:
    """Mean of h over all weights, wherever they are."""
    optimizer = engine.optimizer
    assert isinstance(optimizer, SophiaG)
    local = optimizer.curvature_stats(quantiles=False)
    sums = local.sums.to(engine.device)
    return float(replace(local, sums=engine.all_reduce_sum(sums) if engine.sharded else sums).mean)


def fold_gauss_newton(engine: Engine, batches: Sequence[Batch], token_weights: dict[str, float], *, seed: int, update: int) -> None:
    """Gauss-Newton-Bartlett: sampled labels, squared per micro-batch after the cross-rank reduce."""
    for i, batch in enumerate(batches):
        engine.backward(sampled_loss(engine, batch, token_weights, seed=seed, update=update), last=True)
        engine.hessian_step(decay=i == 0)


def fold_fisher(engine: Engine, batches: Sequence[Batch], token_weights: dict[str, float]) -> None:
    """Empirical Fisher: the squared gradient of every row's own loss.

    Gradients meet over ranks before anything is squared, so that one row at a time is in work, on one rank; the others run a filler.
    """
    for batch in batches:
        rows = supervised_rows(batch, list(token_weights))
        shares = torch.zeros(engine.world, dtype=torch.float64, device=engine.device)
        shares[engine.rank] = len(rows)
        for rank, num_rows in enumerate(engine.all_reduce_sum(shares).int().tolist()):
            for i in range(num_rows):
                row = take(batch, [rows[i]]) if rank == engine.rank else select(batch, ())
                engine.backward(root_weighted_nll(engine, row, token_weights), last=True)
                engine.hessian_step(decay=False)


def fold_hutchinson(engine: Engine, batches: Sequence[Batch], token_weights: dict[str, float], *, seed: int, update: int) -> None:
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
            loss = weighted_nll(engine, model, batch, token_weights)
            for name, product in hessian_product(loss, parameters, probes).items():
                products[name] += product
    for name, parameter in parameters.items():
        parameter.grad = engine.all_reduce_sum(products.pop(name)).to(parameter.dtype).mul_(probes.pop(name))
    engine.hessian_step(decay=True)


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
