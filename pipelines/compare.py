"""First- against second-order optimizers on one benchmark: a learning-rate search for each, then other seeds. Needs no Ray."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without installation

from rich import print as show
from transformers.utils import logging

from soul.benchmarks.comparison import ComparisonSettings, compare
from soul.benchmarks.comparison_tables import markdown, terminal, to_json
from soul.data.sources import open_benchmark
from soul.records import InputError
from soul.rundir import RunDir, write_atomically, write_json
from soul.settings import load_settings
from soul.store import check_local


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    made.add_argument("--data", default="fictitious", help="fictitious, a folder in TOFU's layout, or a hub id")
    made.add_argument("--forget", default="forget05", help="the split to forget")
    made.add_argument("--num-authors", type=int, default=200, help="invented authors of the fictitious benchmark")
    made.add_argument("--limit-forget", type=int, help="first rows of the forget split only")
    made.add_argument("--limit-retain", type=int, help="first rows of the retain split only")
    made.add_argument("--output", default="runs/compare", help="folder of models, cells and tables; run again to continue")
    for name, field in ComparisonSettings.model_fields.items():
        if name == "tiny":
            continue
        is_list = isinstance(field.default, tuple)
        default = ",".join(map(str, field.default)) if is_list else field.default
        made.add_argument(flag(name), default=default, help=f"{field.description}{', separated by commas' if is_list else ''}")
    return made


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def main(argv: list[str]) -> int:
    parsed = parser().parse_args(argv)
    names = [name for name in ComparisonSettings.model_fields if name != "tiny"]
    given = {
        name: [part for part in text.split(",") if part] if isinstance(ComparisonSettings.model_fields[name].default, tuple) else text
        for name, text in vars(parsed).items()
        if name in names
    }
    settings = load_settings(ComparisonSettings, None, given, labels={name: flag(name) for name in names})
    benchmark = open_benchmark(
        parsed.data,
        forget=parsed.forget,
        num_authors=parsed.num_authors,
        limit_forget=parsed.limit_forget,
        limit_retain=parsed.limit_retain,
    )
    check_local(parsed.output)
    run = RunDir(Path(parsed.output).resolve())
    run.create()
    logging.disable_progress_bar()
    result = compare(benchmark, settings, run.path, say=lambda line: print(line, flush=True))
    write_json(run.path / "comparison.json", to_json(result))
    write_atomically(run.path / "comparison.md", markdown(result))
    show(terminal(result))
    print(f"{run.path / 'comparison.md'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
