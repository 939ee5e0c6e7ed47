"""Training steps on one card: SO against FO, bf16 against fp32, FSDP2 against ZeRO-3; time, tokens a second, memory beside the plan's.

Llamas of 0.9 M to 7 G parameters with random weights, drawn on the card parameter by parameter; random rows, half of each the answer.
Every side is a run of its own through the loop and engine of a real run, from fresh weights, and sides take turns round by round: a ratio
is the median of the rounds' paired ratios, its quartiles beside it. What the memory plan says does not fit is named and left out.
NPO's reference log-probabilities are given: scoring them is no part of a step.

    python -m perf.gpu.steps --json steps.json
    python -m perf.gpu.steps --models 1b --methods npo --precisions bf16 --engines fsdp,deepspeed
    python -m perf.gpu.steps --device cpu --models tiny --rounds 1 --steps 1 --warm-up 1 --length 16 --rows 2
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from perf._measure import Comparison, Moment, compare, interleaved, peak_bytes
from perf.gpu._card import MODELS, POSITIONS, Report, begin, memory_bytes, parser_of, random_llama, refuse, shape
from soul.batch import TokenRow
from soul.config import Config
from soul.data.feed import LocalFeed
from soul.data.pairing import PairedPlan
from soul.data.store import TokenStore
from soul.plan import memory_per_worker
from soul.report.numbers import memory
from soul.train.divisors import Divisors
from soul.train.engine import Engine
from soul.train.engines import make_engine
from soul.train.loop import Hooks, Progress, train

METHODS, PRECISIONS, ENGINES = ("npo", "grad_diff"), ("bf16", "fp32"), ("single", "fsdp", "deepspeed")
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "FO": {"name": "adamw"},
    "SO": {"name": "sophia", "hessian_every": 10, "hessian_data": "retain"},
}
NUM_STEPS = 4  # of rows that are told apart; the steps go round in them


@dataclass(frozen=True)
class Side:
    """One of what is compared."""

    model: str
    method: str
    order: str
    precision: str
    engine: str

    @property
    def name(self) -> str:
        return f"{self.order} {self.precision} {self.engine}"

    def config(self, options: argparse.Namespace) -> Config:
        engine = {"name": self.engine, "precision": self.precision, "gradient_checkpointing": options.gradient_checkpointing}
        steps = {"batch_size": options.rows, "micro_batch_size": options.micro_rows or options.rows, "save_every": 0, "eval_every": 0}
        schedule = {"schedule": "constant", "warmup_fraction": 0.0, "epochs": 10**9, "seed": options.seed}
        config = Config.model_validate(
            {"method": self.method, "optimizer": OPTIMIZERS[self.order], "engine": engine, "train": {**steps, **schedule}}
        )
        return config.decided(options.device)


class Bench:
    """Runs sides on one set of rows."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options, self.device = options, device

    def predicted(self, side: Side) -> int:
        """The plan's bytes of one worker, what is an upper bound included."""
        config = side.config(self.options)
        tokens = 2 * config.train.micro_batch_size * -(-self.options.length // 8) * 8
        items = memory_per_worker(config, shape(side.model), tokens=tokens, num_forget=NUM_STEPS * self.options.rows)
        return sum(item.num_bytes for item in items if not item.on_cpu)

    def feed(self, side: Side, engine: Engine, config: Config) -> LocalFeed:
        rng = np.random.default_rng(self.options.seed)
        vocabulary, length = MODELS[side.model]["vocab_size"], self.options.length

        def rows(number: int) -> list[TokenRow]:
            reference = -(length - length // 2) * math.log(vocabulary)
            return [TokenRow(i, rng.integers(3, vocabulary, length).tolist(), length // 2, reference) for i in range(number)]

        stores = {split: TokenStore.of_rows(rows(NUM_STEPS * self.options.rows)) for split in ("forget", "retain")}
        lengths = {split: store.lengths_R for split, store in stores.items()}
        plan = PairedPlan(lengths, batch_size=config.train.batch_size, seed=self.options.seed)
        return LocalFeed(plan, stores, 0, 1, config.train.micro_batch_size, 0)

    def run(self, side: Side, *, steps: int) -> Moment:
        """Seconds a step over the last `steps`, behind the warm-up."""
        config = side.config(self.options)
        moments: list[Moment] = []
        engine = make_engine(config.engine, rank=0, world=1, local_rank=0)
        eager = side.engine != "deepspeed"
        engine.prepare(
            lambda: random_llama(side.model, seed=self.options.seed, device=self.device),
            lambda model: config.optimizer.build(model.named_parameters(), eager_state=eager),
        )
        feed, total = self.feed(side, engine, config), self.options.warm_up + steps
        train(
            engine,
            method=config.method,
            optimizer=config.optimizer,
            config=config.train.model_copy(update={"max_steps": total}),
            steps=feed.steps(0, total),
            steps_per_epoch=feed.plan.steps_per_epoch,
            progress=Progress(),
            hooks=Hooks(after_step=lambda row: moments.append(Moment.now(self.device))),
            divisors=Divisors.of(feed.plan, feed.stores),
        )
        taken = moments[-1].since(moments[-1 - steps]).per(steps)
        if side.engine == "deepspeed":
            engine.model.destroy()  # type: ignore[operator]  # its hooks and buffers outlive it otherwise
        del engine, feed
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return taken

    def measure(self, sides: Sequence[Side]) -> tuple[dict[str, list[float]], list[dict[str, Any]]]:
        """Seconds a step per round, and what each side needs, beside the plan."""
        work: dict[str, Callable[[], Moment]] = {side.name: partial(self.run, side, steps=self.options.steps) for side in sides}
        walls = {name: [moment.wall for moment in found] for name, found in interleaved(work, rounds=self.options.rounds).items()}
        tokens = 2 * self.options.rows * self.options.length
        rows = []
        for side in sides:
            peak = peak_bytes(partial(self.run, side, steps=1), self.device)
            plan, step = self.predicted(side), sorted(walls[side.name])[len(walls[side.name]) // 2]
            facts = {"model": side.model, "method": side.method, "side": side.name, "step_s": step, "tokens_per_s": tokens / step}
            rows.append({**facts, "peak_bytes": peak, "predicted_bytes": plan, "predicted_over_measured": plan / peak})
        return walls, rows


def ratios(sides: Sequence[Side], walls: dict[str, list[float]], rows: Sequence[dict[str, Any]]) -> list[Comparison]:
    """SO / FO, bf16 / fp32 and ZeRO-3 / FSDP2 of sides that are alike in all else."""
    peaks = {row["side"]: float(row["peak_bytes"]) for row in rows}
    found = []
    for above in sides:
        for field, one, other in (("order", "SO", "FO"), ("precision", "bf16", "fp32"), ("engine", "deepspeed", "fsdp")):
            below = next((side for side in sides if side == _replaced(above, field, other)), None)
            if getattr(above, field) != one or below is None:
                continue
            what = f"{above.model} {above.method}"
            pair = [(side.name, walls[side.name]) for side in (above, below)]
            found.append(compare(field, f"{what} step", pair[0], pair[1], unit="s"))
            memories = [(side.name, [peaks[side.name]]) for side in (above, below)]
            found.append(compare(field, f"{what} peak memory", memories[0], memories[1], unit="bytes"))
    return found


def _replaced(side: Side, field: str, value: str) -> Side:
    return Side(**{name: value if name == field else getattr(side, name) for name in Side.__dataclass_fields__})


@contextmanager
def group_of_one(device: torch.device) -> Iterator[None]:
    """A process group of this process alone: NCCL, or gloo on the CPU."""
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def chosen(given: str, known: Sequence[str], flag: str) -> list[str]:
    names = given.split(",")
    if not set(names) <= set(known):
        refuse(f"{flag} is {given!r}, expected some of {','.join(known)}")
    return names


def arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--methods", default=",".join(METHODS), help="[default: %(default)s]")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="[default: %(default)s]")
    parser.add_argument("--engines", default=",".join(ENGINES), help="[default: %(default)s]; deepspeed where it is installed")
    parser.add_argument("--rows", type=int, default=8, help="forget rows a step, as many retain rows [default: 8]")
    parser.add_argument("--micro-rows", type=int, help="forget rows a forward [default: --rows]")
    parser.add_argument("--length", type=int, default=256, help="tokens a row [default: 256]")
    parser.add_argument("--warm-up", type=int, default=10, help="untimed steps, one curvature interval [default: 10]")
    parser.add_argument("--steps", type=int, default=20, help="timed steps a round [default: 20]")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    options, device = begin(arguments(parser_of(__doc__)), argv)
    if not (4 <= options.length <= POSITIONS and min(options.rows, options.steps, options.warm_up) >= 1):
        refuse(f"--length must lie in 4 to {POSITIONS}; --rows, --steps and --warm-up must be at least 1")
    methods = chosen(options.methods, METHODS, "--methods")
    precisions = chosen(options.precisions, PRECISIONS, "--precisions")
    engines = chosen(options.engines, ENGINES, "--engines")
    report, bench, room = Report(options, device), Bench(options, device), memory_bytes(device)
    if "deepspeed" in engines and importlib.util.find_spec("deepspeed") is None:
        engines.remove("deepspeed")
        report.skip("ZeRO-3", "deepspeed is not installed")
    with group_of_one(device):
        for model in options.models:
            for method in methods:
                wanted = [
                    Side(model, method, order, precision, engine) for engine in engines for precision in precisions for order in OPTIMIZERS
                ]
                needs = {side: bench.predicted(side) for side in wanted}
                sides = [side for side in wanted if needs[side] <= room]
                for side in wanted:
                    if side not in sides:
                        report.skip(f"{model} {method}, {side.name}", f"the plan needs {memory(needs[side])}, there are {memory(room)}")
                try:
                    walls, rows = bench.measure(sides)
                except torch.OutOfMemoryError:
                    most = memory(max(needs[side] for side in sides))
                    report.skip(f"{model} {method}", f"it ran out of memory, though the plan needs {most} at most of {memory(room)}")
                else:
                    report.add(ratios(sides, walls, rows), rows)


if __name__ == "__main__":
    main()
