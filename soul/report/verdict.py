"""What the numbers say, in two plain sentences that claim no more than was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from soul.report.numbers import fixed, p_phrase, percent
from soul.report.results import ModelResults, Results
from soul.report.words import ATTACKS, ORDERS

Outcome = Literal["passed", "suppressed", "partial", "kept", "unknown"]
BADGES: Final[dict[Outcome, str]] = {
    "passed": "passed every test here",
    "suppressed": "suppressed, not shown to be removed",
    "partial": "partly forgotten",
    "kept": "not forgotten",
    "unknown": "no conclusion",
}

SIGNIFICANT: Final = 0.05  # the usual level of the forget-quality test
AUC_MARGIN: Final = 0.1  # how far an attack may do better than it does on a model that never saw the rows
FEW_LEFT: Final = 0.75  # share of the way from target to retrained that counts as forgotten
FEW_RUNS: Final = 3  # up to here each run's verdict comes first
DAMAGED: Final = 0.9  # below this share of the old ROUGE-L, the rest of the model counts as damaged


@dataclass(frozen=True, slots=True)
class Verdict:
    outcome: Outcome
    damaged: bool
    result: str
    caution: str

    @property
    def badge(self) -> str:
        return BADGES[self.outcome] + ("; the rest is damaged" if self.damaged else "")

    @property
    def text(self) -> str:
        return f"{self.result} {self.caution}"


def verdict(results: Results) -> Verdict:
    target, unlearned, retrained = (results.models[name] for name in ("target", "unlearned", "retrained"))
    if unlearned is None:
        reason = results.reasons["models.unlearned"]
        return Verdict("unknown", False, f"There is no unlearned model to judge: {reason}.", "Nothing is claimed about it.")
    forgotten = _forgotten(target, unlearned, retrained)
    kept, before = unlearned.value("retain.rougeL_recall"), _value(target, "retain.rougeL_recall")
    damaged = kept is not None and before is not None and kept < DAMAGED * before
    failed, passed = _failed_tests(unlearned, retrained)
    return Verdict(
        outcome=_outcome(forgotten, failed=bool(failed), tested=bool(passed)),
        damaged=damaged,
        result=_result(target, unlearned, retrained, still=forgotten is not None and forgotten < FEW_LEFT),
        caution=_caution(unlearned, forgotten, failed, passed),
    )


def _value(model: ModelResults | None, path: str) -> float | None:
    return model.value(path) if model else None


def _forgotten(target: ModelResults | None, unlearned: ModelResults, retrained: ModelResults | None) -> float | None:
    """Share of the way from the target's forget ROUGE-L down to the retrained model's (0 where there is none)."""
    path = "forget.rougeL_recall"
    before, after = _value(target, path), unlearned.value(path)
    floor = _value(retrained, path) or 0.0
    if before is None or after is None or before <= floor:
        return None
    return (before - after) / (before - floor)


def _outcome(forgotten: float | None, *, failed: bool, tested: bool) -> Outcome:
    if forgotten is not None and forgotten < FEW_LEFT:
        return "partial" if forgotten >= 0.25 else "kept"
    if failed and forgotten is not None:
        return "suppressed"
    return "passed" if tested and not failed and forgotten is not None else "unknown"


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


def _failed_tests(unlearned: ModelResults, retrained: ModelResults | None) -> tuple[list[str], list[str]]:
    """Phrases for the removal tests that failed, and for those that passed."""
    failed, passed = [], []
    p_value = unlearned.forget_quality
    if p_value is not None:
        phrase = f"forget quality {p_phrase(p_value)}"
        if p_value < SIGNIFICANT:
            failed.append(f"the model's truth ratios still differ from those of a model never trained on these rows ({phrase})")
        else:
            passed.append(phrase)
    attack = _worst_attack(unlearned, retrained)
    if attack is None:
        return failed, passed
    name, auc, blind = attack
    phrase = f"AUC {fixed(auc, 2)}, {'retrained model' if retrained and retrained.mia_auc else 'guessing'} {fixed(blind, 2)}"
    if auc > blind + AUC_MARGIN:
        failed.append(f"a membership attack ({ATTACKS[name].title}) still recognises the forgotten rows ({phrase})")
    elif auc < blind - AUC_MARGIN:
        failed.append(f"the forgotten rows stand out as unnaturally unlikely ({ATTACKS[name].title}: {phrase})")
    else:
        passed.append(f"membership attack {phrase}")
    return failed, passed


def _worst_attack(unlearned: ModelResults, retrained: ModelResults | None) -> tuple[str, float, float] | None:
    """The attack furthest from what it reaches on the retrained model, or from guessing where that is unknown."""
    found = []
    for name in ATTACKS:
        auc, blind = unlearned.value(f"mia_auc.{name}"), _value(retrained, f"mia_auc.{name}")
        if auc is not None:
            found.append((name, auc, 0.5 if blind is None else blind))
    return max(found, key=lambda item: abs(item[1] - item[2]), default=None)


def _caution(unlearned: ModelResults, forgotten: float | None, failed: Sequence[str], passed: Sequence[str]) -> str:
    if forgotten is not None and forgotten < FEW_LEFT and not failed:
        return "It has not forgotten what it was asked to forget."
    if failed:
        lead = "Suppressed is not removed"
        if forgotten is None:
            lead = "It is not shown to be removed"
        elif forgotten < FEW_LEFT:
            lead = "Much of it is not even suppressed"
        return f"{lead}: {', and '.join(failed)}."
    if len(passed) == 2:
        return (
            f"The tests here cannot tell it from a model never trained on these rows ({'; '.join(passed)}): evidence of removal, not proof."
        )
    untested = unlearned.reason("forget_quality") if unlearned.forget_quality is None else unlearned.reason("mia_auc")
    if passed:
        return f"The one removal test that was run did not fail ({passed[0]}); the other was not run: {untested}."
    return f"Whether the knowledge is removed or only suppressed was not tested: {untested}."


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
