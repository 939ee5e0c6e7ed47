"""Memory and communication of a worker on paper, for Llama models from 1B to 70B on 1 to 64 GPUs, by engine. Nothing is run.

    python -m perf.scaling
    python -m perf.scaling --models 7B --gpus 8,16 --tokens 2048 --no-gradient-checkpointing

Memory is soul.plan's, the one that --dry-run prints. Communication, with W workers, m micro-batches a step, c bytes of a number in
computation (2: bf16) and N parameters, is what a worker sends in a step with ring collectives; gradients travel as fp32:

    ddp            2 (W-1)/W 4 N             one all-reduce of the gradients
    fsdp           m (W-1)/W (2 c + 4) N     weights gathered for the forward and again for the backward, gradients scattered
    deepspeed 1    (W-1)/W (4 + c) N         gradients scattered once, new weights gathered
    deepspeed 2    (W-1)/W (4 m + c) N       gradients scattered in every micro-batch
    deepspeed 3    m (W-1)/W (2 c + 4) N     as fsdp

A curvature update (second-order optimizers, every --hessian-every steps) costs one more such pass over the rows it looks at; with ddp it
reduces in every micro-batch, because squares are taken after the reduce. `--write` puts the tables into docs/scaling.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from soul.config import Config
from soul.plan import COMPUTE_BYTES, FP32, ModelShape, memory_per_worker

GB: Final = 1e9
ENGINES: Final[dict[str, dict[str, Any]]] = {
    "ddp": {"name": "ddp"},
    "fsdp": {"name": "fsdp"},
    "deepspeed 1": {"name": "deepspeed", "zero_stage": 1},
    "deepspeed 2": {"name": "deepspeed", "zero_stage": 2},
    "deepspeed 3": {"name": "deepspeed", "zero_stage": 3},
}
DOCUMENT: Final = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- python -m perf.scaling --write -->", "<!-- end -->"
CARDS: Final = (24, 48, 80, 141)
USABLE: Final = 0.9  # of a card: the rest is the context, the allocator's gaps and what formulas leave out


@dataclass(frozen=True, slots=True)
class Llama:
    """Sizes from the models' published configs; `kv` is the width of keys and values together with all their heads."""

    name: str
    width: int
    inner: int
    blocks: int
    vocabulary: int
    kv: int
    tied: bool

    @property
    def shape(self) -> ModelShape:
        d = self.width
        block = 2 * d * d + 2 * d * self.kv + 3 * d * self.inner + 2 * d
        total = self.blocks * block + (1 if self.tied else 2) * self.vocabulary * d + d
        return ModelShape(total, self.blocks, block, d, self.inner, self.vocabulary)


MODELS: Final = {
    "1B": Llama("Llama-3.2-1B", 2048, 8192, 16, 128_256, 512, True),
    "3B": Llama("Llama-3.2-3B", 3072, 8192, 28, 128_256, 1024, True),
    "7B": Llama("Llama-2-7B", 4096, 11_008, 32, 32_000, 4096, False),
    "13B": Llama("Llama-2-13B", 5120, 13_824, 40, 32_000, 5120, False),
    "70B": Llama("Llama-3.1-70B", 8192, 28_672, 80, 128_256, 1024, False),
}


@dataclass(frozen=True, slots=True)
class Setting:
    """`tokens`: padded tokens of a micro-batch, forget and retain rows together."""

    optimizer: str
    tokens: int
    micro_batches: int
    gradient_checkpointing: bool

    def config(self, engine: str, workers: int) -> Config:
        placed = {**ENGINES[engine], "num_workers": workers, "precision": "bf16", "gradient_checkpointing": self.gradient_checkpointing}
        return Config.model_validate({"method": "npo", "optimizer": self.optimizer, "engine": placed})


def worker_bytes(model: Llama, engine: str, workers: int, setting: Setting) -> int:
    items = memory_per_worker(setting.config(engine, workers), model.shape, tokens=setting.tokens, num_forget=400)
    return sum(item.num_bytes for item in items if not item.on_cpu)


def sent_bytes(model: Llama, engine: str, workers: int, micro_batches: int) -> float:
    """What one worker sends in a step: the formulas at the top."""
    c, m = COMPUTE_BYTES["bf16"], micro_batches
    per_parameter = {
        "ddp": 2 * FP32,
        "fsdp": m * (2 * c + FP32),
        "deepspeed 1": FP32 + c,
        "deepspeed 2": m * FP32 + c,
        "deepspeed 3": m * (2 * c + FP32),
    }[engine]
    return (workers - 1) / workers * per_parameter * model.shape.num_params


def fewest_workers(model: Llama, engine: str, card_gb: int, setting: Setting, counts: Sequence[int]) -> int | None:
    """The least of `counts` with which a worker fits a card; None if none does."""
    return next((count for count in counts if worker_bytes(model, engine, count, setting) <= USABLE * card_gb * GB), None)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---", *["---:"] * (len(header) - 1)], *rows])


def tables(models: Sequence[str], counts: Sequence[int], setting: Setting) -> str:
    memory, fewest = [], []
    for name in models:
        for engine in ENGINES:
            memory.append([f"{name} {engine}", *(f"{worker_bytes(MODELS[name], engine, count, setting) / GB:.0f}" for count in counts)])
            least = [fewest_workers(MODELS[name], engine, card, setting, counts) for card in CARDS]
            fewest.append([f"{name} {engine}", *("none" if count is None else str(count) for count in least)])
    most = max(counts)
    sent = [
        [engine, *(f"{sent_bytes(MODELS[name], engine, most, setting.micro_batches) / GB:.0f}" for name in models)] for engine in ENGINES
    ]
    plural = "micro-batch" if setting.micro_batches == 1 else "micro-batches"
    parts = {
        "GB of GPU memory a worker needs, by number of GPUs": markdown(["", *map(str, counts)], memory),
        f"GPUs needed, by memory of a card ({USABLE:.0%} of it used)": markdown(["", *(f"{card} GB" for card in CARDS)], fewest),
        f"GB a worker sends in a step of {setting.micro_batches} {plural} on {most} GPUs": markdown(["", *models], sent),
    }
    return "\n\n".join(f"{title}:\n\n{table}" for title, table in parts.items())


def with_tables(document: str, text: str) -> str:
    """`document` with `text` between its two markers."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m perf.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS), metavar="A,B", help="of " + ", ".join(MODELS))
    parser.add_argument("--gpus", default="1,2,4,8,16,32,64", metavar="A,B", help="numbers of GPUs")
    parser.add_argument("--optimizer", default="sophia", help="adamw, sophia, soul_release, signum")
    parser.add_argument("--tokens", type=int, default=1024, help="padded tokens of a micro-batch, forget and retain rows together")
    parser.add_argument("--micro-batches", type=int, default=1, help="micro-batches of a worker in a step")
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    parsed = parser.parse_args(arguments)
    setting = Setting(parsed.optimizer, parsed.tokens, parsed.micro_batches, parsed.gradient_checkpointing)
    text = tables(parsed.models.split(","), [int(count) for count in parsed.gpus.split(",")], setting)
    if parsed.write:
        DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8"), text), encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
