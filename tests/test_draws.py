"""Streams of random words: told apart by their names, the same everywhere, with nothing in common."""

from __future__ import annotations

import hashlib
import itertools

from scipy import stats

from soul.draws import permutation, uniforms, words

NAMES = [("rows", 0, 0), ("rows", 0, 1), ("rows", 1, 0), ("rows", 10), ("rows", 1, "0"), ("rows",), ("labels", 0, 0), ("row", "s", 0, 0)]


def test_streams_have_no_word_in_common() -> None:
    """Not even one block on, as streams have whose names are put where the generator counts."""
    drawn = [set(words(4096, *name).tolist()) for name in NAMES]
    assert all(len(found) == 4096 for found in drawn)
    for one, other in itertools.combinations(drawn, 2):
        assert not one & other


def philox_4x64_10(counter: list[int], key: list[int]) -> list[int]:
    """One block, from the generator's definition (Salmon et al. 2011)."""
    x, k, mask = list(counter), list(key), 2**64 - 1
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [(b >> 64) ^ x[1] ^ k[0], b & mask, (a >> 64) ^ x[3] ^ k[1], a & mask]
        k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
    return x


def test_a_stream_is_philox_keyed_by_the_hash_of_its_name() -> None:
    """So that every machine and every numpy draws the same."""
    digest = hashlib.sha256(b'["rows", 3, "q"]').digest()
    key = [int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")]
    drawn = [word for block in (1, 2) for word in philox_4x64_10([block, 0, 0, 0], key)]
    assert words(8, "rows", 3, "q").tolist() == drawn
    assert words(3, "rows", 3, "q").tolist() == drawn[:3]
    assert uniforms(8, "rows", 3, "q").tolist() == [(word >> 11) * 2.0**-53 for word in drawn]


def test_uniforms_are_uniform() -> None:
    drawn = uniforms(20_000, "labels", 1)
    assert drawn.min() >= 0 and drawn.max() < 1
    assert stats.kstest(drawn, "uniform").pvalue > 1e-3


def test_every_order_is_as_likely_as_another() -> None:
    counts = dict.fromkeys(itertools.permutations(range(4)), 0)
    for i in range(4800):
        counts[tuple(permutation(4, "rows", i).tolist())] += 1
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3
