"""What the numbers say, in two plain sentences that claim no more than was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from soul.report.damage import Damage, damage
from soul.report.evidence import Evidence, evidence
from soul.report.numbers import percent
from soul.report.results import ModelResults, Results
from soul.report.words import ORDERS

Outcome = Literal["passed", "suppressed", "partial", "kept", "damaged", "untestable", "unknown"]
BADGES: Final[dict[Outcome, str]] = {
    "passed": "passed every test here",
    "suppressed": "suppressed, not shown to be removed",
    "partial": "partly forgotten",
    "kept": "not forgotten",
    "damaged": "forgotten, but the rest is damaged",
    "untestable": "not testable",
    "unknown": "no conclusion",
}

FEW_LEFT: Final = 0.75  # share of the way from target to retrained that counts as forgotten
FEW_RUNS: Final = 3  # up to here each run's verdict comes first
KNEW: Final = 0.05  # what the target must reproduce beyond the retrained model before there is anything to forget


@dataclass(frozen=True, slots=True)
class Verdict:
    """`damage` says what was lost and what was not looked at; `size` says how many rows, or authors, are too few for a test."""

    outcome: Outcome
    damaged: bool
    result: str
    caution: str
    damage: str = ""
    size: str | None = None

    @property
    def badge(self) -> str:
        rows = f" ({self.size})" if self.outcome == "untestable" else ""
        return BADGES[self.outcome] + rows + ("; the rest is damaged" if self.damaged and self.outcome != "damaged" else "")

    @property
    def text(self) -> str:
        return " ".join(filter(None, (self.result, self.damage, self.caution)))


def verdict(results: Results) -> Verdict:
    """Passed is a model that forgot, whose every removal test was run, could have failed and did not, and that is known to be undamaged."""
    target, unlearned, retrained = (results.models[name] for name in ("target", "unlearned", "retrained"))
    if unlearned is None:
        reason = results.reasons["models.unlearned"]
        return Verdict("unknown", False, f"There is no unlearned model to judge: {reason}.", "Nothing is claimed about it.")
    forgotten = _forgotten(target, unlearned, retrained)
    found, lost = evidence(unlearned, retrained), damage(target, unlearned)
    return Verdict(
        outcome=_outcome(forgotten, found, lost),
        damaged=bool(lost.lost),
        result=_result(target, unlearned, retrained, still=forgotten is not None and forgotten < FEW_LEFT),
        caution=_caution(forgotten, found, known=_nothing_known(target, unlearned, retrained)),
        damage=lost.sentence,
        size=found.size,
    )


def _value(model: ModelResults | None, path: str) -> float | None:
    return model.value(path) if model else None


def _forgotten(target: ModelResults | None, unlearned: ModelResults, retrained: ModelResults | None) -> float | None:
    """Share of the way from the target's forget ROUGE-L down to the retrained model's (0 where there is none)."""
    path = "forget.rougeL_recall"
    before, after = _value(target, path), unlearned.value(path)
    floor = _value(retrained, path) or 0.0
    if before is None or after is None or before - floor < KNEW:
        return None
    return (before - after) / (before - floor)


def _nothing_known(target: ModelResults | None, unlearned: ModelResults, retrained: ModelResults | None) -> str | None:
    """Why there was nothing to forget, where the target hardly knew the rows."""
    path = "forget.rougeL_recall"
    before, floor = _value(target, path), _value(retrained, path)
    if before is None or unlearned.value(path) is None or before - (floor or 0.0) >= KNEW:
        return None
    beside = "" if floor is None else " beyond what a model never trained on them does"
    return f"The target hardly reproduced these rows{beside}, so there was nothing to forget"


def _outcome(forgotten: float | None, found: Evidence, lost: Damage) -> Outcome:
    if forgotten is None:
        return "unknown"
    if forgotten < FEW_LEFT:
        return "partial" if forgotten >= 0.25 else "kept"
    if found.failed:
        return "suppressed"
    if found.untestable:
        return "untestable"
    if lost.lost:
        return "damaged"
    return "passed" if found.complete and not lost.unknown else "unknown"


def _result(target: ModelResults | None, unlearned: ModelResults, retrained: ModelResults | None, *, still: bool) -> str:
    forget, retain = unlearned.value("forget.rougeL_recall"), unlearned.value("retain.rougeL_recall")
    if forget is None:
        first = (
            f"How much of the forgotten answers the model still reproduces was not measured ({unlearned.reason('forget.rougeL_recall')})"
        )
    else:
        known = []
        if (before := _value(target, "forget.rougeL_recall")) is not None:
            known.append(f"before {percent(before)}")
        if (never := _value(retrained, "forget.rougeL_recall")) is not None:
            known.append(f"a model never trained on them {percent(never)}")
        first = (
            f"After unlearning the model {'still ' if still else ''}reproduces {percent(forget)} of the forgotten answers{_brackets(known)}"
        )
    if retain is None:
        return f"{first}; what it keeps of the rest was not measured ({unlearned.reason('retain.rougeL_recall')})."
    before = _value(target, "retain.rougeL_recall")
    return f"{first} and keeps {percent(retain)} of the rest{_brackets([] if before is None else [f'before {percent(before)}'])}."


def _brackets(parts: Sequence[str]) -> str:
    return f" ({', '.join(parts)})" if parts else ""


def _caution(forgotten: float | None, found: Evidence, *, known: str | None) -> str:
    if forgotten is not None and forgotten < FEW_LEFT and not found.failed:
        return "It has not forgotten what it was asked to forget."
    if found.failed:
        lead = "Suppressed is not removed"
        if forgotten is None:
            lead = known or "It is not shown to be removed"
        elif forgotten < FEW_LEFT:
            lead = "Much of it is not even suppressed"
        return f"{lead}: {'; and '.join(found.failed)}."
    told = [f"{known}."] if known else []
    if found.untestable:
        told.append(f"Not testable ({'; '.join(found.untestable)}).")
    if found.complete:
        told.append(f"The tests here cannot tell it from a model never trained on these rows ({'; '.join(found.passed)}).")
        if known is None:
            told.append("That is evidence of removal, not proof.")
    elif found.passed:
        told.append(f"The one removal test that could say something did not fail ({found.passed[0]}).")
    elif not found.untestable:
        told.append("Whether the knowledge is removed or only suppressed was not tested.")
    if found.missing:
        told.append(f"Not run: {'; '.join(found.missing)}.")
    return " ".join(told)


def headline(verdicts: Sequence[Verdict]) -> str | None:
    """How many runs ended how, where there are too many to begin with each of them; None for a few."""
    if len(verdicts) <= FEW_RUNS:
        return None
    outcomes = [judged.outcome for judged in verdicts]
    counts = [f"{outcomes.count(outcome)} {badge}" for outcome, badge in BADGES.items() if outcome in outcomes]
    damaged = sum(judged.damaged for judged in verdicts)
    return f"Of {len(verdicts)} runs: {'; '.join(counts)}." + (f" In {damaged} of them the rest is damaged." if damaged else "")


def twins(runs: Sequence[Results]) -> tuple[int, int] | None:
    """Positions of the second- and the first-order run of one method and seed, where the runs hold exactly one such pair."""
    pairs = [
        (i, j)
        for i, second in enumerate(runs)
        for j, first in enumerate(runs)
        if (ORDERS.get(second.optimizer), ORDERS.get(first.optimizer)) == ("SO", "FO")
        and (second.method, second.seed) == (first.method, first.seed)
    ]
    return pairs[0] if len(pairs) == 1 else None


def twin_sentence(labels: Sequence[str], runs: Sequence[Results]) -> str | None:
    """What the second-order run reaches beside its first-order twin; None without twins or their numbers."""
    pair = twins(runs)
    if pair is None:
        return None
    second, first = pair
    return _twin(labels[second], runs[second].models["unlearned"], labels[first], runs[first].models["unlearned"])


def _twin(second: str, after: ModelResults | None, first: str, before: ModelResults | None) -> str | None:
    forget_2, retain_2 = _value(after, "forget.rougeL_recall"), _value(after, "retain.rougeL_recall")
    forget_1, retain_1 = _value(before, "forget.rougeL_recall"), _value(before, "retain.rougeL_recall")
    if forget_2 is None or retain_2 is None or forget_1 is None or retain_1 is None:
        return None
    return (
        f"With the settings used, {second} reproduces {percent(forget_2)} of the forgotten answers where {first} reproduces "
        f"{percent(forget_1)}, and keeps {percent(retain_2)} of the rest against {percent(retain_1)}: one seed and one learning rate each, "
        "which ranks these runs, not the optimizers."
    )
