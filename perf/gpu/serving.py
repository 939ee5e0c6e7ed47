"""Serving and evaluation on one GPU, without Ray: tokens a second of our engine against a plain `generate`, rows a second of the metrics.

For each random Llama: greedy answers of the engine that `soul serve` runs (running batch, one thread) against one padded batch of
`model.generate`, at batch 1, 8 and 32, same prompts and as many tokens; then the two passes of an evaluation (likelihoods, generated
answers) in bf16 against fp32. Both sides take turns in one process; a ratio is the median of the rounds' paired ratios. vLLM, where it is
installed, comes behind them with the card to itself and is not paired.

    python perf/gpu/serving.py --json serving.json                  all models, one GPU
    python perf/gpu/serving.py --models 1b --batches 1,8,32,128 --new-tokens 256
    python perf/gpu/serving.py --device cpu --models tiny --rounds 1 --batches 1,2 --new-tokens 4 --rows 3     does it run?

Where the package is not installed, `python -m perf.gpu.serving` from the project's folder. Without a GPU: one line and status 2.
"""

from __future__ import annotations

import argparse

from perf.gpu._command import MODELS, PRECISIONS, make_parser, need_card, some_of


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--batches", default="1,8,32", help="prompts at a time [default: 1,8,32]")
    parser.add_argument("--new-tokens", type=int, default=128, help="of every answer; none ends by itself [default: 128]")
    options = parser.parse_args(argv)
    some_of(parser, options, "models", MODELS)
    some_of(parser, options, "precisions", PRECISIONS)
    try:
        options.batches = [int(word) for word in options.batches.split(",")]
    except ValueError:
        parser.error(f"--batches is {options.batches!r}, expected numbers such as 1,8,32")
    if min(*options.batches, options.new_tokens, options.rounds, options.rows) < 1:
        parser.error("--batches, --new-tokens, --rounds and --rows are at least 1")
    return options


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    need_card(options.device)
    from perf.gpu._serving import measure

    measure(options)


if __name__ == "__main__":
    main()
