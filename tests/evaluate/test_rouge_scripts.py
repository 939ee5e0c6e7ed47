"""ROUGE in every script: equal texts are equal, other words are other words, ASCII texts keep rouge_score's own tokens."""

from __future__ import annotations

import random
import string
import unicodedata

import pytest
from rouge_score.tokenizers import DefaultTokenizer

from soul.evaluate.rouge import UnicodeWords, rouge_recalls

TEXTS = (
    "我爱北京天安门",
    "Привет, мир 2024",
    "ภาษาไทย",
    "हिन्दी में लिखा",
    "Ελλάς",
    "مرحبا بالعالم",
    "こんにちは カタカナ",
    "한국어 문장",
    "García Márquez",
)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_equal_texts_score_one_in_every_normal_form(text: str, form: str) -> None:
    assert rouge_recalls([unicodedata.normalize(form, text).upper()], [text]) == [(1.0, 1.0)]


@pytest.mark.parametrize(
    ("generated", "reference", "recall"),
    [("Möller", "Müller", 0.0), ("до 2024", "мир 2024", 0.5), ("我爱上海", "我爱北京", 0.5), ("García", "Garc a", 0.0)],
)
def test_other_words_are_other_words(generated: str, reference: str, recall: float) -> None:
    assert rouge_recalls([generated], [reference]) == [(recall, recall)]


@pytest.mark.parametrize("reference", ["", " ", "?!", "🙂", "\u0301"])
def test_a_reference_without_words_has_no_recall(reference: str) -> None:
    assert rouge_recalls(["anything"], [reference]) == [(None, None)]


def test_ascii_texts_keep_the_tokens_of_rouge_score() -> None:
    draw, own, theirs = random.Random(0), UnicodeWords(), DefaultTokenizer(use_stemmer=True)
    alphabet = string.ascii_letters + string.digits + string.punctuation * 2 + " \t\n\r" * 6
    texts = ["".join(draw.choices(alphabet, k=60)) for _ in range(2000)]
    texts += ["John's mother-in-law was running 3.14 miles_per_hour; they've studied generously.", "U.S.A. 1,000.50 a:b a.b a_b"]
    assert [own.tokenize(text) for text in texts] == [theirs.tokenize(text) for text in texts]
