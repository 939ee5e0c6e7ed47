"""A grid of methods, optimizers, models and seeds through Ray Tune, and the tables it makes. --help explains every flag."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without installation

from soul.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("grid", prog="pipelines/grid.py"))
