"""What unlearning did to everything that was to stay, relative to the target: what was lost, and what nobody looked at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from soul.report.numbers import percent
from soul.report.results import ModelResults
from soul.report.words import METRICS, OVERALL, SPLITS

KEPT: Final = ("retain", "real_authors", "world_facts")
# Extraction strength falls to nothing with one early token, which says little about what a model can still answer.
LOOKED_AT: Final = tuple(name for name, word in METRICS.items() if word.retain == "higher" and name != "extraction_strength")
ALWAYS: Final = ("rougeL_recall", "probability", "exact_memorization")  # what every row has; the others need wrong answers
DAMAGED: Final = 0.9  # below this share of the target's value, something counts as damaged


@dataclass(frozen=True, slots=True)
class Damage:
    """Phrases. `unknown` is what was asked for and has no number on either side of the comparison, `absent` what the run does not have."""

    lost: tuple[str, ...]
    unknown: tuple[str, ...]
    absent: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """Empty where all was looked at and nothing is lost."""
        told = []
        if self.lost:
            told.append(f"Damaged: {', '.join(self.lost)}.")
        if self.unknown:
            told.append(f"Not measured, so damage is unknown: {', '.join(self.unknown)}.")
        if self.absent:
            told.append(f"Not part of this run: {', '.join(self.absent)}.")
        return " ".join(told)


def damage(target: ModelResults | None, unlearned: ModelResults) -> Damage:
    lost: list[str] = []
    unknown: list[str] = []
    absent: list[str] = []
    for title, path, present, needed in _paths(target, unlearned):
        before, after = target.value(path) if target else None, unlearned.value(path)
        if not present:
            (unknown if needed else absent).append(title)
        elif before is None or after is None:
            unknown.append(title)
        elif after < DAMAGED * before:
            lost.append(f"{title} {percent(after)}, before {percent(before)}")
    return Damage(tuple(lost), tuple(unknown), tuple(absent))


def _paths(target: ModelResults | None, unlearned: ModelResults) -> Iterator[tuple[str, str, bool, bool]]:
    """(title, path, whether either model was asked for it, whether no run may lack it)."""
    models = [model for model in (target, unlearned) if model]
    for split in KEPT:
        found = [rows for model in models if (rows := getattr(model, split)) is not None]
        if not found:
            yield SPLITS[split].lower(), split, False, split == "retain"
            continue
        for metric in LOOKED_AT:
            if metric in ALWAYS or any(rows.get(metric) is not None for rows in found):
                yield f"{SPLITS[split].lower()} {METRICS[metric].title}", f"{split}.{metric}", True, True
    asked = any(model.model_utility is not None for model in models) or all(getattr(model, split) for model in models for split in KEPT)
    if asked:
        yield OVERALL["model_utility"].title, "model_utility", True, True
