"""The training curves of a run: `metrics.jsonl`, one line per step, whose keys may all be absent."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from soul.records import InputError

MOST_POINTS: Final = 240  # a curve of more points than the figure has pixels only hides itself


@dataclass(frozen=True, slots=True)
class Curve:
    """Measured points only; `num_not_finite` counts the values that were NaN or infinite."""

    steps: tuple[float, ...]
    values: tuple[float, ...]
    num_not_finite: int = 0

    def thinned(self) -> Curve:
        """At most MOST_POINTS points: means over equal runs of consecutive points."""
        size = -(-len(self.steps) // MOST_POINTS)
        if size <= 1:
            return self
        starts = range(0, len(self.steps), size)
        return Curve(
            tuple(_mean(self.steps[start : start + size]) for start in starts),
            tuple(_mean(self.values[start : start + size]) for start in starts),
            self.num_not_finite,
        )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


@dataclass(frozen=True, slots=True)
class Steps:
    """Lines in step order, flattened: a loss term is `terms.forget`."""

    lines: tuple[Mapping[str, float], ...] = ()

    @property
    def terms(self) -> list[str]:
        return sorted({key for line in self.lines for key in line if key.startswith("terms.")})

    def curve(self, key: str) -> Curve:
        points = [(line["step"], line[key]) for line in self.lines if key in line]
        finite = [(step, value) for step, value in points if math.isfinite(value)]
        return Curve(tuple(step for step, _ in finite), tuple(value for _, value in finite), len(points) - len(finite))

    def last(self, key: str) -> float | None:
        values = self.curve(key).values
        return values[-1] if values else None


def load_steps(path: Path) -> Steps:
    """No file gives no steps. A resumed run repeats steps: the last line counts. A last line cut off by a crash is dropped."""
    if not path.is_file():
        return Steps()
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    lines: dict[float, Mapping[str, float]] = {}
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            if number == len(texts):
                break
            raise InputError(f"{path} line {number} is not JSON. Remove the line, or build the report without metrics.jsonl.") from None
        if not isinstance(line, dict):
            raise InputError(f"{path} line {number}: expected an object, got {type(line).__name__}. Remove the line.")
        flat = _numbers(line) | {f"terms.{name}": value for name, value in _numbers(line.get("terms")).items()}
        flat.setdefault("step", float(number - 1))
        lines[flat["step"]] = flat
    return Steps(tuple(lines[step] for step in sorted(lines)))


def _numbers(line: object) -> dict[str, float]:
    if not isinstance(line, dict):
        return {}
    return {str(key): float(value) for key, value in line.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
