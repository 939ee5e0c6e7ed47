"""Whether the retrained model is blind: its membership attacks on forget rows against holdout rows, neither of which it has seen.

    python -m perf.gold_standard --seeds 20 --steps 1000 --folder runs/gold

Makes target and retrained model of the demo's benchmark (20 invented authors, two of them to forget) for each seed of the generator and
prints the AUC of every attack, then mean and Student's 95 % interval over the seeds. A blind model has .5 inside; the target, which has
seen the forget rows, is there to show that the attacks can see. A seed that `--folder` has already is not made again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from transformers import AutoModelForCausalLM

from soul.benchmarks.preparation import prepare
from soul.data.sources import load_fictitious
from soul.evaluate.evaluator import evaluate_model
from soul.evaluate.settings import EvalSettings
from soul.models.load import load_tokenizer
from soul.models.tiny import TinyConfig
from soul.rundir import write_json


def areas(seed: int, folder: Path, steps: int) -> dict[str, dict[str, float]]:
    """AUC by model and attack for one seed of the generator."""
    done = folder / f"seed-{seed}-{steps}.json"
    if not done.is_file():
        benchmark = load_fictitious(num_authors=20, seed=seed, forget="forget10")
        prepared = prepare(benchmark, folder, tiny=TinyConfig(), steps=steps, say=lambda text: None)
        rows = {split: benchmark.splits[split] for split in ("forget", "holdout")}
        found = {}
        for name, path in (("target", prepared.target), ("retrained", prepared.retrained)):
            model = AutoModelForCausalLM.from_pretrained(path).eval()
            settings = EvalSettings(generate=False)
            evaluation = evaluate_model(model, load_tokenizer(str(path)), rows, settings, device=torch.device("cpu"))
            found[name] = evaluation.model_entry()["mia_auc"]
        write_json(done, found)
    kept: dict[str, dict[str, float]] = json.loads(done.read_text())
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=Path("runs/gold"))
    options = parser.parse_args()
    found = []
    for seed in range(options.seeds):
        found.append(areas(seed, options.folder, options.steps))
        shown = "  ".join(f"{name} {value:.3f}" for name, value in found[-1]["retrained"].items())
        print(f"seed {seed:3d}  {shown}", flush=True)
    for model in ("retrained", "target"):
        for attack in found[0][model]:
            values = np.array([each[model][attack] for each in found])
            half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
            print(f"{model:10s} {attack:10s} {values.mean():.3f} [{values.mean() - half:.3f}, {values.mean() + half:.3f}]")


if __name__ == "__main__":
    main()
