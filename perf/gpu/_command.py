"""What the scripts of this folder share before torch is loaded: flags, the card they refuse to do without, the head of what they write."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

MODELS = ("tiny", "135m", "1b", "7b")
SIZES = "0.9 M, 135 M, 1.2 B, 6.7 B parameters"
PRECISIONS = ("bf16", "fp32")
ROOT = Path(__file__).resolve().parents[2]


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The flags that both scripts have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="gpu", choices=("gpu", "cpu"), help="[default: gpu]; cpu is for trying the script out")
    parser.add_argument("--models", default=",".join(MODELS), help=f"random Llamas, some of {','.join(MODELS)}: {SIZES} [default: all]")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="some of bf16,fp32 [default: both]")
    parser.add_argument("--rounds", type=int, default=5, help="paired repetitions [default: 5]")
    parser.add_argument("--rows", type=int, default=128, help="forget rows; twice as many retain rows [default: 128]")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order [default: 0]")
    parser.add_argument("--data", type=Path, help="folder in TOFU's layout [default: ../shared/data/tofu, else invented authors]")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    return parser


def some_of(parser: argparse.ArgumentParser, options: argparse.Namespace, flag: str, known: tuple[str, ...]) -> None:
    """Make the comma-separated words of a flag a list of them."""
    words = getattr(options, flag).split(",")
    if not set(words) <= set(known):
        parser.error(f"--{flag} is {','.join(words)!r}, expected some of {','.join(known)}")
    setattr(options, flag, words)


def need_card(device: str) -> None:
    """End the program (status 2, one line on stderr) where a GPU is asked for and there is none to compute on."""
    if device == "cpu":
        return
    import torch

    from soul.device import COMPUTE

    if os.environ.get(COMPUTE):
        why = f"{COMPUTE} is set, which keeps tensors on the CPU"
    elif not torch.cuda.is_available():
        why = f"torch {torch.__version__} finds none here"
    else:
        return
    say(f"{Path(sys.argv[0]).name}: measures on a GPU, and {why}. --device cpu tries the script out and says nothing of speed.")
    raise SystemExit(2)


def say(line: str) -> None:
    """Something that is missing from the results."""
    print(line, file=sys.stderr, flush=True)


def header(options: argparse.Namespace) -> dict[str, Any]:
    """What a reader has to know to have the numbers again."""
    import torch
    import transformers

    on_gpu = options.device == "gpu"
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    return {
        "card": torch.cuda.get_device_name(0) if on_gpu else None,
        "card_bytes": torch.cuda.get_device_properties(0).total_memory if on_gpu else None,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "commit": _git("rev-parse", "HEAD"),
        "changed_since": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "flags": flags,
    }


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, or a copy without its history
        return None
    return done.stdout.strip()
