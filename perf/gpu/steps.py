"""Second-order against first-order steps on one GPU, without Ray: step time, tokens a second, peak memory beside what the plan says.

For each random Llama, precision and method (NPO, GradDiff): Sophia (curvature every 10 steps on retain rows, rho steered) against AdamW,
each on `single`, FSDP2 and ZeRO-3 (where deepspeed is installed) with one rank. All sides of a comparison take turns in one process on
the same batches; a ratio is the median of the rounds' paired ratios, its quartiles beside it. What the memory plan says will not fit is
named with its numbers and left out.

    python perf/gpu/steps.py --json steps.json                      all models, one GPU
    python perf/gpu/steps.py --models 1b --engines fsdp,deepspeed --batch-size 16 --micro-batch-size 16
    python perf/gpu/steps.py --device cpu --models tiny --rounds 1 --steps 2 --warm-up 1     does it run? No figures of speed.

Where the package is not installed, `python -m perf.gpu.steps` from the project's folder. Without a GPU: one line and status 2.
"""

from __future__ import annotations

import argparse

from perf.gpu._command import MODELS, PRECISIONS, make_parser, need_card, some_of

ENGINES = ("single", "fsdp", "deepspeed")
METHODS = ("npo", "grad_diff")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--engines", default=",".join(ENGINES), help=f"some of {','.join(ENGINES)} [default: all that are installed]")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"some of {','.join(METHODS)} [default: both]")
    parser.add_argument("--batch-size", type=int, default=8, help="forget rows a step, as many retain rows [default: 8]")
    parser.add_argument("--micro-batch-size", type=int, default=8, help="forget rows a forward [default: 8]")
    parser.add_argument(
        "--steps", type=int, default=20, help="timed steps a round; a multiple of 10 has its share of curvature [default: 20]"
    )
    parser.add_argument("--warm-up", type=int, default=10, help="untimed steps before them [default: 10]")
    options = parser.parse_args(argv)
    for flag in ("models", "precisions", "engines", "methods"):
        some_of(parser, options, flag, {"models": MODELS, "precisions": PRECISIONS, "engines": ENGINES, "methods": METHODS}[flag])
    if min(options.warm_up, options.steps, options.rounds) < 1:
        parser.error("--warm-up, --steps and --rounds are at least 1")
    if options.batch_size % options.micro_batch_size or options.rows < options.batch_size:
        parser.error("--batch-size must be a multiple of --micro-batch-size and at most --rows")
    return options


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    need_card(options.device)
    from perf.gpu._training import measure

    measure(options)


if __name__ == "__main__":
    main()
