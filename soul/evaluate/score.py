"""From per-row values to metrics: what `soul score` prints and what a live evaluation writes into results.json.

A metric that cannot be computed is None and has a reason under its path ("forget.truth_ratio", "model_utility", ...).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from soul.evaluate.eval_log import ATTACKS, Column, EvalLog, SplitLog, option_probabilities_of, truth_ratios_of
from soul.evaluate.legacy import legacy_scrambled_mia_auc, legacy_self_ks
from soul.evaluate.memorization import probability
from soul.evaluate.privacy import auc, privleak
from soul.evaluate.same_rows import differences, zlibs_apart
from soul.evaluate.truth_ratio import TruthRatioMean, indistinguishability, preference, truth_ratio
from soul.evaluate.utility import UTILITY_METRICS, UTILITY_SPLITS, kolmogorov_smirnov, model_utility

SCORED_SPLITS: Final = ("forget", "retain", "real_authors", "world_facts")
NOT_RECORDED: Final = "the log does not record it"
_MEANS: Final = ("rougeL_recall", "exact_memorization", "extraction_strength", "accuracy")

Metrics = dict[str, float | None]
Result = tuple[float, None] | tuple[None, str]  # a value, or the reason why there is none


@dataclass(frozen=True, slots=True)
class Scores:
    """One model's metrics; the fields are those of a model in results.json, `privleak` and `legacy` stand beside it.

    A split that was not evaluated is None as a whole. `privleak` is in percent; both need what `reasons` says they need.
    """

    splits: dict[str, Metrics | None]
    forget_quality: float | None
    forget_quality_ks: float | None
    model_utility: float | None
    mia_auc: dict[str, float | None] | None
    privleak: dict[str, float | None] | None
    legacy: dict[str, float | None]
    reasons: dict[str, str]

    def model_entry(self) -> dict[str, Any]:
        """A model's entry of results.json; reasons only for what is in it."""
        outside = ("privleak", "legacy")
        return {
            **self.splits,
            "forget_quality": self.forget_quality,
            "forget_quality_ks": self.forget_quality_ks,
            "model_utility": self.model_utility,
            "mia_auc": self.mia_auc,
            "reasons": {path: reason for path, reason in self.reasons.items() if path.partition(".")[0] not in outside},
        }


def score(log: EvalLog, *, retrained: EvalLog | None = None, mean: TruthRatioMean = "geometric", allow_mismatch: bool = False) -> Scores:
    """All metrics of `log`; forget quality and privleak against `retrained`, which has to be of the same rows, made the same way."""
    found = () if retrained is None or allow_mismatch else differences(log, retrained)
    apart = f"the retrained model's log cannot be compared: {'; '.join(found)}" if found else None
    reasons: dict[str, str] = {}
    splits: dict[str, Metrics | None] = {}
    for split in SCORED_SPLITS:
        if split in log.splits:
            splits[split] = _split_metrics(log, split, mean, reasons)
        else:
            splits[split] = None
            reasons[split] = log.notes.get(split, f"the evaluation has no {split} split")
    test = _forget_quality(log, retrained, mean) if apart is None else (None, apart)
    if test[1] is not None:
        reasons["forget_quality"] = reasons["forget_quality_ks"] = test[1]
    areas = _attack_areas(log, reasons)
    other_zlib = None if retrained is None or allow_mismatch else zlibs_apart(log, retrained)
    return Scores(
        splits=splits,
        forget_quality=test[0] and test[0][1],
        forget_quality_ks=test[0] and test[0][0],
        model_utility=_take("model_utility", _utility(splits), reasons),
        mia_auc=areas,
        privleak=_privleaks(areas, retrained, reasons, apart, other_zlib),
        legacy=_legacy(log, mean, reasons),
        reasons=reasons,
    )


def _take(path: str, result: Result, reasons: dict[str, str]) -> float | None:
    value, reason = result
    if reason is not None:
        reasons[path] = reason
    return value


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _aggregate(column: Column | None, aggregate: Callable[[Sequence[float]], float], missing: str = NOT_RECORDED) -> Result:
    """Aggregate the rows that have a value; None when no row has one or a value is not finite."""
    values = [value for value in column or () if value is not None]
    if not values:
        return None, missing
    bad = sum(not math.isfinite(value) for value in values)
    if bad:
        return None, f"{bad} of {len(values)} rows have no finite value: the model's log-probabilities overflow or are NaN"
    return aggregate(values), None


def _split_metrics(log: EvalLog, split: str, mean: TruthRatioMean, reasons: dict[str, str]) -> Metrics:
    values = log.splits[split]
    optioned = split in ("real_authors", "world_facts")
    answers = option_probabilities_of(values) if optioned else _map(values.answer_nll, probability)
    no_options = "no wrong answers to normalise over" if optioned else NOT_RECORDED
    ratios, why = truth_ratios(values, mean)
    results: dict[str, Result] = {
        "probability": _aggregate(answers, _mean, no_options if values.answer_nll is not None else NOT_RECORDED),
        "truth_ratio": _aggregate(ratios, indistinguishability if split == "forget" else preference, why),
        "choice_accuracy": _aggregate(_choices(values), _mean, "no right and wrong answers to choose between"),
    }
    results |= {name: _aggregate(getattr(values, name), _mean) for name in _MEANS}
    metrics: Metrics = {}
    for name, result in results.items():
        path = f"{split}.{name}"
        noted = log.notes.get(path)
        metrics[name] = _take(path, (None, noted) if result[0] is None and noted is not None else result, reasons)
    return metrics


def _map(column: Column | None, function: Callable[[float], float]) -> Column | None:
    return column and tuple(None if value is None else function(value) for value in column)


def truth_ratios(values: SplitLog, mean: TruthRatioMean) -> tuple[Column | None, str]:
    """The split's truth ratios, and why there are none. A recorded ratio is geometric and wins over the losses."""
    if mean == "geometric":
        return truth_ratios_of(values), "no right answer with wrong ones beside it"
    if values.right_nll is None or values.wrong_nlls is None:
        recorded = values.recorded_truth_ratio is not None
        return None, "only geometric ratios are recorded, without the losses" if recorded else "no right answer with wrong ones beside it"
    ratio = partial(truth_ratio, mean=mean)
    pairs = zip(values.right_nll, values.wrong_nlls, strict=True)
    return tuple(None if right is None or wrong is None else ratio(right, wrong) for right, wrong in pairs), ""


def _choices(values: SplitLog) -> Column | None:
    """1 where the right answer is likelier, per token, than every wrong one."""
    if values.right_nll is None or values.wrong_nlls is None:
        return None
    pairs = zip(values.right_nll, values.wrong_nlls, strict=True)
    return tuple(None if right is None or wrong is None else float(right < min(wrong)) for right, wrong in pairs)


def _finite_ratios(log: EvalLog, split: str, mean: TruthRatioMean) -> tuple[list[float], str]:
    if split not in log.splits:
        return [], f"no {split} split"
    column, why = truth_ratios(log.splits[split], mean)
    values = [value for value in column or () if value is not None]
    if not all(math.isfinite(value) for value in values):
        return [], "truth ratios that are not finite"
    return values, why


def _forget_quality(log: EvalLog, retrained: EvalLog | None, mean: TruthRatioMean) -> tuple[tuple[float, float], None] | tuple[None, str]:
    if retrained is None:
        return None, "needs the log of a model trained without the forget set (--retrained)"
    own, why = _finite_ratios(log, "forget", mean)
    if not own:
        return None, f"the evaluation has no forget truth ratios: {why}"
    gold, why = _finite_ratios(retrained, "forget", mean)
    if not gold:
        return None, f"the retrained model's log has no forget truth ratios: {why}"
    if len(own) != len(gold):
        return None, f"the retrained model's log has {len(gold)} forget rows, this evaluation {len(own)}: expected the same rows"
    test = kolmogorov_smirnov(own, gold)
    return (test.statistic, test.p_value), None


def _utility(splits: dict[str, Metrics | None]) -> Result:
    components = {f"{split}.{name}": (splits[split] or {}).get(name) for split in UTILITY_SPLITS for name in UTILITY_METRICS}
    missing = [path for path, value in components.items() if value is None]
    if missing:
        return None, f"needs nine components, without a value: {', '.join(missing)}"
    return model_utility([value for value in components.values() if value is not None]), None


def _attack_areas(log: EvalLog, reasons: dict[str, str]) -> dict[str, float | None] | None:
    """AUC per attack from forget and holdout rows, else as recorded; None as a whole when there is neither."""
    areas: dict[str, float | None] = {}
    forget, holdout = log.splits.get("forget"), log.splits.get("holdout")
    for attack in ATTACKS:
        if forget is not None and holdout is not None and attack in forget.attacks and attack in holdout.attacks:
            members, others = (_present(split.attacks[attack]) for split in (forget, holdout))
            if not members or not others:
                areas[attack] = None
                reasons[f"mia_auc.{attack}"] = "no rows with finite scores"
            else:
                areas[attack] = auc(members, others)
        elif attack in log.recorded_auc:
            areas[attack] = log.recorded_auc[attack]
    if not areas:
        reasons["mia_auc"] = log.notes.get("mia_auc", "needs scores of forget rows and of a holdout set that no model was trained on")
        return None
    for attack in ATTACKS:
        if attack not in areas:
            areas[attack] = None
            reasons[f"mia_auc.{attack}"] = NOT_RECORDED
    return areas


def _present(column: Column) -> list[float]:
    """The row scores, or nothing when one is not finite."""
    values = [value for value in column if value is not None]
    return values if all(math.isfinite(value) for value in values) else []


def _privleaks(
    areas: dict[str, float | None] | None, retrained: EvalLog | None, reasons: dict[str, str], apart: str | None, other_zlib: str | None
) -> dict[str, float | None] | None:
    if apart is not None:
        reasons["privleak"] = apart
        return None
    gold = None if retrained is None else _attack_areas(retrained, {})
    if areas is None or gold is None:
        reasons["privleak"] = "needs attack AUCs of this model and of the retrained one, from the same forget and holdout sets"
        return None
    leaks: dict[str, float | None] = {}
    for attack in ATTACKS:
        if attack == "zlib" and other_zlib is not None:
            leaks[attack], reasons["privleak.zlib"] = None, other_zlib
            continue
        own, reference = areas[attack], gold[attack]
        leaks[attack] = None if own is None or reference is None else privleak(own, reference)
        if leaks[attack] is None:
            reasons[f"privleak.{attack}"] = "an AUC is missing" if own is None or reference is None else "the retrained model's AUC is 1"
    return leaks


def _legacy(log: EvalLog, mean: TruthRatioMean, reasons: dict[str, str]) -> dict[str, float | None]:
    values: dict[str, float | None] = {"legacy_self_ks_p": None, "legacy_self_ks": None, "legacy_scrambled_mia_auc": None}
    forget, _ = _finite_ratios(log, "forget", mean)
    retain, _ = _finite_ratios(log, "retain", mean)
    if forget and retain:
        test = legacy_self_ks(forget, retain)
        values |= {"legacy_self_ks_p": test.p_value, "legacy_self_ks": test.statistic}
    else:
        reasons["legacy.legacy_self_ks_p"] = reasons["legacy.legacy_self_ks"] = "needs truth ratios of forget and retain rows"
    scores = [_present(log.splits[split].attacks.get("min_k", ())) if split in log.splits else [] for split in ("forget", "holdout")]
    if all(scores) and len(scores[1]) < sum(map(len, scores)):
        values["legacy_scrambled_mia_auc"] = legacy_scrambled_mia_auc(scores[0], scores[1])
    else:
        reasons["legacy.legacy_scrambled_mia_auc"] = "needs Min-K scores of forget and holdout rows"
    return values
