"""Who may be called passed: nobody destroyed, nobody whose tests could not fail, nobody with a number missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from soul.evaluate.eval_log import ATTACKS, EvalLog, SplitLog
from soul.evaluate.removal import removal_tests
from soul.evaluate.tofu_log import write_tofu_log
from soul.report.results import RemovalTest, Results
from soul.report.runs import load_run
from soul.report.verdict import verdict
from soul.serving.policy import Policy, judge

Make = Callable[..., dict[str, Any]]


def log(num_rows: int, seed: int = 0, shift: float = 0.0, holdout: bool = True) -> EvalLog:
    rng = np.random.default_rng(seed)

    def rows(offset: float) -> SplitLog:
        losses = tuple(map(float, 1 + offset + rng.random(num_rows)))
        attacks = {name: tuple(map(float, np.array(losses) + 0.1 * rng.random(num_rows))) for name in ATTACKS}
        keys = tuple(map(str, range(num_rows)))
        return SplitLog(keys, losses, losses, tuple((2.0, 2.5) for _ in losses), attacks=attacks)

    return EvalLog("a log", {"forget": rows(-shift), **({"holdout": rows(0.0)} if holdout else {})})


def passing(document: Make) -> dict[str, Any]:
    return document(p_value=0.4, auc=0.52)


def judged(document: dict[str, Any]) -> str:
    return verdict(Results.model_validate(document)).badge


def test_a_destroyed_model_has_not_passed(document: Make) -> None:
    changed = passing(document)
    assert judged(changed) == "passed every test here"
    unlearned = changed["models"]["unlearned"]
    for split in ("real_authors", "world_facts"):
        unlearned[split] = dict.fromkeys(unlearned[split], 0.0)
    unlearned["model_utility"] = 0.0
    found = verdict(Results.model_validate(changed))
    assert found.badge == "forgotten, but the rest is damaged" and found.damaged
    for name in ("real authors ROUGE-L", "world facts ROUGE-L", "real authors probability", "utility"):
        assert name in found.damage
    assert judge(Results.model_validate(changed), Policy(require_passed=True))[-1].passed is False


@pytest.mark.parametrize("split", ["retain", "real_authors", "world_facts", "model_utility"])
def test_any_one_loss_is_damage(document: Make, split: str) -> None:
    changed = passing(document)
    unlearned = changed["models"]["unlearned"]
    unlearned[split] = 0.1 if split == "model_utility" else {**unlearned[split], "probability": 0.0}
    assert "damaged" in judged(changed)


@pytest.mark.parametrize("model", ["target", "unlearned"])
@pytest.mark.parametrize("path", ["retain.rougeL_recall", "world_facts.rougeL_recall", "real_authors", "retain", "model_utility"])
def test_a_missing_number_is_no_pass(document: Make, model: str, path: str) -> None:
    changed = passing(document)
    entry = changed["models"][model]
    split, _, metric = path.partition(".")
    if metric:
        entry[split][metric] = None
    else:
        entry[split] = None
    entry["reasons"][path] = "it was not finite"
    found = verdict(Results.model_validate(changed))
    assert found.outcome == "unknown" and "Not measured" in found.damage


@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_three_rows_are_not_testable(document: Make, num_rows: int) -> None:
    changed = passing(document)
    changed["models"]["unlearned"]["tests"] = removal_tests(log(num_rows), log(num_rows, 1, 9.0))
    found = verdict(Results.model_validate(changed))
    assert found.badge == f"not testable ({num_rows} row{'' if num_rows == 1 else 's'})" and "can reject nothing" in found.caution
    check = judge(Results.model_validate(changed), Policy(require_passed=True))[-1]
    assert not check.passed and "not testable" in check.text


def test_tests_that_were_not_run_are_no_pass(document: Make) -> None:
    changed = passing(document)
    for tests in (
        removal_tests(log(40), None),
        removal_tests(log(40, holdout=False), log(40, 1)),
        removal_tests(log(40), log(40, 1, holdout=False)),
        removal_tests(log(40), log(30, 1)),
    ):
        changed["models"]["unlearned"]["tests"] = tests
        found = verdict(Results.model_validate(changed))
        assert found.outcome == "unknown" and "Not run" in found.caution
    both = removal_tests(log(40), log(40, 1))
    changed["models"]["unlearned"]["tests"] = both
    assert judged(changed) == "passed every test here"
    assert all(RemovalTest.model_validate(entry).testable and entry["num_rows"] == 40 for entry in both.values())
    changed["models"]["unlearned"]["tests"] = {"forget_quality": both["forget_quality"]}
    assert verdict(Results.model_validate(changed)).outcome == "unknown"


def test_scores_that_are_not_finite_are_not_run() -> None:
    broken = log(20)
    forget = broken.splits["forget"]
    scores = {name: (float("nan"), *rows[1:]) for name, rows in forget.attacks.items()}
    broken = replace(broken, splits={**broken.splits, "forget": replace(forget, attacks=scores)})
    found = removal_tests(broken, log(20, 1))
    assert all("not finite" in found[f"mia_auc.{name}"]["reason"] for name in ATTACKS) and "reason" not in found["forget_quality"]


def test_rows_that_the_target_hardly_knew(document: Make) -> None:
    changed = passing(document)
    changed["models"]["target"]["forget"]["rougeL_recall"] = 0.08
    found = verdict(Results.model_validate(changed))
    assert found.outcome == "unknown" and "nothing to forget" in found.caution and "evidence of removal" not in found.caution


def test_results_of_earlier_versions_take_their_tests_from_the_logs(run_dir: Callable[..., Path]) -> None:
    folder = run_dir("old", p_value=0.4, auc=0.52)
    old = json.loads((folder / "results.json").read_text())
    for model in filter(None, old["models"].values()):
        del model["tests"]
    (folder / "results.json").write_text(json.dumps(old))
    without = verdict(load_run(folder).results)
    assert without.outcome == "unknown" and "soul report RUN" in without.caution
    (folder / "logs" / "retrained").mkdir(parents=True)
    write_tofu_log(log(40), folder / "logs" / "eval_log_aggregated.json")
    write_tofu_log(log(40, 1), folder / "logs" / "retrained" / "eval_log_aggregated.json")
    assert verdict(load_run(folder).results).outcome == "passed"


def test_a_number_that_neither_model_has_is_no_pass(document: Make) -> None:
    """Every row has a probability: one that is missing on both sides was not looked at."""
    changed = passing(document)
    for name in ("target", "unlearned"):
        changed["models"][name]["retain"]["probability"] = None
        changed["models"][name]["reasons"]["retain.probability"] = "not recorded"
    assert "passed" not in judged(changed)


def test_a_ceiling_stands_in_for_a_model_and_not_for_its_missing_number(document: Make) -> None:
    changed = passing(document)
    changed["models"]["retrained"]["forget"]["rougeL_recall"] = None
    changed["models"]["retrained"]["reasons"]["forget.rougeL_recall"] = "no answers were generated"
    checks = judge(Results.model_validate(changed), Policy(ceilings={"rougeL_recall": 1.0}))
    found = next(check for check in checks if check.name == "forget.rougeL_recall")
    assert not found.passed and "no answers were generated" in found.text


def test_the_smaller_p_of_two_tests_has_to_reach_half_of_the_level(document: Make) -> None:
    changed = passing(document)
    tests = changed["models"]["unlearned"]["tests"]
    tests["forget_quality"]["p_value"] = 0.04
    assert "passed" in judged(changed)
    tests["forget_quality"]["p_value"] = 0.024
    assert "suppressed" in judged(changed)
