"""metrics.jsonl: any key may be absent, resumed and torn files are read, curves keep their means when thinned."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from soul.records import InputError
from soul.report.steps import MOST_POINTS, Curve, load_steps


def write(path: Path, lines: list[dict[str, Any]], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return path


def test_no_file_gives_no_steps(tmp_path: Path) -> None:
    steps = load_steps(tmp_path / "metrics.jsonl")
    assert steps.lines == () and steps.terms == [] and steps.curve("loss") == Curve((), ())
    assert steps.last("loss") is None


def test_absent_and_null_keys_are_gaps(tmp_path: Path) -> None:
    path = write(tmp_path / "m", [{"step": 1, "loss": 2.0, "rho": None}, {"step": 2}, {"step": 3, "loss": 1, "terms": {"forget": -1}}])
    steps = load_steps(path)
    assert steps.curve("loss") == Curve((1.0, 3.0), (2.0, 1.0))
    assert steps.curve("rho").steps == () and steps.terms == ["terms.forget"] and steps.last("loss") == 1.0


def test_a_resumed_run_counts_its_last_line_of_a_step(tmp_path: Path) -> None:
    path = write(tmp_path / "m", [{"step": s, "loss": v} for s, v in [(1, 9.0), (2, 9.0), (3, 9.0), (2, 1.0), (3, 0.5), (4, 0.2)]])
    assert load_steps(path).curve("loss") == Curve((1.0, 2.0, 3.0, 4.0), (9.0, 1.0, 0.5, 0.2))


def test_a_torn_last_line_is_dropped_and_any_other_refused(tmp_path: Path) -> None:
    good = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]
    assert len(load_steps(write(tmp_path / "m", good, '{"step": 3, "lo')).lines) == 2
    with pytest.raises(InputError, match="line 3"):
        load_steps(write(tmp_path / "m", good, '{"step": 3, "lo\n{"step": 4}\n'))
    with pytest.raises(InputError, match="line 3"):
        load_steps(write(tmp_path / "m", good, "[1]\n"))


def test_values_that_are_not_finite_are_counted_not_drawn(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 1.0}\n{"step": 3, "loss": Infinity}\n')
    assert load_steps(path).curve("loss") == Curve((2.0,), (1.0,), num_not_finite=2)


@pytest.mark.parametrize("size", [1, MOST_POINTS, MOST_POINTS + 1, 7 * MOST_POINTS + 3])
def test_thinning_keeps_mean_and_range(size: int) -> None:
    values = tuple(math.sin(i / 7) for i in range(size))
    thin = Curve(tuple(map(float, range(size))), values).thinned()
    assert len(thin.values) <= MOST_POINTS
    assert thin.steps[0] >= 0 and thin.steps[-1] <= size - 1
    assert sorted(thin.steps) == list(thin.steps)
    width = -(-size // MOST_POINTS)
    if size % width == 0:
        assert math.fsum(thin.values) / len(thin.values) == pytest.approx(math.fsum(values) / size)
