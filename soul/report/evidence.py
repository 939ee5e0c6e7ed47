"""The removal tests of a run in words: which failed, which passed, which could say nothing at this number of rows, which were not run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from soul.report.numbers import fixed, p_phrase
from soul.report.results import ModelResults, RemovalTest
from soul.report.words import ATTACKS
from soul.statistics import LEVEL

REBUILD: Final = (
    "results.json holds no removal tests, it is from an earlier version: `soul report RUN` works them out from the run's logs, "
    "without logs `soul evaluate` measures the model again"
)


@dataclass(frozen=True, slots=True)
class Evidence:
    """Phrases by what became of the tests. `size` is the smallest number of rows, or of authors, among those that are not testable."""

    failed: tuple[str, ...]
    passed: tuple[str, ...]
    untestable: tuple[str, ...]
    missing: tuple[str, ...]
    size: str | None

    @property
    def complete(self) -> bool:
        """Both tests were run, could have failed, and did not."""
        return bool(self.passed) and not (self.failed or self.untestable or self.missing)


def evidence(unlearned: ModelResults, retrained: ModelResults | None) -> Evidence:
    if unlearned.tests is None:
        why = REBUILD
        if unlearned.forget_quality is None and unlearned.mia_auc is None:
            why = "; ".join(dict.fromkeys((unlearned.reason("forget_quality"), unlearned.reason("mia_auc"))))
        return Evidence((), (), (), (why,), None)
    found: dict[str, list[str]] = {"failed": [], "passed": [], "untestable": [], "missing": []}
    few: list[tuple[int, str]] = []
    quality, attacks = unlearned.tests.get("forget_quality"), _attacks(unlearned.tests)
    ran = {name: test for name, test in attacks.items() if test.reason is None}
    rejected = _rejected([test for test in (quality, _clearest(ran)[1] if ran else None) if test is not None and test.reason is None])
    if quality is None or quality.reason is not None:
        found["missing"].append(_why("forget quality", quality, unlearned.reason("forget_quality")))
    else:
        state = _state(quality, rejected)
        lead = "the model's truth ratios still differ from those of a model never trained on these rows: " if state == "failed" else ""
        found[state].append(lead + quality_phrase(quality))
        few += [size_of(quality)] if state == "untestable" else []
    idle = [name for name in ATTACKS if name not in ran and (name in attacks or not ran)]
    if idle:
        names = "membership attacks" if not ran else f"membership attack {', '.join(ATTACKS[name].title for name in idle)}"
        found["missing"].append(_why(names, attacks.get(idle[0]), unlearned.reason("mia_auc")))
    if ran:
        name, test = _clearest(ran)
        state = _state(test, rejected)
        found[state].append(_lead(state, name, test) + attack_phrase(name, test, len(ran), retrained is not None))
        few += [size_of(test)] if state == "untestable" else []
    phrases: dict[str, Any] = {kind: tuple(told) for kind, told in found.items()}
    return Evidence(**phrases, size=min(few)[1] if few else None)


def _attacks(tests: dict[str, RemovalTest]) -> dict[str, RemovalTest]:
    return {name: tests[f"mia_auc.{name}"] for name in ATTACKS if f"mia_auc.{name}" in tests}


def _clearest(tests: dict[str, RemovalTest]) -> tuple[str, RemovalTest]:
    """The attack that decides: one that can say nothing only where all can, then the smallest p, the largest gap."""

    def order(item: tuple[str, RemovalTest]) -> tuple[bool, float, float]:
        test = item[1]
        return not test.testable, 1.0 if test.p_value is None else test.p_value, -abs(test.difference or 0.0)

    return min(tests.items(), key=order)


def _rejected(tests: Sequence[RemovalTest]) -> list[RemovalTest]:
    """Holm's procedure: of two tests the smaller p has to reach half of the level, so that one alarm in twenty is false and not two."""
    found: list[RemovalTest] = []
    left = sorted((test for test in tests if test.can_reject), key=lambda test: 1.0 if test.p_value is None else test.p_value)
    for position, test in enumerate(left):
        if test.p_value is None or test.p_value > LEVEL / (len(left) - position):
            break
        found.append(test)
    return found


def _state(test: RemovalTest, rejected: Sequence[RemovalTest]) -> str:
    if any(test is other for other in rejected):
        return "failed"
    return "passed" if test.testable else "untestable"


def _why(name: str, test: RemovalTest | None, fallback: str) -> str:
    return f"{name}: {test.reason if test is not None and test.reason else fallback}"


def _lead(state: str, name: str, test: RemovalTest) -> str:
    if state != "failed":
        return ""
    if (test.difference or 0.0) > 0:
        return f"a membership attack ({ATTACKS[name].title}) still recognises the forgotten rows: "
    return f"the forgotten rows stand out as unnaturally unlikely ({ATTACKS[name].title}): "


def quality_phrase(test: RemovalTest) -> str:
    text = f"forget quality {_p(test)}, KS distance {_interval(test.value, test.low, test.high)}, n = {_rows(test)}"
    return f"{text}, {_power(test, 'distance')}"


def attack_phrase(name: str, test: RemovalTest, num_attacks: int, beside_retrained: bool) -> str:
    beside = "retrained model" if beside_retrained else "guessing"
    text = f"{ATTACKS[name].title} attack, AUC {_interval(test.value, test.low, test.high)}, {beside} {_number(test.reference)}"
    together = f", adjusted for {num_attacks} attacks" if num_attacks > 1 else ""
    return f"{text}, {_p(test)}{together}, n = {_rows(test)}, {_power(test, 'difference')}"


def _p(test: RemovalTest) -> str:
    return p_phrase(1.0 if test.p_value is None else test.p_value)


def size_of(test: RemovalTest) -> tuple[int, str]:
    """How many there are of what is too few, and in words."""
    if test.num_authors is not None:
        number, unit = test.num_authors, "author"
    else:
        number, unit = min(test.num_rows or 0, test.num_others or 0), "row"
    return number, f"{number} {unit}{'' if number == 1 else 's'}"


def _rows(test: RemovalTest) -> str:
    return f"{test.num_rows:,} and {test.num_others:,}"


def _number(value: float | None) -> str:
    return "–" if value is None else fixed(value, 2)


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    return f"{_number(value)} [{_number(low)}, {_number(high)}]"


def _power(test: RemovalTest, what: str) -> str:
    if not test.can_reject:
        return f"which can reject nothing with {size_of(test)[1]}"
    if test.detectable is None:
        return f"with {size_of(test)[1]} no {what} is sure to be found in four of five such runs"
    return f"a {what} of {fixed(test.detectable, 2)} would be found in four of five such runs"
