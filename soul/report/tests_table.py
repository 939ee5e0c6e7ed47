"""The removal tests as a table: rows, what was found with its interval, p, and the smallest effect that would have been found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from soul.report.evidence import size_of
from soul.report.grid_type import Grid
from soul.report.numbers import DASH, fixed, p_phrase
from soul.report.results import RemovalTest, Results
from soul.report.words import ATTACKS

HEAD: Final = ("test", "rows", "found [95 %]", "retrained", "p", "would see", "outcome")
CAPTION: Final = "Removal tests: can the model be told from one that never saw the rows?"
TESTS_MEANING: Final = (
    "Each test asks whether the model can be told from one that never saw the forget rows; p at or below 0.05 says it can. Rows: forget "
    "rows, and those that they are compared with. Retrained: that model's AUC, or 0.5 where there is none. Would see: the smallest "
    "distance or difference that the test would have found in four of five such runs; anything smaller may be there unnoticed. A test "
    "that cannot reach 0.05 with so few rows is not testable, which is no pass. Forget quality compares truth ratios (the interval of "
    "their KS distance holds at least 95 %). An attack's p counts that several attacks were tried, and rows about one author count once. "
    "The verdict asks the smaller p of forget quality and attacks for 0.025 (Holm): one in twenty models that never saw the rows fails."
)


def tests_grid(labels: Sequence[str], runs: Sequence[Results]) -> Grid | None:
    """One row for every test of every run; None where no run has any."""
    rows = []
    for label, run in zip(labels, runs, strict=True):
        unlearned = run.models["unlearned"]
        for name, test in ((unlearned and unlearned.tests) or {}).items():
            title = "forget quality (KS)" if name == "forget_quality" else f"{ATTACKS[name.removeprefix('mia_auc.')].title} attack (AUC)"
            rows.append((title if len(runs) == 1 else f"{label}: {title}", *_cells(test)))
    return Grid(CAPTION, HEAD, tuple(rows)) if rows else None


def _cells(test: RemovalTest) -> tuple[str, ...]:
    if test.reason is not None:
        return (*[DASH] * (len(HEAD) - 2), f"not run: {test.reason}")
    outcome = "told apart" if test.rejected else "not told apart" if test.testable else f"not testable ({size_of(test)[1]})"
    return (
        f"{test.num_rows:,} / {test.num_others:,}",
        f"{_two(test.value)} [{_two(test.low)}, {_two(test.high)}]",
        _two(test.reference),
        DASH if test.p_value is None else p_phrase(test.p_value).removeprefix("p\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}"),
        _two(test.detectable) if test.testable else "nothing",
        outcome,
    )


def _two(value: float | None) -> str:
    return DASH if value is None else fixed(value, 2)
