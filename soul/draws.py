"""Reproducible randomness: streams of a counter-based generator, each named by what it is for.

The name is hashed into the generator's key, and the counter is left to the generator. So two streams have nothing in common, however
alike their names are; no words in common either, as they would have if a name were put into the counter that the generator increments.
Raw words are taken, because numpy may change what its distributions make of them.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
from numpy.typing import NDArray


def words(num: int, *name: str | int) -> NDArray[np.uint64]:
    """The first `num` words of the stream of this name: a purpose, and whatever tells its streams apart."""
    digest = hashlib.sha256(json.dumps(name).encode()).digest()
    bits = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64))
    return np.asarray(bits.random_raw(num), dtype=np.uint64)


def uniforms(num: int, *name: str | int) -> NDArray[np.float64]:
    """Numbers in [0, 1), multiples of 2^-53."""
    return (words(num, *name) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(size: int, *name: str | int) -> NDArray[np.int64]:
    """An order of 0 .. size - 1, all as likely as the words' ties allow (one in 2^64 a pair)."""
    return np.argsort(words(size, *name), kind="stable")
