"""Streams of random words: told apart by their names, the same everywhere, with nothing in common."""

from __future__ import annotations

import itertools

import numpy as np
from scipy import stats

from soul.draws import permutation, uniforms, words

NAMES = [("rows", 0, 0), ("rows", 0, 1), ("rows", 1, 0), ("rows", 10), ("rows", 1, "0"), ("rows",), ("labels", 0, 0), ("row", "s", 0, 0)]


def test_streams_have_no_word_in_common() -> None:
    """Not even one block on, as streams have whose names are put where the generator counts."""
    drawn = [set(words(4096, *name).tolist()) for name in NAMES]
    assert all(len(found) == 4096 for found in drawn)
    for one, other in itertools.combinations(drawn, 2):
        assert not one & other


def test_a_stream_is_its_name_alone() -> None:
    assert np.array_equal(words(10, "rows", 3), words(99, "rows", 3)[:10])
    # What another machine and another numpy have to draw: SHA-256 of '["rows", 3]' as the key of Philox 4x64-10, counter 0.
    assert [int(word) for word in words(2, "rows", 3)] == [15079144593799449198, 2406940121258437081]


def test_uniforms_are_uniform() -> None:
    drawn = uniforms(20_000, "labels", 1)
    assert drawn.min() >= 0 and drawn.max() < 1
    assert stats.kstest(drawn, "uniform").pvalue > 1e-3


def test_every_order_is_as_likely_as_another() -> None:
    counts = dict.fromkeys(itertools.permutations(range(4)), 0)
    for i in range(4800):
        counts[tuple(permutation(4, "rows", i).tolist())] += 1
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3
