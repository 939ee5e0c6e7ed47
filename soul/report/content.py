"""What a report says, before it is HTML or Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from soul.report.comparison import Comparison, comparison, distinct_models, run_labels
from soul.report.figures import Figure, outcome_figures, telemetry_figures
from soul.report.grid_type import Grid as Grid
from soul.report.numbers import DASH, compact, duration, fixed, memory
from soul.report.results import ModelResults, Results
from soul.report.runs import Run
from soul.report.tests_table import tests_grid
from soul.report.verdict import Verdict, headline, twin_sentence, twins, verdict
from soul.report.words import ARROWS, ATTACKS, COSTS, METRICS, OVERALL, SPLITS

SHOW_COST: Final[dict[str, Callable[[float], str]]] = {
    "train_s": duration,
    "eval_s": duration,
    "tokens_per_s": compact,
    "peak_memory_bytes": memory,
    "optimizer_state_bytes_per_rank": memory,
}


@dataclass(frozen=True, slots=True)
class Strip:
    """Where target, unlearned and retrained model stand on one share from 0 to 1; those that are known."""

    title: str
    places: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Judged:
    label: str
    verdict: Verdict
    strips: tuple[Strip, ...]


@dataclass(frozen=True, slots=True)
class Report:
    benchmark: str
    sizes: str
    judged: tuple[Judged, ...]
    headline: str | None
    twin: str | None
    comparison: Comparison
    figures: tuple[Figure, ...]
    attacks: Grid | None
    tests: Grid | None
    telemetry: tuple[Figure, ...]
    details: Grid
    cost: Grid
    settings: Grid
    versions: Grid | None
    commands: tuple[str, ...]
    missing: tuple[tuple[str, str], ...]

    @property
    def title(self) -> str:
        labels = [judged.label for judged in self.judged]
        return f"Unlearning {self.benchmark}: {f'{len(labels)} runs' if self.headline else ' and '.join(labels)}"


def compose(runs: Sequence[Run]) -> Report:
    results = [run.results for run in runs]
    labels = run_labels(results)
    first = results[0]
    judged = tuple(Judged(label, verdict(run), _strips(run)) for label, run in zip(labels, results, strict=True))
    return Report(
        benchmark=first.benchmark,
        sizes=", ".join(f"{SPLITS.get(name, name).lower()} {size:,}" for name, size in first.splits.items()),
        judged=judged,
        headline=headline([item.verdict for item in judged]),
        twin=twin_sentence(labels, results),
        comparison=comparison(results),
        figures=tuple(outcome_figures(results)),
        attacks=_attacks(results),
        tests=tests_grid(labels, results),
        telemetry=tuple(telemetry_figures(results, [run.steps for run in runs])),
        details=_details(results),
        cost=_cost(labels, results),
        settings=_settings(labels, results),
        versions=_versions(labels, runs),
        commands=tuple(dict.fromkeys(run.command for run in runs if run.command)),
        missing=tuple(dict.fromkeys(_missing(labels, results))),
    )


def _strips(run: Results) -> tuple[Strip, ...]:
    strips = []
    for split, title in (("forget", "Forget rows reproduced"), ("retain", "Retain rows kept")):
        values = [(kind, model.value(f"{split}.rougeL_recall")) for kind, model in run.models.items() if model]
        places = tuple((kind, min(max(value, 0.0), 1.0)) for kind, value in values if value is not None)
        if places:
            strips.append(Strip(title, places))
    return tuple(strips)


def every_model(runs: Sequence[Results]) -> list[tuple[str, ModelResults]]:
    """Targets, then the unlearned models, then the retrained ones."""
    unlearned = [(label, model) for label, run in zip(run_labels(runs), runs, strict=True) if (model := run.models["unlearned"])]
    return [*distinct_models(runs, "target"), *unlearned, *distinct_models(runs, "retrained")]


def _number(value: float | None) -> str:
    return DASH if value is None else fixed(value)


def _attacks(runs: Sequence[Results]) -> Grid | None:
    models = every_model(runs)
    names = [name for name in ATTACKS if any(model.value(f"mia_auc.{name}") is not None for _, model in models)]
    if not names:
        return None
    rows = tuple((label, *(_number(model.value(f"mia_auc.{name}")) for name in names)) for label, model in models)
    return Grid("Area under the curve of membership attacks", ("model", *(ATTACKS[name].title for name in names)), rows)


def _details(runs: Sequence[Results]) -> Grid:
    models = every_model(runs)
    rows = []
    for split, title in SPLITS.items():
        for metric, word in METRICS.items():
            values = [model.value(f"{split}.{metric}") for _, model in models]
            if any(value is not None for value in values):
                arrow = ARROWS[word.forget if split == "forget" else word.retain]
                rows.append((f"{title}: {word.title} {arrow}", *map(_number, values)))
    for name, word in OVERALL.items():
        values = [model.value(name) for _, model in models]
        if any(value is not None for value in values):
            shown = [DASH if value is None else compact(value) if name == "forget_quality" else fixed(value) for value in values]
            title = f"{word.title} (p-value)" if name == "forget_quality" else word.title
            rows.append((f"{title} {ARROWS[word.retain]}", *shown))
    return Grid("Every metric that was measured", ("metric", *(label for label, _ in models)), tuple(rows))


def _cost(labels: Sequence[str], runs: Sequence[Results]) -> Grid:
    pair = twins(runs)
    rows = []
    for name, title in COSTS.items():
        values = [getattr(run.cost, name) for run in runs]
        cells = [DASH if value is None else SHOW_COST[name](value) for value in values]
        if pair:
            second, first = (values[position] for position in pair)
            cells.append(f"{second / first:.2f} ×" if second is not None and first else DASH)
        rows.append((title, *cells))
    head = ("", *labels, "second / first order") if pair else ("", *labels)
    return Grid("What it cost", head, tuple(rows))


def _settings(labels: Sequence[str], runs: Sequence[Results]) -> Grid:
    names = list(dict.fromkeys(name for run in runs for name, value in run.settings.items() if value is not None))
    rows = [("seed", *(str(run.seed) for run in runs)), *((name, *(_setting(run, name) for run in runs)) for name in names)]
    return Grid("Settings", ("setting", *labels), tuple(rows), frozenset(row[0] for row in rows if len(set(row[1:])) > 1))


def _setting(run: Results, name: str) -> str:
    value = run.settings.get(name)
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _versions(labels: Sequence[str], runs: Sequence[Run]) -> Grid | None:
    names = list(dict.fromkeys(name for run in runs for name in run.versions))
    if not names:
        return None
    rows = [(name, *(run.versions.get(name, DASH) for run in runs)) for name in names]
    return Grid("Versions", ("", *labels), tuple(rows), frozenset(row[0] for row in rows if len(set(row[1:])) > 1))


def _missing(labels: Sequence[str], runs: Sequence[Results]) -> list[tuple[str, str]]:
    """(what, why) of every null, in words; what several runs share is told once."""
    found = []
    for label, run in zip(labels, runs, strict=True):
        for kind, model in run.models.items():
            owner = label if kind == "unlearned" else kind
            if model is not None:
                found += [(f"{owner}: {_spoken(path)}", reason) for path, reason in model.reasons.items()]
        found += [(f"{label}: {_spoken(path)}", reason) for path, reason in run.reasons.items()]
    return found


def _spoken(path: str) -> str:
    """ "forget.truth_ratio" as "forget truth ratio"."""
    if path.startswith("models."):
        return f"{path.removeprefix('models.')} model"
    words = {**METRICS, **OVERALL, **ATTACKS}
    titles = {"mia_auc": "membership attack", **{name: word.title for name, word in words.items()}, **COSTS}
    parts = [titles.get(part, SPLITS[part].lower() if part in SPLITS else part) for part in path.split(".")]
    return " ".join(part for part in parts if part != "cost")
