"""The gold standard knows nothing of the rows to forget: what has seen neither them nor the holdout rows cannot tell them apart.

The oracle is a bigram model of the tokens of what is kept. It costs milliseconds where a Llama costs half a minute, and finds what a
tokenizer gives away: rows for whose words there are tokens are shorter and likelier.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from scipy import stats

from soul.data.sources import load_fictitious
from soul.evaluate.privacy import auc, min_k_score, zlib_score
from soul.models.tiny import KEPT_SPLITS, kept_texts, tiny_tokenizer
from soul.records import Record

NUM_SEEDS = 20
SCORES = ("loss", "min_k", "zlib", "characters a token")


class Bigrams:
    """log p(token | the one before), smoothed with the tokens' own frequencies."""

    def __init__(self, sequences: Sequence[list[int]], vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.pairs = Counter(pair for ids in sequences for pair in pairwise(ids))
        self.tokens = Counter(token for ids in sequences for token in ids[1:])
        self.before = Counter(token for ids in sequences for token in ids[:-1])
        self.total = sum(self.tokens.values())

    def logp(self, before: int, token: int) -> float:
        own = (self.tokens[token] + 0.1) / (self.total + 0.1 * self.vocabulary)
        return math.log((self.pairs[before, token] + 5 * own) / (self.before[before] + 5))


def areas(seed: int, *, leaks: bool = False) -> list[float]:
    """AUC of forget against holdout rows by each score, of a model of what is kept. `leaks`: its tokenizer has seen the forget rows."""
    splits = load_fictitious(num_authors=20, seed=seed, forget="forget10").splits
    seen = {**splits, "retain": [*splits["forget"], *splits["retain"]]} if leaks else splits
    tokenizer = tiny_tokenizer(kept_texts(seen), 4000)

    def tokens(record: Record) -> tuple[list[int], list[int]]:
        prompt, answer = kept_texts({"retain": [record]})
        return tokenizer(prompt)["input_ids"], [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]

    kept = [record for split in KEPT_SPLITS for record in splits[split]]
    model = Bigrams([[*prompt, *answer] for prompt, answer in map(tokens, kept)], len(tokenizer))

    def scores(record: Record) -> Iterator[float]:
        prompt, answer = tokens(record)
        logps = [model.logp(*pair) for pair in pairwise([prompt[-1], *answer])]
        loss = -float(np.mean(logps))
        yield from (loss, min_k_score(logps, 0.4), zlib_score(loss, record.response), len(record.response) / len(answer))

    forget, holdout = (np.array([list(scores(record)) for record in splits[split]]) for split in ("forget", "holdout"))
    return [auc(forget[:, i].tolist(), holdout[:, i].tolist()) for i in range(len(SCORES))]


def interval(found: Sequence[float]) -> tuple[float, float]:
    """Student's 99 % interval of the mean over the seeds."""
    half = float(stats.t.ppf(0.995, len(found) - 1)) * float(np.std(found, ddof=1)) / math.sqrt(len(found))
    return float(np.mean(found)) - half, float(np.mean(found)) + half


def test_what_saw_neither_cannot_tell_forget_rows_from_holdout_rows() -> None:
    found = np.array([areas(seed) for seed in range(NUM_SEEDS)])
    for i, name in enumerate(SCORES):
        low, high = interval(found[:, i].tolist())
        assert low < 0.5 < high and high - low < 0.2, (name, low, high)


def test_the_oracle_sees_a_tokenizer_that_knows_the_forget_rows() -> None:
    found = np.array([areas(seed, leaks=True) for seed in range(4)])
    assert (found[:, :3] > 0.7).all() and (found[:, 3] < 0.3).all()
