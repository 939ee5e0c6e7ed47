"""Invented removal tests in the shape of those of results.json."""

from __future__ import annotations

from typing import Any

Document = dict[str, Any]


def removal_tests(p_value: float, auc: float, reference: float = 0.52, smallest_p: float = 2e-4, rows: int = 400) -> Document:
    """As many attacks reject as are 0.1 from their reference."""
    sizes = {"num_rows": rows, "num_others": rows, "smallest_p": smallest_p}
    tests: Document = {"forget_quality": {**sizes, "value": 0.4, "low": 0.2, "high": 0.6, "p_value": p_value, "detectable": 0.09}}
    for name, area in (("loss", auc), ("zlib", auc - 0.01), ("min_k", auc), ("min_k_plus_plus", auc - 0.03)):
        gap = area - reference
        tests[f"mia_auc.{name}"] = {
            **sizes,
            "value": area,
            "low": max(area - 0.04, 0.0),
            "high": min(area + 0.04, 1.0),
            "reference": reference,
            "difference": gap,
            "difference_low": gap - 0.05,
            "difference_high": gap + 0.05,
            "p_value": 2e-4 if abs(gap) > 0.1 else 0.6,
            "detectable": 0.07,
        }
    return tests
