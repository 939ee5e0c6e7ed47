"""The removal tests of one model, from its rows and the retrained model's: what they found and what they could have found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soul.evaluate.eval_log import ATTACKS, EvalLog
from soul.evaluate.same_rows import differences, zlibs_apart
from soul.evaluate.score import truth_ratios
from soul.evaluate.truth_ratio import TruthRatioMean
from soul.statistics.attacks import AttackTest, against_guessing, against_model
from soul.statistics.distance import compare_distributions

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]


def removal_tests(
    log: EvalLog, retrained: EvalLog | None, mean: TruthRatioMean = "geometric", *, allow_mismatch: bool = False
) -> dict[str, dict[str, Any]]:
    """Entries of a model's `tests` in results.json: "forget_quality", and "mia_auc.<attack>"; a test that was not run has a `reason`.

    `allow_mismatch`: also against a gold standard that says it is of other rows.
    """
    apart = () if retrained is None or allow_mismatch else differences(log, retrained)
    if apart:
        reason = f"the gold standard does not fit: {'; '.join(apart)}"[:400]
        return {name: {"reason": reason} for name in ("forget_quality", *(f"mia_auc.{attack}" for attack in ATTACKS))}
    return {"forget_quality": _forget_quality(log, retrained, mean), **_attacks(log, retrained, insists=allow_mismatch)}


def _forget_quality(log: EvalLog, retrained: EvalLog | None, mean: TruthRatioMean) -> dict[str, Any]:
    if retrained is None:
        return {"reason": "there is no retrained model to compare with"}
    first, second = _ratios(log, mean), _ratios(retrained, mean)
    if not first or not second:
        return {"reason": "truth ratios are missing or not finite"}
    if len(first) != len(second):
        return {"reason": f"the retrained model was measured on {len(second)} forget rows, this one on {len(first)}"}
    found = compare_distributions(first, second)
    return {
        "num_rows": len(first),
        "num_others": len(second),
        "value": found.distance,
        "low": found.low,
        "high": found.high,
        "p_value": found.p_value,
        "smallest_p": found.smallest_p,
        "detectable": _finite(found.detectable),
    }


def _ratios(log: EvalLog, mean: TruthRatioMean) -> list[float]:
    column = truth_ratios(log.splits["forget"], mean)[0] if "forget" in log.splits else None
    values = [value for value in column or () if value is not None]
    return values if all(map(math.isfinite, values)) else []


def _attacks(log: EvalLog, retrained: EvalLog | None, *, insists: bool) -> dict[str, dict[str, Any]]:
    """All attacks that both models have, tested together; the others with the reason why not."""
    usable: list[str] = []
    found: dict[str, dict[str, Any]] = {}
    for attack in ATTACKS:
        reason = _why_not(log, retrained, attack, insists=insists)
        if reason is None:
            usable.append(attack)
        else:
            found[f"mia_auc.{attack}"] = {"reason": reason}
    if not usable:
        return found
    logs = [log] if retrained is None else [log, retrained]
    members, present_members = _matrix(logs, "forget", usable)
    others, present_others = _matrix(logs, "holdout", usable)
    if not len(members[0]) or not len(others[0]):
        return found | {f"mia_auc.{attack}": {"reason": "no row has a score of every attack"} for attack in usable}
    authors = _authors(log, present_members, present_others)
    if retrained is None:
        tests = against_guessing(members[0], others[0], authors)
    else:
        tests = against_model(members[0], others[0], members[1], others[1], authors)
    sizes = {"num_rows": len(members[0]), "num_others": len(others[0])}
    if authors is not None:
        sizes["num_authors"] = len(set(authors[: len(members[0])]))
    return found | {f"mia_auc.{attack}": sizes | _entry(test) for attack, test in zip(usable, tests, strict=True)}


def _why_not(log: EvalLog, retrained: EvalLog | None, attack: str, *, insists: bool) -> str | None:
    for model, name in ((log, "this model"), (retrained, "the retrained model")):
        if model is None:
            continue
        for split in ("forget", "holdout"):
            rows = model.splits.get(split)
            if rows is None or attack not in rows.attacks:
                return f"{name} has no scores of single {split} rows"
            if not all(value is None or math.isfinite(value) for value in rows.attacks[attack]):
                return f"{name} has {split} scores that are not finite"
    if retrained is not None and any(log.splits[split].keys != retrained.splits[split].keys for split in ("forget", "holdout")):
        return "the retrained model was measured on other rows"
    if retrained is not None and attack == "zlib" and not insists:
        return zlibs_apart(log, retrained)
    return None


def _authors(log: EvalLog, members: Flags, others: Flags) -> list[int] | None:
    """A number for the author of each row that has a score, forget rows first; None where the log knows none, or no row shares one."""
    forget, holdout = log.splits["forget"].groups, log.splits["holdout"].groups
    if forget is None or holdout is None:
        return None
    kept = [group for group, present in zip(forget, members, strict=True) if present]
    kept += [len(forget) + group for group, present in zip(holdout, others, strict=True) if present]
    return kept if len(set(kept)) < len(kept) else None


def _matrix(logs: Sequence[EvalLog], split: str, attacks: Sequence[str]) -> tuple[list[Array], Flags]:
    """Rows x attacks of every model, without the rows that lack a score in any; and which rows are left."""
    tables = [np.array([log.splits[split].attacks[attack] for attack in attacks], dtype=np.float64).T for log in logs]
    present: Flags = np.asarray(~np.isnan(np.concatenate(tables, axis=1)).any(axis=1))
    return [table[present] for table in tables], present


def _entry(test: AttackTest) -> dict[str, Any]:
    values = asdict(test)
    return {"value": values.pop("area"), **values, "detectable": _finite(test.detectable)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
