"""What a search looks for: as much forgotten as possible while enough is kept."""

from __future__ import annotations

from collections.abc import Mapping

CHEAP = ("probability", "exact_memorization")


def objective(left: float, kept: float, *, floor: float) -> float:
    """Higher is better. `left`: share of the forget rows that is left, 0 to 1. `kept`: share of the target's retain score that is kept.

    Above the floor only forgetting counts; whatever is below it ranks under everything above it, the nearer to the floor the better.
    """
    return -left if kept >= floor else -1.0 - (floor - kept)


def cheap_objective(now: Mapping[str, Mapping[str, float]], before: Mapping[str, Mapping[str, float]], *, floor: float) -> float:
    """From the likelihood metrics of one pass over forget and retain rows, now and before unlearning: no generation."""
    left = sum(now["forget"][name] for name in CHEAP) / len(CHEAP)
    kept = [now["retain"][name] / max(before["retain"][name], 1e-9) for name in CHEAP]
    return objective(min(left, 1.0), sum(kept) / len(kept), floor=floor)
