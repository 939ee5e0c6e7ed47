"""The verdict's numbers are those of the results, and its words claim no more than they show."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from soul.report.numbers import compact, duration, log10_p, memory, p_phrase, percent
from soul.report.results import Results
from soul.report.verdict import headline, twin_sentence, verdict
from tests.removal_numbers import removal_tests

Make = Callable[..., Results]


def shares(text: str) -> list[float]:
    return [float(number) / 100 for number in re.findall(r"([\d.]+)\s%", text)]


@pytest.mark.parametrize(("forget", "retain"), [(0.12, 0.97), (0.004, 0.5), (0.063, 0.996), (0.73, 0.9)])
def test_the_sentence_tells_the_numbers_of_the_results(results: Make, forget: float, retain: float) -> None:
    told = shares(verdict(results(forget=forget, retain=retain)).result)
    assert told == pytest.approx([forget, 0.98, 0.06, retain, 0.99], abs=0.005)


@pytest.mark.parametrize(
    ("changes", "outcome", "words"),
    [
        ({}, "suppressed", "Suppressed is not removed"),
        ({"p_value": 0.4, "auc": 0.55}, "passed", "evidence of removal, not proof"),
        ({"p_value": 0.4, "auc": 0.9}, "suppressed", "still recognises the forgotten rows"),
        ({"p_value": 0.4, "auc": 0.1}, "suppressed", "unnaturally unlikely"),
        ({"p_value": 1e-4, "auc": 0.52}, "suppressed", "truth ratios still differ"),
        ({"forget": 0.97}, "kept", "not even suppressed"),
        ({"forget": 0.97, "p_value": 0.4, "auc": 0.52}, "kept", "not forgotten"),
        ({"forget": 0.5}, "partial", "not even suppressed"),
    ],
)
def test_outcomes(results: Make, changes: dict[str, float], outcome: str, words: str) -> None:
    judged = verdict(results(**changes))
    assert judged.outcome == outcome
    assert words in judged.caution
    assert ("still reproduces" in judged.result) == (outcome in ("kept", "partial"))


@pytest.mark.parametrize("auc", [0.0, 0.2, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("p_value", [0.0, 1e-20, 0.049])
def test_removal_is_never_claimed_when_forget_quality_is_bad(results: Make, auc: float, p_value: float) -> None:
    judged = verdict(results(p_value=p_value, auc=max(auc, 0.03)))
    assert "evidence of removal" not in judged.text
    assert judged.outcome == "suppressed"


def test_the_attack_is_measured_against_the_retrained_model(document: Callable[..., dict[str, Any]], results: Make) -> None:
    """A forget set from another distribution than the holdout gives a high AUC on any model: that alone is no sign of memory."""
    shifted = document(p_value=0.4, auc=0.9)
    shifted["models"]["unlearned"]["tests"] = removal_tests(0.4, 0.9, reference=0.89)
    shifted["models"]["retrained"]["mia_auc"] = dict.fromkeys(("loss", "zlib", "min_k", "min_k_plus_plus"), 0.89)
    assert verdict(Results.model_validate(shifted)).outcome == "passed"
    assert verdict(results(p_value=0.4, auc=0.9)).outcome == "suppressed"


def test_a_damaged_model_is_called_damaged(results: Make) -> None:
    assert "damaged" in verdict(results(retain=0.5)).badge
    assert "damaged" not in verdict(results(retain=0.97)).badge


def test_what_was_not_tested_is_said(document: Callable[..., dict[str, Any]]) -> None:
    changed = document(retrained=False)
    model = changed["models"]["unlearned"]
    model |= {"forget_quality": None, "forget_quality_ks": None, "mia_auc": None, "tests": None}
    model["reasons"] = {"forget_quality": "no retrained model", "forget_quality_ks": "no retrained model", "mia_auc": "no holdout rows"}
    judged = verdict(Results.model_validate(changed))
    assert judged.outcome == "unknown"
    assert "no retrained model" in judged.caution
    assert "never trained" not in judged.result
    model |= {"mia_auc": {"loss": 0.5}, "tests": removal_tests(0.4, 0.5)}
    model["tests"]["forget_quality"] = {"reason": "no retrained model"}
    del model["reasons"]["mia_auc"]
    judged = verdict(Results.model_validate(changed))
    assert judged.outcome == "unknown" and "The one removal test" in judged.caution and "no retrained model" in judged.caution


def test_without_an_unlearned_model_nothing_is_judged(document: Callable[..., dict[str, Any]]) -> None:
    changed = document()
    changed["models"]["unlearned"] = None
    changed["reasons"]["models.unlearned"] = "the run stopped before it was evaluated"
    judged = verdict(Results.model_validate(changed))
    assert judged.outcome == "unknown" and "the run stopped" in judged.result


def test_twins_are_compared_only_within_a_method_and_seed(results: Make) -> None:
    second, first = results(), results(optimizer="adamw", forget=0.41, retain=0.955)
    sentence = twin_sentence(["SO", "FO"], [second, first])
    assert sentence is not None and shares(sentence) == pytest.approx([0.12, 0.41, 0.97, 0.955], abs=0.006)
    assert twin_sentence(["FO", "SO"], [first, second]) == sentence
    assert twin_sentence(["a", "b"], [second, results(optimizer="adamw", method="po")]) is None
    assert twin_sentence(["a", "b"], [second, results(optimizer="adamw", seed=1)]) is None
    assert twin_sentence(["a"], [second]) is None
    assert twin_sentence(["a", "b", "c"], [second, first, results(optimizer="signum")]) is None  # which of the two is the twin?


def test_many_runs_are_counted(results: Make) -> None:
    runs = [results(), results(p_value=0.4, auc=0.52), results(forget=0.97), results(retain=0.4)]
    assert headline([verdict(run) for run in runs[:3]]) is None
    assert headline([verdict(run) for run in runs]) == (
        "Of 4 runs: 1 passed every test here; 2 suppressed, not shown to be removed; 1 not forgotten. In 1 of them the rest is damaged."
    )


def test_without_rouge_nothing_is_called_suppressed(document: Callable[..., dict[str, Any]]) -> None:
    changed = document()
    del changed["models"]["unlearned"]["forget"]["rougeL_recall"]
    judged = verdict(Results.model_validate(changed))
    assert judged.outcome == "unknown" and judged.caution.startswith("It is not shown to be removed")
    assert "not measured" in judged.result


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (percent(0), "0 %"),
        (percent(0.0001), "under 0.1 %"),
        (percent(0.004), "0.4 %"),
        (percent(0.126), "13 %"),
        (percent(0.996), "99.6 %"),
        (percent(0.9999), "over 99.9 %"),
        (percent(1 + 1e-8), "100 %"),
        (log10_p(1.0), "0.0"),
        (log10_p(0.0), "< −300"),
        (log10_p(5e-10), "−9.3"),
        (p_phrase(0.31), "p = 0.31"),
        (p_phrase(4.8e-10), "p = 5×10⁻¹⁰"),
        (p_phrase(0.0), "p < 10⁻³⁰⁰"),
        (duration(4.24), "4.2 s"),
        (duration(312), "5.2 min"),
        (duration(59.9), "1.0 min"),
        (duration(9000), "2.5 h"),
        (memory(0), "0 B"),
        (memory(7_200_000), "6.9 MiB"),
        (memory(150 * 2**30), "150.0 GiB"),
        (compact(5e-05), "5e−05"),
        (compact(-0.0), "0"),
        (compact(12345), "12,345"),
    ],
)
def test_numbers_for_people(shown: str, expected: str) -> None:
    assert shown.replace("\u00a0", " ") == expected
