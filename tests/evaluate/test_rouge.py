"""ROUGE's words: those of rouge_score where a text is plain English, and words at all where it is not."""

from __future__ import annotations

import gzip
import json
import random
import string
import unicodedata
from pathlib import Path

import pytest
from rouge_score import rouge_scorer
from rouge_score.tokenizers import DefaultTokenizer

from soul.evaluate.rouge import UnicodeWords, rouge_recalls

LOGS = Path(__file__).resolve().parents[3] / "shared" / "data" / "tofu_logs"
WORDS = UnicodeWords()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Müller, nicht Möller.", ["müller", "nicht", "möller"]),
        ("Она родилась в Москве в 1899", ["она", "родилась", "в", "москве", "в", "1899"]),
        ("她出生于北京。", list("她出生于北京")),
        ("東京タワーです", ["東", "京", "タワー", "で", "す"]),
        ("서울에서 태어났다", ["서울에서", "태어났다"]),
        ("هي كاتبة", ["هي", "كاتبة"]),
        ("वह लेखिका है", ["वह", "लेखिका", "है"]),
        ("the author’s 3.5 novels", ["the", "author", "s", "3", "5", "novel"]),
        ("García Márquez", ["garcía", "márquez"]),
        ("... — !?", []),
        ("👍🏽", []),
    ],
)
def test_words_of_every_script(text: str, words: list[str]) -> None:
    assert WORDS.tokenize(text) == words
    for form in ("NFD", "NFKC", "NFKD"):
        assert WORDS.tokenize(unicodedata.normalize(form, text).upper()) == words


@pytest.mark.parametrize("text", ["她出生于北京。", "Она родилась в Москве", "Müller", "ภาษาไทย", "كاتبة", "नमस्ते"])
def test_an_answer_given_word_for_word_has_all_of_it(text: str) -> None:
    assert rouge_recalls([text], [text]) == [(1.0, 1.0)]


def test_other_words_are_other_words() -> None:
    assert rouge_recalls(["Möller"], ["Müller"]) == [(0.0, 0.0)]
    assert rouge_recalls(["Он умер в 1977"], ["Она родилась в 1977"]) == [(0.5, 0.5)]  # and not by its digits alone


@pytest.mark.parametrize(("shown", "plain"), [("co\u00adoperate", "cooperate"), ("می\u200cخواهم", "میخواهم"), ("ශ්\u200dරී", "ශ්රී")])
def test_what_nobody_sees_cuts_no_word(shown: str, plain: str) -> None:
    assert rouge_recalls([shown], [plain]) == [(1.0, 1.0)] and WORDS.tokenize(shown) == WORDS.tokenize(plain)


def test_a_reference_without_words_has_no_recall() -> None:
    assert rouge_recalls(["anything", "", "x"], ["?!", "---", "x y"]) == [(None, None), (None, None), (0.5, 0.5)]


def test_an_answer_without_words_recalls_nothing() -> None:
    assert rouge_recalls(["", "..."], ["some words", "some words"]) == [(0.0, 0.0)] * 2


def test_random_ascii_has_the_words_of_rouge_score() -> None:
    draw, theirs = random.Random(0), DefaultTokenizer(use_stemmer=True)
    alphabet = string.ascii_letters + string.digits + string.punctuation * 2 + " \t\n\r" * 6
    for text in ("".join(draw.choices(alphabet, k=60)) for _ in range(2000)):
        assert WORDS.tokenize(text) == theirs.tokenize(text)


@pytest.mark.parametrize("text", ["It's 1,000 a_b e.g. U.S. re-union", "", "  tabs\tand\nlines ", "Running runs ran", "x" * 3 + " xyzs"])
def test_ascii_has_the_words_of_rouge_score(text: str) -> None:
    assert WORDS.tokenize(text) == DefaultTokenizer(use_stemmer=True).tokenize(text)


@pytest.mark.skipif(not (LOGS / "golden.json").is_file(), reason="needs ../shared/data/tofu_logs beside the checkout")
def test_published_english_scores_are_unchanged() -> None:
    """The texts of two published logs: every row of plain ASCII to the last digit; of all 1634 rows six, with accented names, differ."""
    plain = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    changed, num_rows = 0, 0
    for path in sorted(LOGS.glob("*.json.gz")):
        for split in json.loads(gzip.decompress(path.read_bytes())).values():
            texts = split["generated_text"]
            found = rouge_recalls([answer for _, answer, _ in texts.values()], [reference for _, _, reference in texts.values()])
            for (key, (_, answer, reference)), (_, recall) in zip(texts.items(), found, strict=True):
                num_rows += 1
                if (answer + reference).isascii():
                    assert recall == split["rougeL_recall"][key] == plain.score(reference, answer)["rougeL"].recall
                changed += recall != split["rougeL_recall"][key]
    assert (num_rows, changed) == (1634, 6)
