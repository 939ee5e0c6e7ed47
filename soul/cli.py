"""The console command `soul` and the scripts of pipelines/: flags in, an exit code out (0 done, 1 failure, 2 bad input).

What a command needs is imported by the command: `soul score` starts without torch, nothing but a run starts Ray.
"""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from pydantic import ValidationError

from soul.records import InputError
from soul.store import checkout, is_uri, path_of, place_of

if TYPE_CHECKING:
    from soul.config import Config

DONE, FAILURE, BAD_INPUT = 0, 1, 2
INTERRUPTED = 128 + signal.SIGINT

# `soul tofu` without data, model and config file: a few minutes on two cores.
DEMO: dict[str, Any] = {
    "data": {"num_authors": 20, "forget": "forget10"},
    "train": {"epochs": 10, "batch_size": 4, "micro_batch_size": 4},
    "evaluate": {"max_new_tokens": 64},  # the longest answer has fewer
    "twin": "adamw",
}
DEMO_TEXT = (
    "Unlearn a split of a benchmark. Without --data, --model and --config this is the demo: 20 invented authors, two of them to forget, a "
    "tiny Llama trained from scratch, NPO with Sophia and with AdamW beside it."
)


class Parser(argparse.ArgumentParser):
    """Raises `InputError` where argparse would exit, and knows the nearest flag."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Wide, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}. {self.prog} --help lists what there is.")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse all of `argv`.

        Raises:
            InputError: an unknown flag, a flag without its value, or a word too many.
        """
        parsed, extra = self.parse_known_args(list(argv))
        unknown = [word.split("=")[0] for word in extra if word.startswith("-")]
        if unknown:
            near = difflib.get_close_matches(unknown[0], self._option_string_actions, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise InputError(f"unknown flag {unknown[0]}.{hint} {self.prog} --help lists what there is.")
        if extra:
            raise InputError(f"{len(extra)} word(s) too many behind the flags. A value with spaces needs quotes.")
        return parsed


class _Wide(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=140)


@dataclass(frozen=True, slots=True)
class Command:
    summary: str
    usage: str
    add: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return DONE
    if words[0] == "--version":
        print(f"soul {metadata.version('soul-unlearning')}")
        return DONE
    if words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]}?" if near else ""
        return _complain(f"expected a command ({', '.join(COMMANDS)}), got {words[0]}.{hint}")
    return run_command(words[0], words[1:])


def run_command(command: str, argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run one command with its flags; `prog` is the name that help shows. Returns the exit code.

    Failures that are nobody's input (a defect, a dead worker) pass through as exceptions: the interpreter prints them and exits with 1.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    verbose = "--verbose" in words
    _stop_on_sigterm()
    try:
        parsed = build_parser(command, prog=prog).parse(words)
        parsed.words = words
        logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
        return COMMANDS[command].run(parsed)
    except InputError as error:
        if verbose:
            logging.getLogger(__name__).info("bad input", exc_info=error)
        return _complain(str(error))
    except ValidationError as error:
        return _complain("\n".join(_problems(error)))
    except BrokenPipeError:  # the reader of our output has left: `soul score LOG | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except (ArithmeticError, OSError) as error:
        if verbose:
            raise
        print(f"failed: {type(error).__name__}: {error}", file=sys.stderr)
        return FAILURE
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as done:  # argparse has printed the help
        return done.code if isinstance(done.code, int) else DONE


def build_parser(command: str, *, prog: str | None = None) -> Parser:
    """The parser of one command, its flags generated from the config."""
    chosen = COMMANDS[command]
    parser = Parser(prog=prog or f"soul {command}", usage=f"{prog or f'soul {command}'} {chosen.usage}", description=chosen.summary)
    chosen.add(parser)
    return parser


def _add_run(command: str) -> Callable[[argparse.ArgumentParser], None]:
    def add(parser: argparse.ArgumentParser) -> None:
        from soul.flags import add_flags, flags_of

        parser.set_defaults(command=command)
        parser.add_argument("--config", metavar="FILE", help="YAML file of settings, nested by section; flags override it")
        parser.add_argument("--dry-run", action="store_true", help="print settings, batch arithmetic and memory estimate; train nothing")
        add_flags(parser, flags_of(command))

    return add


def _run(parsed: argparse.Namespace) -> int:
    config = config_of(parsed)
    if parsed.dry_run:
        from soul.dry_run import dry_run

        print(dry_run(config))
        return DONE
    from soul.orchestration import pipeline

    with _resumable(config.output):
        print(place_of(pipeline.run(config)))
    return DONE


def config_of(parsed: argparse.Namespace) -> Config:
    """The config that the flags of `tofu` or `unlearn` describe.

    Raises:
        InputError: a setting is unknown, out of range or means nothing here; one line per problem.
    """
    from soul.flags import flags_of, given_settings
    from soul.settings import load_config

    overrides, labels = given_settings(parsed, flags_of(parsed.command))
    preset: dict[str, Any] = {"benchmark": "own", "output": "runs/own"}
    if parsed.command == "tofu":
        is_demo = parsed.config is None and "source" not in overrides.get("data", {}) and "path" not in overrides.get("model", {})
        preset = DEMO if is_demo else {}
    return load_config(parsed.config, overrides, labels=labels, preset=preset)


def _add_grid(parser: argparse.ArgumentParser) -> None:
    from soul.flags import add_flags, flags_of

    parser.add_argument("--config", metavar="FILE", help="YAML file of settings, nested by section; flags override it")
    parser.add_argument("--dry-run", action="store_true", help="check everything, list the runs and start none")
    add_flags(parser, flags_of("grid"))


def _grid(parsed: argparse.Namespace) -> int:
    from soul.flags import grid_config_of

    config = grid_config_of(parsed)
    if parsed.dry_run:
        from soul.orchestration.ready import check_grid

        check_grid(config)
        print("\n".join(config.describe()))
        return DONE
    if not config.report:
        from soul.orchestration.tune import run_grid

        try:
            run_grid(config)
        except KeyboardInterrupt as stop:
            stop.args = ("interrupted. Continue with the same command: what is finished is not repeated.",)
            raise
    from soul.benchmarks.outcomes import trial_folder
    from soul.benchmarks.presets import HEADINGS
    from soul.report.grid_build import build_grid_report, show_grid
    from soul.report.tracking import track_all

    output, trials = path_of(config.output), config.all_trials()
    command = shlex.join(["python", "pipelines/grid.py", *parsed.words])
    heading = HEADINGS.get(config.preset or "")
    table = build_grid_report(trials, output, floor=config.utility_floor, samples=config.samples, command=command, heading=heading)
    show_grid(table)
    print(place_of(output / "report.html"))
    if config.wandb is not None and (told := track_all([trial_folder(trial, output) for trial in trials], project=config.wandb)):
        print(told, file=sys.stderr)
    return DONE


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    from soul.flags import add_flags, flags_of

    parser.add_argument("model_dir", metavar="MODEL_DIR", help="Hugging Face folder, hub id, or run directory's model folder")
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings, nested by section; flags override it")
    add_flags(parser, flags_of("evaluate"))


def _evaluate(parsed: argparse.Namespace) -> int:
    from soul.config import EvaluateConfig
    from soul.flags import flags_of, given_settings
    from soul.settings import load_settings

    overrides, labels = given_settings(parsed, flags_of("evaluate"))
    overrides.setdefault("model", {})["path"] = parsed.model_dir
    config = load_settings(EvaluateConfig, parsed.config, overrides, labels=labels)
    from soul.orchestration import pipeline

    print(place_of(pipeline.evaluate_folder(config)))
    return DONE


def _add_score(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("log", metavar="LOG", help="evaluation log of TOFU or OpenUnlearning: .json, .json.gz or its folder")
    parser.add_argument("--retrained", metavar="LOG", help="log of the retrained model: adds forget quality and PrivLeak [default: none]")
    parser.add_argument("--allow-mismatch", action="store_true", help="compare with a log of other rows, tokenizer or template")
    parser.add_argument(
        "--truth-ratio",
        choices=("geometric", "arithmetic"),
        default="geometric",
        help="mean over the wrong answers: TOFU's leaderboard's, or arithmetic as in its paper [default: geometric]",
    )


def _score(parsed: argparse.Namespace) -> int:
    from soul.evaluate.logs import read_log
    from soul.evaluate.same_rows import check_comparable
    from soul.evaluate.summary import score_log

    log, retrained = read_log(parsed.log), parsed.retrained and read_log(parsed.retrained)
    check_comparable(log, retrained, insists=parsed.allow_mismatch)
    print(json.dumps(score_log(log, retrained, mean=parsed.truth_ratio, allow_mismatch=parsed.allow_mismatch), indent=2, allow_nan=False))
    return DONE


def _add_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN", help="run directory of an interrupted run")
    parser.add_argument("--verbose", action="store_true", help="log more, and show tracebacks of bad input")


def _resume(parsed: argparse.Namespace) -> int:
    folder = checkout(parsed.run_dir)
    if not (folder / "config.json").is_file():
        raise InputError(f"{parsed.run_dir} is no run directory: expected a config.json in it. Start a run with soul tofu or soul unlearn.")
    from soul.orchestration import pipeline

    with _resumable(parsed.run_dir):
        print(place_of(pipeline.resume(folder)))
    return DONE


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run directories; several are compared in one report")
    parser.add_argument("--output", metavar="DIR", help="folder of the report [default: in the run, or beside the first of several]")


def _report(parsed: argparse.Namespace) -> int:
    from soul.report.build import build_report

    output = None if parsed.output is None else path_of(parsed.output) if is_uri(parsed.output) else Path(parsed.output)
    print(place_of(build_report([checkout(run) for run in parsed.runs], output).html))
    return DONE


def _add_check(parser: argparse.ArgumentParser) -> None:
    where = "auto or HOST:PORT on the cluster, or the job server's http://HOST:PORT from elsewhere [default: RAY_ADDRESS if set, else auto]"
    parser.add_argument("--address", metavar="TEXT", default=None, help=where)
    parser.add_argument("--num-workers", metavar="N", type=int, default=1, help="workers that a run would ask for [default: 1]")


def _check(parsed: argparse.Namespace) -> int:
    from soul.orchestration.survey import survey

    print(survey(parsed.address, num_workers=parsed.num_workers))
    return DONE


def _add_serve(parser: argparse.ArgumentParser) -> None:
    from soul.serving.flags import add_serve_flags

    add_serve_flags(parser)


def _serve(parsed: argparse.Namespace) -> int:
    from soul.serving.flags import serve_overrides
    from soul.serving.policy import Policy
    from soul.serving.settings import ServeConfig, located
    from soul.settings import load_settings

    policy = None if parsed.policy is None else load_settings(Policy, parsed.policy, {}).model_dump()
    labels = {"host": "--host", "port": "--port", "replicas.minimum": "--replicas", "replicas.max_models": "--max-models"}
    config = located(load_settings(ServeConfig, parsed.config, serve_overrides(parsed, policy), labels=labels), parsed.config)
    if not config.hosting.runs:
        raise InputError("nothing to serve: expected one run directory or more, or a --config with hosting.runs.")
    from soul.orchestration import serve

    if parsed.build is not None:
        serve.write_serve_config(config, Path(parsed.build))
        print(parsed.build)
        return DONE
    serve.run_server(config, address=parsed.address, verbose=parsed.verbose)
    return DONE


COMMANDS: dict[str, Command] = {
    "tofu": Command(DEMO_TEXT, "[FLAGS]", _add_run("tofu"), _run),
    "unlearn": Command(
        "Unlearn files of your own from a model of your own.", "--model DIR --forget FILE --retain FILE [FLAGS]", _add_run("unlearn"), _run
    ),
    "grid": Command(
        "Run a grid of methods, optimizers, models and seeds through Ray Tune, and make its tables.", "[FLAGS]", _add_grid, _grid
    ),
    "evaluate": Command("Measure a model folder or hub id, without training.", "MODEL_DIR [FLAGS]", _add_evaluate, _evaluate),
    "score": Command("Metrics of a published evaluation log, as one JSON object.", "LOG [--retrained LOG]", _add_score, _score),
    "resume": Command("Continue an interrupted run.", "RUN", _add_resume, _resume),
    "serve": Command("Answer over HTTP with evaluated models.", "RUN [RUN ...] [FLAGS]", _add_serve, _serve),
    "check": Command(
        "See whether a Ray cluster can be joined, and has room for a run.", "[--address TEXT] [--num-workers N]", _add_check, _check
    ),
    "report": Command("Write the report of one run, or of several side by side.", "RUN [RUN ...] [--output DIR]", _add_report, _report),
}


def _overview() -> str:
    lines = [f"  {name:<10} {command.summary.split('. ')[0].rstrip('.')}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: soul COMMAND [FLAGS]     soul COMMAND --help explains every flag", "", *lines])


def _problems(error: ValidationError) -> list[str]:
    from soul.config import Config
    from soul.settings import problems

    return problems(error, Config)


def _complain(text: str) -> int:
    for line in text.splitlines():
        print(f"error: {line}", file=sys.stderr)
    return BAD_INPUT


@contextmanager
def _resumable(run_dir: str) -> Iterator[None]:
    """Say on the way out of an interrupted run how to go on."""
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.args = (f"interrupted. Continue with: soul resume {run_dir}",)
        raise


def _stop_on_sigterm() -> None:
    """Let SIGTERM take the way of Ctrl-C, so that it leaves a resumable run too. Only the main thread may say so."""

    def stop(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)
