"""Unlearning methods: a method is its config, and `terms()` is the objective it minimises.

A new method touches two places: its class with its row in METHODS here, and a row of the test table in tests/objectives.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from soul.objectives.terms import Term, negated_nll, nll, npo


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


RetainWeight = Annotated[float, Field(ge=0, description="weight of the retain loss (never called gamma here)")]


class GA(_Config):
    """Gradient ascent on the forget answers. No retain term: utility collapses; kept as the baseline everyone compares with."""

    name: Literal["ga"] = "ga"

    def terms(self) -> tuple[Term, ...]:
        return (Term("forget", "forget", "tokens", 1.0, negated_nll),)


class GradDiff(_Config):
    """Gradient difference (TOFU, arXiv 2401.06121): ascent on forget answers, descent on retain answers."""

    name: Literal["grad_diff"] = "grad_diff"
    retain_weight: RetainWeight = 1.0

    def terms(self) -> tuple[Term, ...]:
        return (
            Term("forget", "forget", "tokens", 1.0, negated_nll),
            Term("retain", "retain", "tokens", self.retain_weight, nll),
        )


class PO(_Config):
    """Preference optimisation as SOUL means it: likelihood of a refusal to each forget question, and of the retain answers."""

    name: Literal["po"] = "po"
    retain_weight: RetainWeight = 1.0

    def terms(self) -> tuple[Term, ...]:
        return (
            Term("refusal", "refusal", "tokens", 1.0, nll),
            Term("retain", "retain", "tokens", self.retain_weight, nll),
        )


class NPO(_Config):
    """Negative preference optimisation against the frozen target, plus the retain likelihood."""

    name: Literal["npo"] = "npo"
    beta: float = Field(0.1, gt=0, description="inverse temperature of the NPO term")
    reduction: Literal["sum", "mean"] = Field(
        "sum", description="log-ratio per sequence: token sum (the NPO paper) or mean (SOUL's release)"
    )
    retain_weight: RetainWeight = 1.0

    def terms(self) -> tuple[Term, ...]:
        return (
            Term("forget", "forget", "sequences", 1.0, npo(self.beta, self.reduction), needs_reference=True),
            Term("retain", "retain", "tokens", self.retain_weight, nll),
        )


class Influence(_Config):
    """One-shot influence unlearning: theta + step_length (H + damping)^-1 gradient of the forget loss, H diagonal, after one pass.

    The step itself is optimizer one_shot. Retain rows are streamed for the curvature; their loss has no weight.
    """

    name: Literal["influence"] = "influence"

    def terms(self) -> tuple[Term, ...]:
        return (Term("forget", "forget", "tokens", 1.0, negated_nll), Term("retain", "retain", "tokens", 0.0, nll))


class Finetune(_Config):
    """Plain likelihood of the retain split: how target and retrained models are made. Not an unlearning method."""

    name: Literal["finetune"] = "finetune"

    def terms(self) -> tuple[Term, ...]:
        return (Term("retain", "retain", "tokens", 1.0, nll),)


METHODS: dict[str, type[GA | GradDiff | PO | NPO | Influence]] = {
    "ga": GA,
    "grad_diff": GradDiff,
    "po": PO,
    "npo": NPO,
    "influence": Influence,
}
Method = GA | GradDiff | PO | NPO | Influence | Finetune
MethodConfig = Annotated[GA | GradDiff | PO | NPO | Influence, Field(discriminator="name")]
TITLES = {"ga": "GA", "grad_diff": "GradDiff", "po": "PO", "npo": "NPO", "influence": "Influence", "finetune": "fine-tuning"}


def streamed_splits(method: Method) -> tuple[str, ...]:
    """The splits a step draws rows from, the leading one (whose pass is an epoch) first."""
    return tuple(term.split for term in method.terms())


def needs_reference(method: Method) -> bool:
    """Whether a term compares with the frozen target's log-probabilities."""
    return any(term.needs_reference for term in method.terms())
