"""The policy: how good an unlearned model's report must be before the model may answer anybody."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from soul.report.results import Results
from soul.report.verdict import verdict
from soul.report.words import METRICS

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Metric = Literal["rougeL_recall", "exact_memorization", "probability", "extraction_strength"]


class Policy(BaseModel):
    """An unlearned model keeps `min_utility` of the target's utility, and on the forget rows none of `forget_metrics` is higher than the
    retrained model's by more than `margin`.

    `ceilings` bound those metrics where there is no retrained model; without them such a run is refused. `references` says where target
    and retrained model may be asked for comparison: the target still knows what was to be forgotten. `require_passed` asks for a report
    whose verdict is "passed": every removal test run, testable and not failed, nothing damaged; what is not testable has not passed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_utility: Share = 0.9
    margin: Share = 0.05
    forget_metrics: tuple[Metric, ...] = Field(default=("rougeL_recall", "exact_memorization"), min_length=1)
    ceilings: dict[Metric, Share] = Field(default_factory=dict)
    references: Literal["loopback", "always", "never"] = "loopback"
    require_passed: bool = False


@dataclass(frozen=True, slots=True)
class Check:
    """One rule applied to one report. `value` is None where the report has no such number."""

    name: str
    passed: bool
    value: float | None
    limit: float | None
    text: str


def judge(results: Results, policy: Policy) -> list[Check]:
    """Every rule, passed or not, in reading order."""
    checks = [_utility(results, policy), *(_forgotten(results, policy, metric) for metric in policy.forget_metrics)]
    return [*checks, _verdict(results)] if policy.require_passed else checks


def _verdict(results: Results) -> Check:
    judged = verdict(results)
    return Check("verdict", judged.outcome == "passed", None, None, f"the report's verdict is: {judged.badge}")


def _utility(results: Results, policy: Policy) -> Check:
    target, unlearned = results.models["target"], results.models["unlearned"]
    before = None if target is None else target.model_utility
    after = None if unlearned is None else unlearned.model_utility
    name = "model_utility"
    if before is None or after is None:
        return Check(name, False, after, None, "utility was not measured for both the target and the unlearned model")
    limit = policy.min_utility * before
    if after >= limit:
        return Check(name, True, after, limit, f"utility {after:.3f} is at least {policy.min_utility:.0%} of the target's {before:.3f}")
    return Check(name, False, after, limit, f"utility {after:.3f} is below {policy.min_utility:.0%} of the target's {before:.3f}")


def _forgotten(results: Results, policy: Policy, metric: Metric) -> Check:
    title = METRICS[metric].title
    unlearned, retrained = results.models["unlearned"], results.models["retrained"]
    value = None if unlearned is None else unlearned.value(f"forget.{metric}")
    name = f"forget.{metric}"
    if value is None:
        return Check(name, False, None, None, f"{title} on the forget rows was not measured")
    standard = None if retrained is None else retrained.value(f"forget.{metric}")
    if standard is not None:
        limit, origin = standard + policy.margin, f"the retrained model's {standard:.3f} + {policy.margin:g}"
    elif retrained is not None:
        return Check(name, False, value, None, f"the retrained model has no {title} on the forget rows: {retrained.reason(name)}")
    elif metric in policy.ceilings:
        limit, origin = policy.ceilings[metric], "the policy's ceiling for runs without a retrained model"
    else:
        return Check(
            name, False, value, None, f"{title} on the forget rows has nothing to be compared with: no retrained model, no ceiling"
        )
    if value <= limit:
        return Check(name, True, value, limit, f"{title} on the forget rows, {value:.3f}, is at most {limit:.3f} ({origin})")
    return Check(name, False, value, limit, f"{title} on the forget rows, {value:.3f}, is above {limit:.3f} ({origin})")
