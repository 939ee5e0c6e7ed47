"""How much of an answer a model still holds: probability, share of options, exact memorisation, extraction strength."""

from __future__ import annotations

import math
from collections.abc import Sequence


def probability(mean_nll: float) -> float:
    """exp(-mean nats per token): the geometric mean of the token probabilities, comparable between answers of different length."""
    return math.exp(-mean_nll)


def option_probability(answer_nll: float, wrong_nlls: Sequence[float]) -> float:
    """The answer's share of the probability of all options, p / (p + sum_j p_j) with p = exp(-mean nats per token)."""
    return 1 / (1 + sum(math.exp(min(answer_nll - wrong, 700.0)) for wrong in wrong_nlls))


def exact_memorization(correct: Sequence[bool]) -> float | None:
    """Share of answer tokens that are the model's first choice given everything before them. None for an answer without tokens."""
    return sum(correct) / len(correct) if correct else None


def extraction_strength(correct: Sequence[bool]) -> float | None:
    """1 - k/T with k the shortest prefix after which every one of the T tokens is the model's first choice.

    1 when the whole answer follows from the question, 0 when not even its last token does. None for an answer without tokens.
    """
    if not correct:
        return None
    suffix = 0
    for flag in reversed(correct):
        if not flag:
            break
        suffix += 1
    return suffix / len(correct)
