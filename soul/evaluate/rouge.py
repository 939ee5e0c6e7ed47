"""ROUGE recall of generated answers in any script: TOFU's numbers on plain English, words by Unicode's rules elsewhere."""

from __future__ import annotations

import multiprocessing
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import Any, Final

import regex
from nltk.stem.porter import PorterStemmer
from rouge_score import rouge_scorer, tokenizers

TOKENIZER: Final = "unicode-words-1"  # a new name whenever a token changes: it stands in logs and in the keys of kept evaluations
NO_WORDS: Final = "no reference answer has a letter or a digit, so none has words to recall"
_SEGMENTS: Final = regex.compile(r"(?w)\b\S.*?\b", regex.DOTALL)
_INVISIBLE: Final = regex.compile(r"\p{Cf}")  # joiners and soft hyphens, inside words
_WORDS: Final = regex.compile(r"[\p{L}\p{N}][\p{L}\p{N}\p{M}]*")

Recalls = tuple[float, float] | tuple[None, None]


class UnicodeWords(tokenizers.Tokenizer):  # type: ignore[misc]
    """Words between the boundaries of Unicode's UAX #29, as the `regex` package finds them, without punctuation and case.

    Where a script writes no spaces, UAX #29 cuts at every character (Han, Hiragana, Thai): ROUGE over characters, as is usual there, and
    without a dictionary that would have to be named too. Texts are compared in normal form NFKC. On ASCII texts the tokens are
    rouge_score's own, Porter's stems included; a word that has another letter after case
    folding too is not English to Porter and stays whole.
    """

    def __init__(self) -> None:
        self._stem = PorterStemmer().stem

    def tokenize(self, text: str) -> list[str]:
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        shown = _INVISIBLE.sub("", folded)
        words = [word for segment in _SEGMENTS.findall(shown) for word in _WORDS.findall(segment)]
        return [self._stem(word) if len(word) > 3 and word.isascii() else word for word in words]


def rouge_recalls(generated: Sequence[str], references: Sequence[str], *, num_processes: int = 1) -> list[Recalls]:
    """(ROUGE-1, ROUGE-L) recall per row: the share of the reference's words that the generated text has, and has in order.

    None where the reference has no words. More than one process pays for itself from some ten thousand rows on.
    """
    if num_processes == 1:
        return [_recalls(*pair) for pair in zip(generated, references, strict=True)]
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_recalls, generated, references, chunksize=64))


def _recalls(generated: str, reference: str) -> Recalls:
    words, scorer = _tools()
    if not words.tokenize(reference):
        return None, None
    scores = scorer.score(reference, generated)
    return float(scores["rouge1"].recall), float(scores["rougeL"].recall)


@cache
def _tools() -> tuple[UnicodeWords, Any]:
    words = UnicodeWords()
    return words, rouge_scorer.RougeScorer(["rouge1", "rougeL"], tokenizer=words)
