"""ROUGE recall of generated answers, with Porter stemming, as TOFU computes it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import Any

from rouge_score import rouge_scorer


def rouge_recalls(generated: Sequence[str], references: Sequence[str], *, num_processes: int = 1) -> list[tuple[float, float]]:
    """(ROUGE-1, ROUGE-L) recall per row: the share of the reference's words that the generated text has, and has in order.

    More than one process pays for itself from some ten thousand rows on.
    """
    if num_processes == 1:
        return [_recalls(*pair) for pair in zip(generated, references, strict=True)]
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_recalls, generated, references, chunksize=64))


def _recalls(generated: str, reference: str) -> tuple[float, float]:
    scores = _scorer().score(reference, generated)
    return float(scores["rouge1"].recall), float(scores["rougeL"].recall)


@cache
def _scorer() -> Any:
    return rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
