"""How long a grid takes through Ray Tune, and its cells one after another by hand, at equal numbers.

Both sides use the same target and retrained model, made beforehand and counted on neither side. By hand means one command per cell, as a
person would type it; the grid is one command. Both must end at the same metrics.

Run: python perf/grid.py [--flags "--preset quick --seeds 1"] [--output DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run(script: str, *words: str) -> float:
    """Seconds of one command, start-up included."""
    began = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / "pipelines" / script), *words], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    return time.perf_counter() - began


def metrics(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return {"models": found["models"], "epochs": found["epochs"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flags", default="--preset quick --seeds 1", help="the grid")
    parser.add_argument("--output", default=None, help="folder to work in (default: a temporary one)")
    parsed = parser.parse_args()
    folder = Path(parsed.output or tempfile.mkdtemp(prefix="soul-grid-")).resolve()
    flags = [*parsed.flags.split(), "--no-progress"]
    run("grid.py", *flags, "--output", str(folder / "first"))  # fills the cache: both sides start from its models
    shutil.copytree(folder / "first" / "cache", folder / "cache")
    loads = [os.getloadavg()[0]]
    together = run("grid.py", *flags, "--output", str(folder / "grid"), "--cache", str(folder / "cache"))
    loads.append(os.getloadavg()[0])
    trials = sorted((folder / "grid" / "trials").iterdir())
    alone = 0.0
    for trial in trials:
        output = folder / "by-hand" / trial.name
        alone += run("tofu.py", "--config", str(trial / "config.json"), "--output", str(output), "--cache", str(folder / "cache"))
        if metrics(output) != metrics(trial):
            raise SystemExit(f"{trial.name}: the two ways do not give the same numbers")
    loads.append(os.getloadavg()[0])
    print(f"{len(trials)} cells, the same numbers both ways; {os.cpu_count()} cores")
    print(f"grid     {together:7.1f} s")
    print(f"by hand  {alone:7.1f} s   {alone / together:.2f} times the grid's")
    print(f"load before the grid, between the two and after: {', '.join(f'{load:.1f}' for load in loads)} (ours included; idle is 0)")


if __name__ == "__main__":
    main()
