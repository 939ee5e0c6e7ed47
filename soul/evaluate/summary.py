"""What a log says as one JSON object: the metrics, the removal tests, and what they were computed from."""

from __future__ import annotations

from typing import Any

from soul.evaluate.eval_log import EvalLog
from soul.evaluate.removal import removal_tests
from soul.evaluate.same_rows import differences, not_compared
from soul.evaluate.score import score
from soul.evaluate.truth_ratio import TruthRatioMean


def score_log(
    log: EvalLog, retrained: EvalLog | None = None, *, mean: TruthRatioMean = "geometric", allow_mismatch: bool = False
) -> dict[str, Any]:
    """`soul score` as one JSON object: the metrics, what they were computed from, and a reason beside every null."""
    tests = removal_tests(log, retrained, mean, allow_mismatch=allow_mismatch)
    scores = score(log, retrained=retrained, mean=mean, allow_mismatch=allow_mismatch)
    return {
        "log": log.source,
        "retrained": retrained and retrained.source,
        "compared_despite": [] if retrained is None or not allow_mismatch else list(differences(log, retrained)),
        "not_compared": [] if retrained is None else list(not_compared(log, retrained)),
        "made_with": dict(log.made_with),
        "truth_ratio": mean,
        "rows": {split: len(split_log.keys) for split, split_log in log.splits.items()},
        **{key: value for key, value in scores.model_entry().items() if key != "reasons"},
        "privleak": scores.privleak,
        "legacy": scores.legacy,
        "tests": {name: {key: value for key, value in test.items() if value is not None} for name, test in tests.items()},
        "reasons": scores.reasons,
    }
