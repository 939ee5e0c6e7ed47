"""ROUGE recall of generated answers, with Porter stemming, as TOFU computes it, and in every script.

The scores are `rouge_score`'s; its own tokenizer knows the letters a to z and nothing else, to which "Müller" and "Möller" are one word,
and a Chinese answer is no word at all. Here words are runs of letters, marks and digits, cut further where Unicode has a word boundary
(UAX 29, from the `regex` library): Han characters and kana are words of their own. A text in plain ASCII has the same words as before.
"""

from __future__ import annotations

import multiprocessing
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib import metadata
from typing import Any, Final

import regex
from nltk.stem.porter import PorterStemmer
from rouge_score import rouge_scorer

Recalls = tuple[float | None, float | None]
RUN: Final = regex.compile(r"[\p{L}\p{M}\p{N}]+")
BOUNDARY: Final = regex.compile(r"(?w)\b")
STEMMED_FROM: Final = 4  # characters, as in rouge_score


class UnicodeWords:
    """The words of a text in lower case; those of ASCII letters are stemmed. Equal texts in other normal forms have equal words."""

    def __init__(self) -> None:
        self._stem = PorterStemmer().stem

    def tokenize(self, text: str) -> list[str]:
        runs = RUN.findall(unicodedata.normalize("NFC", text).lower())
        words = (word for run in runs for word in ((run,) if run.isascii() else BOUNDARY.split(run)) if word)
        return [self._stem(word) if len(word) >= STEMMED_FROM and word.isascii() else word for word in words]


def describe() -> str:
    """What measured, for whoever compares two results."""
    return f"rouge_score {metadata.version('rouge-score')}, Unicode words (UAX 29) by regex {metadata.version('regex')}"


def rouge_recalls(generated: Sequence[str], references: Sequence[str], *, num_processes: int = 1) -> list[Recalls]:
    """(ROUGE-1, ROUGE-L) recall per row: the share of the reference's words that the generated text has, and has in order.

    None where the reference has no words: a row of punctuation says nothing about what a model knows. More than one process pays for
    itself from some ten thousand rows on.
    """
    if num_processes == 1:
        return [_recalls(*pair) for pair in zip(generated, references, strict=True)]
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_recalls, generated, references, chunksize=64))


def has_words(text: str) -> bool:
    return RUN.search(text) is not None


def _recalls(generated: str, reference: str) -> Recalls:
    if not has_words(reference):
        return None, None
    scores = _scorer().score(reference, generated)
    return float(scores["rouge1"].recall), float(scores["rougeL"].recall)


@cache
def _scorer() -> Any:
    return rouge_scorer.RougeScorer(["rouge1", "rougeL"], tokenizer=UnicodeWords())
