"""Ours against what it replaces: both sides in one run, on the same model and rows. Ratios are printed, none is asserted.

(a) second-order against first-order step: time and peak memory
(b) a Hugging Face `Trainer` step, as OpenUnlearning writes it, against ours: GradDiff, and NPO with its live reference model
(c) item-by-item `generate` and padded full-logit likelihood against our evaluation
(d) Ray Train against the bare loop, start-up apart

Sides alternate round by round; a ratio is the median of the rounds' paired ratios, its quartiles beside it. Before anything is timed,
(b) checks that both sides have the same losses, and (c) that they produce the same values and texts.

    python perf/compare.py                                        every part, tiny model, this machine's CPU
    python perf/compare.py --part b --model 50m --rounds 7
    python perf/compare.py --part a,b,c --device cuda --model 1b --precision bf16 --batch-size 16 --micro-batch-size 16

Where the package is not installed, `python -m perf.compare` from the project's folder. Ray is needed by (d) alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from perf._evaluation import compare_evaluations
from perf._measure import Comparison, table
from perf._ray import compare_with_ray
from perf._steps import WARM_UP, compare_orders
from perf._trainer import compare_with_trainer
from perf._workload import MODELS, Workload, make_workload

PARTS = {"a": compare_orders, "b": compare_with_trainer, "c": compare_evaluations, "d": compare_with_ray}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="all", help="a,b,c,d or some of them, or all [default: all]")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="[default: cpu]; part d takes what Ray finds")
    parser.add_argument("--model", default="tiny", choices=MODELS, help="Llama shape, random weights [default: tiny]")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="of both sides' forwards [default: fp32]")
    parser.add_argument("--rows", type=int, default=128, help="forget rows; twice as many retain rows [default: 128]")
    parser.add_argument("--batch-size", type=int, default=8, help="forget rows a step, as many retain rows [default: 8]")
    parser.add_argument("--micro-batch-size", type=int, default=8, help="forget rows a forward [default: 8]")
    parser.add_argument("--rounds", type=int, default=5, help="paired repetitions [default: 5]")
    parser.add_argument("--steps", type=int, default=20, help=f"timed steps a round, behind {WARM_UP} untimed ones [default: 20]")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of a process [default: 1]")
    parser.add_argument("--data", type=Path, help="folder in TOFU's layout [default: ../shared/data/tofu, else invented authors]")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    options = parser.parse_args(argv)
    options.parts = list(PARTS) if options.part == "all" else options.part.split(",")
    if not set(options.parts) <= PARTS.keys():
        parser.error(f"--part is {options.part!r}, expected some of {','.join(PARTS)}, or all")
    if options.batch_size % options.micro_batch_size or options.rows < options.batch_size:
        parser.error("--batch-size must be a multiple of --micro-batch-size and at most --rows")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch finds no GPU")
    return options


def environment(options: argparse.Namespace, workload: Workload) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU, {os.cpu_count()} cores"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    load = os.getloadavg() if hasattr(os, "getloadavg") else None
    return {"device": device, "threads": options.threads, "load": load, **versions, **workload.describe()}


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    workload = make_workload(
        model=options.model,
        device=options.device,
        precision=options.precision,
        rows=options.rows,
        batch_size=options.batch_size,
        micro_batch_size=options.micro_batch_size,
        data=options.data,
    )
    facts = environment(options, workload)
    print(json.dumps(facts, indent=1), flush=True)
    comparisons: list[Comparison] = []
    for part in options.parts:
        found = PARTS[part](workload, rounds=options.rounds, steps=options.steps)
        print(f"\n{table(found)}" if found else f"\n({part}) left out", flush=True)
        for item in found:
            if item.notes:
                print(f"    {item.name}: {item.notes}", flush=True)
        comparisons += found
        if options.json is not None:
            options.json.write_text(json.dumps({"environment": facts, "comparisons": [item.to_json() for item in comparisons]}, indent=1))


if __name__ == "__main__":
    main()
