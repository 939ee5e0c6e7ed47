"""The work of steps.py: sides that fit the card, their peak memory beside the plan's, their step times round by round."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from perf._measure import Comparison, Moment, compare, interleaved, peak_bytes, table
from perf._steps import run_steps
from perf._workload import SPLITS, Workload, make_workload
from perf.gpu._command import header, say
from perf.gpu._group import group_of_one
from perf.gpu._models import random_model, room, shape_of_skeleton
from soul.batch import TokenRow
from soul.config import Config
from soul.data.feed import LocalFeed
from soul.data.pairing import PairedPlan
from soul.data.store import TokenStore
from soul.device import torch_device
from soul.objectives.methods import METHODS, Method, needs_reference
from soul.optim.configs import AdamWConfig, OptimizerConfig, SophiaConfig
from soul.plan import MemoryItem, memory_per_worker
from soul.report.numbers import memory
from soul.train.engine import Engine, EngineConfig
from soul.train.engines import make_engine

ORDERS: dict[str, OptimizerConfig] = {"FO": AdamWConfig(), "SO": SophiaConfig(hessian_every=10, hessian_data="retain")}
TIME_AIM, MEMORY_AIM = 1.05, 1.0  # SO / FO


@dataclass(frozen=True)
class Side:
    """One side of the comparisons."""

    engine: str
    order: str

    def __str__(self) -> str:
        return f"{self.engine} {self.order}"


@dataclass(frozen=True)
class Setting:
    """What all sides share: model, precision, method, batches."""

    options: argparse.Namespace
    workload: Workload
    method: Method

    @property
    def name(self) -> str:
        return f"{self.workload.model_name} {self.workload.precision}"

    @property
    def settled(self) -> int:
        """Steps of a memory measurement: two of the optimizer's, two curvature passes where the warm-up is as long as an interval."""
        return int(self.options.warm_up) + 1

    @cached_property
    def feed(self) -> LocalFeed:
        stores = {split: TokenStore.of_rows(self._rows(split)) for split in SPLITS}
        options = self.options
        plan = PairedPlan({split: store.lengths_R for split, store in stores.items()}, batch_size=options.batch_size, seed=options.seed)
        return LocalFeed(plan, stores, 0, 1, options.micro_batch_size, self.workload.pad_id)

    def _rows(self, split: str) -> list[TokenRow]:
        """With the reference log-probabilities of a model that finds all tokens alike, which a random one nearly does: no pass for them."""
        rows = self.workload.rows[split]
        if split != "forget" or not needs_reference(self.method):
            return rows
        return [replace(row, reference_logp=-10.0 * row.num_supervised) for row in rows]

    def tokens(self, start: int, stop: int) -> int:
        """Tokens of these steps that are no padding."""
        return sum(int(batch.attention_mask_BT.sum()) for step in range(start, stop) for batch in self.feed.step(step))

    @cached_property
    def most_tokens(self) -> int:
        """Of the largest micro-batch that the memory is measured on, padding included."""
        return max(batch.input_ids_BT.numel() for step in range(self.settled) for batch in self.feed.step(step))

    def engine_config(self, side: Side) -> EngineConfig:
        config = EngineConfig(name=side.engine, precision=self.workload.precision)  # type: ignore[arg-type]
        return config.decided(self.options.device)

    def planned(self, side: Side) -> tuple[MemoryItem, ...]:
        """By the formulas that `soul unlearn --dry-run` and the workers go by."""
        model = random_model(self.workload.model_name, self.workload.tokenizer, device=torch.device("cpu"), seed=0)
        config = Config(method=self.method, optimizer=ORDERS[side.order], engine=self.engine_config(side))  # type: ignore[arg-type]
        return memory_per_worker(config, shape_of_skeleton(model.skeleton), tokens=self.most_tokens, num_forget=self.options.rows)

    def prepared(self, side: Side) -> Engine:
        device, optimizer = self.workload.device, ORDERS[side.order]
        model = random_model(self.workload.model_name, self.workload.tokenizer, device=device, seed=self.options.seed)
        engine = make_engine(self.engine_config(side), rank=0, world=1, local_rank=0)
        eager_state = side.engine != "deepspeed"
        engine.prepare(lambda: model, lambda built: optimizer.build(built.named_parameters(), eager_state=eager_state))
        return engine

    def run(self, side: Side, steps: int) -> Moment:
        """From a fresh model; the mean of the steps behind the warm-up."""
        engine = self.prepared(side)
        try:
            run = run_steps(self.workload, self.feed, self.method, ORDERS[side.order], steps=steps, engine=engine)
            return run.per_step(steps - self.options.warm_up)
        finally:
            if side.engine == "deepspeed":
                engine.model.destroy()  # type: ignore[operator]


def measure(options: argparse.Namespace) -> None:
    """Everything that the flags ask for, printed and written as it is found."""
    device = torch_device(options.device)
    torch.manual_seed(options.seed)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # torch's own, of its own calls, one a step
    found: dict[str, Any] = {"header": header(options), "comparisons": [], "sides": [], "skipped": []}
    print(json.dumps(found["header"], indent=1), flush=True)
    if "deepspeed" in options.engines and importlib.util.find_spec("deepspeed") is None:
        say("deepspeed is not installed: ZeRO-3 is left out")
        options.engines = [name for name in options.engines if name != "deepspeed"]
    with group_of_one(device):
        for model in options.models:
            for precision in options.precisions:
                workload = _workload(options, model, precision)
                for method in options.methods:
                    _measure_one(Setting(options, workload, METHODS[method]()), found)
                    if options.json is not None:
                        options.json.write_text(json.dumps(found, indent=1))


def _workload(options: argparse.Namespace, model: str, precision: str) -> Workload:
    made = make_workload(
        model=model,
        device=torch_device(options.device).type,
        precision=precision,
        rows=options.rows,
        batch_size=options.batch_size,
        micro_batch_size=options.micro_batch_size,
        data=options.data,
    )
    return replace(made, device=torch_device(options.device))


def _measure_one(setting: Setting, found: dict[str, Any]) -> None:
    """The sides of one model, precision and method."""
    peaks = {side: row for side in _fitting(setting, found) if (row := _memory(setting, side, found)) is not None}
    steps = setting.options.warm_up + setting.options.steps
    work = {str(side): lambda side=side: setting.run(side, steps) for side in peaks}  # type: ignore[misc]
    moments = interleaved(work, rounds=setting.options.rounds)
    tokens = setting.tokens(setting.options.warm_up, steps) / setting.options.steps
    rows = []
    for side, row in peaks.items():
        walls = sorted(moment.wall for moment in moments[str(side)])
        seconds = walls[len(walls) // 2]
        rows.append({**row, "seconds_a_step": seconds, "seconds_of_rounds": walls, "tokens_a_second": tokens / seconds})
    comparisons = _compared(setting, peaks, moments)
    found["sides"] += rows
    found["comparisons"] += [item.to_json() for item in comparisons]
    print(f"\n{table(comparisons)}\n{_lines(rows)}" if rows else "", flush=True)


def _fitting(setting: Setting, found: dict[str, Any]) -> list[Side]:
    """The sides that the plan has room for. An engine is left out in both orders, so that nothing is compared with a gap."""
    sides = []
    limit = room(setting.workload.device)
    for engine in setting.options.engines:
        plans = {order: setting.planned(Side(engine, order)) for order in ORDERS}
        most = max(plans.values(), key=_bytes)
        if _bytes(most) <= limit:
            sides += [Side(engine, order) for order in ORDERS]
            continue
        parts = ", ".join(f"{item.name} {memory(item.num_bytes)}" for item in most)
        say(f"SKIPPED {setting.name}, {engine}, {setting.method.name}: needs {memory(_bytes(most))}, there are {memory(limit)} ({parts})")
        facts = {"planned_bytes": _bytes(most), "room_bytes": limit, "parts": {item.name: item.num_bytes for item in most}}
        found["skipped"].append({**_words(setting), "engine": engine, "why": "the plan says that it does not fit", **facts})
    return sides


def _memory(setting: Setting, side: Side, found: dict[str, Any]) -> dict[str, Any] | None:
    """Peak memory of a short run, which also warms up what is compiled once; None where it runs out against the plan."""
    device = setting.workload.device
    planned = _bytes(setting.planned(side))
    _release(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    try:
        peak = peak_bytes(lambda: setting.run(side, setting.settled), device)
    except torch.OutOfMemoryError:
        say(f"OUT OF MEMORY {setting.name}, {side}, {setting.method.name}: the plan says {memory(planned)}, which would fit")
        found["skipped"].append(
            {**_words(setting), "engine": side.engine, "order": side.order, "why": "out of memory", "planned_bytes": planned}
        )
        return None
    finally:
        _release(device)
    facts = {"resident_before_bytes": before, "peak_bytes": peak, "planned_bytes": planned, "measured_over_planned": peak / planned}
    return {**_words(setting), "engine": side.engine, "order": side.order, "micro_batch_tokens": setting.most_tokens, **facts}


def _compared(setting: Setting, peaks: dict[Side, dict[str, Any]], moments: dict[str, list[Moment]]) -> list[Comparison]:
    def pair(label: str, above: Side, below: Side, names: tuple[str, str], *, is_aim: bool) -> list[Comparison]:
        if above not in peaks or below not in peaks:
            return []
        walls = [[moment.wall for moment in moments[str(side)]] for side in (above, below)]
        time = compare(
            setting.name, f"{label}, step", (names[0], walls[0]), (names[1], walls[1]), unit="s", aim=TIME_AIM if is_aim else None
        )
        sizes = [[float(peaks[side]["peak_bytes"])] for side in (above, below)]
        most = compare(
            setting.name, f"{label}, peak", (names[0], sizes[0]), (names[1], sizes[1]), unit="bytes", aim=MEMORY_AIM if is_aim else None
        )
        return [time, most]

    method, found = setting.method.name, []
    for engine in setting.options.engines:
        found += pair(f"{method}, {engine}", Side(engine, "SO"), Side(engine, "FO"), ("SO", "FO"), is_aim=True)
    for order in ORDERS:
        found += pair(f"{method}, {order}", Side("fsdp", order), Side("deepspeed", order), ("FSDP2", "ZeRO-3"), is_aim=False)
    return found


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    return "\n".join(
        f"    {row['engine']} {row['order']}: {row['tokens_a_second']:.0f} tokens/s, peak {memory(row['peak_bytes'])}, "
        f"planned {memory(row['planned_bytes'])}, measured / planned {row['measured_over_planned']:.2f}"
        for row in rows
    )


def _words(setting: Setting) -> dict[str, Any]:
    return {"model": setting.workload.model_name, "precision": setting.workload.precision, "method": setting.method.name}


def _bytes(items: Sequence[MemoryItem]) -> int:
    return sum(item.num_bytes for item in items)


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
