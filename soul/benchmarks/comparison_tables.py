"""A comparison of optimizers as JSON, as Markdown and for the terminal: means, every seed, differences and what survives."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich import box
from rich.console import Group as Renderables
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from soul.benchmarks.comparison import ComparisonResult, Group
from soul.benchmarks.paired import CONFIDENCE, Difference, Summary, paired_difference, summary
from soul.benchmarks.selection import RULE
from soul.objectives.methods import TITLES

FORGET_QUALITY: Final = "forget_quality_log10_p"
METRICS: Final[Mapping[str, str]] = {
    "forget.rougeL_recall": "forget ROUGE-L",
    "forget.probability": "forget prob.",
    "forget.exact_memorization": "forget exact mem.",
    "forget.truth_ratio": "forget truth ratio",
    "retain.rougeL_recall": "retain ROUGE-L",
    "retain.probability": "retain prob.",
    "real_authors.rougeL_recall": "authors ROUGE-L",
    "world_facts.rougeL_recall": "facts ROUGE-L",
    "model_utility": "utility",
    FORGET_QUALITY: "forget quality log10 p",
}
PRIMARY: Final = ("forget.rougeL_recall", "retain.rougeL_recall")
ON_TERMINAL: Final = (*PRIMARY, "forget.probability", "retain.probability", "model_utility", FORGET_QUALITY)
SMALLEST_P: Final = 1e-300
DASH: Final = "-"


def value(scores: Mapping[str, Any] | None, path: str) -> float | None:
    """A metric of a model's entry; None where it was not measured or the run diverged."""
    if scores is None:
        return None
    if path == FORGET_QUALITY:
        p_value = scores["forget_quality"]
        return None if p_value is None else math.log10(max(p_value, SMALLEST_P))
    split, _, metric = path.partition(".")
    found = scores[split] if not metric else (scores[split] or {}).get(metric)
    return None if found is None else float(found)


def values(group: Group, optimizer: str, path: str) -> list[float | None]:
    return [value(cell.get("scores"), path) for cell in group.cells[optimizer]]


def summaries(group: Group) -> dict[str, dict[str, Summary]]:
    """optimizer -> metric -> summary over the seeds."""
    return {optimizer: {path: summary(values(group, optimizer, path)) for path in METRICS} for optimizer in group.cells}


def differences(group: Group, baseline: str) -> dict[str, dict[str, Difference]]:
    """other optimizer -> metric -> baseline minus other, paired by seed."""
    return {
        other: {path: paired_difference(values(group, baseline, path), values(group, other, path)) for path in METRICS}
        for other in group.cells
        if other != baseline
    }


def group_title(group: Group, baseline: str, selected: float) -> str:
    method = TITLES[group.method]
    if group.kind == "selected":
        return f"{method}, after the search: each optimizer at its own selected rate"
    rate = group.learning_rates[baseline]
    return f"{method}, equal learning rate {rate:g}" + (f" (the one {baseline} selects)" if rate == selected else "")


@dataclass(frozen=True, slots=True)
class Grid:
    """A table before it is printed somewhere."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def results_grid(result: ComparisonResult, group: Group, title: str, paths: Sequence[str] = tuple(METRICS)) -> Grid:
    """Mean ± sd over the seeds, between the target and the retrained model."""
    rows = [("target", DASH, *(_number(value(result.models["target"], path)) for path in paths), DASH, DASH)]
    for optimizer, found in summaries(group).items():
        cells = group.cells[optimizer]
        cost = summary([cell["train_s"] for cell in cells]).mean
        reach = summary([cell["telemetry"]["update_norm"] for cell in cells]).mean
        rows.append(
            (
                optimizer,
                f"{group.learning_rates[optimizer]:g}",
                *(_mean_sd(found[path]) for path in paths),
                DASH if reach is None else f"{reach:.3g}",
                DASH if cost is None else f"{cost:.1f}",
            )
        )
    rows.append(("retrained", DASH, *(_number(value(result.models["retrained"], path)) for path in paths), DASH, DASH))
    return Grid(title, ("model", "lr", *(METRICS[path] for path in paths), "update norm", "train s"), tuple(rows))


def seeds_grid(group: Group, seeds: Sequence[int]) -> Grid:
    rows = tuple(
        (optimizer, str(seed), *(_number(found[path].values[place]) for path in METRICS))
        for optimizer, found in summaries(group).items()
        for place, seed in enumerate(seeds)
    )
    return Grid("Every seed", ("optimizer", "seed", *METRICS.values()), rows)


def differences_grid(group: Group, baseline: str, paths: Sequence[str] = tuple(METRICS)) -> Grid:
    found = differences(group, baseline)
    rows = tuple((METRICS[path], *(difference_text(found[other][path]) for other in found)) for path in paths)
    return Grid(f"{baseline} minus the other, paired by seed", ("metric", *found), rows)


def search_grid(result: ComparisonResult, method: str) -> Grid:
    settings = result.settings
    head = ("lr", *settings.optimizers)
    rows = []
    for place, rate in enumerate(settings.learning_rates):
        cells = []
        for optimizer in settings.optimizers:
            selection = result.selections[method, optimizer]
            trial = selection.trials[place]
            text = f"{_number(trial.forget_probability)} / {_number(trial.retain_probability)}"
            text = "diverged" if trial.forget_probability is None else text
            cells.append(f"{text} *" if selection.learning_rate == rate else text)
        rows.append((f"{rate:g}", *cells))
    return Grid(f"{TITLES[method]}, search: forget / retain probability on the selection half, * selected", head, tuple(rows))


def difference_text(difference: Difference) -> str:
    if difference.mean is None:
        return DASH
    if difference.low is None or difference.high is None:
        return f"{difference.mean:+.3f} (no interval: one pair)"
    interval = f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
    return f"{interval} survives" if difference.verdict == "survives" else f"{interval} inside the noise"


def _number(number: float | None) -> str:
    return DASH if number is None else f"{number:.2f}"


def _mean_sd(found: Summary) -> str:
    if found.mean is None:
        return DASH
    missing = sum(one is None for one in found.values)
    note = f" (n = {len(found.values) - missing})" if missing else ""
    return f"{found.mean:.2f}" + ("" if found.sd is None else f" ± {found.sd:.2f}") + note


def statements(result: ComparisonResult) -> Iterator[str]:
    """What survives, in words: per comparison the metrics whose interval leaves zero out, the two main ones first."""
    baseline = result.settings.baseline
    intervals: set[tuple[str, float, str, float, str]] = set()  # the groups share runs where rates coincide
    for group in result.groups:
        title = group_title(group, baseline, result.selections[group.method, baseline].learning_rate)
        for other, found in differences(group, baseline).items():
            pair = (group.method, group.learning_rates[baseline], other, group.learning_rates[other])
            intervals |= {(*pair, path) for path, difference in found.items() if difference.low is not None}
            surviving = [path for path, difference in found.items() if difference.verdict == "survives"]
            ordered = sorted(surviving, key=lambda path: path not in PRIMARY)
            listed = "; ".join(f"{METRICS[path]} {baseline} {_signed(found[path])}" for path in ordered)
            rates = "" if group.kind == "equal" else f" ({group.learning_rates[baseline]:g} against {group.learning_rates[other]:g})"
            yield f"{title}: {baseline} against {other}{rates}: {listed or 'nothing survives, every difference is inside the noise'}."
    if intervals:
        chance = (1 - CONFIDENCE) * len(intervals)
        yield (
            f"{len(intervals)} intervals at {CONFIDENCE:.0%} were computed: about {chance:.0f} of them would leave zero out by chance if "
            "nothing differed. Seeds vary data order and sampled labels only: there is one target model and one forget set, so nothing is "
            "said about others."
        )


def _signed(difference: Difference) -> str:
    assert difference.mean is not None
    side = "higher" if difference.mean > 0 else "lower"
    return f"{side} by {abs(difference.mean):.2g}"


def warnings(result: ComparisonResult) -> Iterator[str]:
    for (method, optimizer), selection in result.selections.items():
        who = f"{TITLES[method]} with {optimizer}"
        if not selection.qualifies:
            yield f"{who}: no learning rate of the grid keeps enough of retain; the best for retain was taken."
        if selection.at_edge:
            yield f"{who}: the selected rate {selection.learning_rate:g} is at the grid's edge; a better one may lie outside."
    cap, longest = result.max_new_tokens, result.longest_answer
    if longest > cap:
        yield f"Generation stops at {cap} tokens, but the longest reference has {longest}: ROUGE-L cannot reach 1 on it."


def grids(result: ComparisonResult, paths: Sequence[str] = tuple(METRICS)) -> Iterator[Grid]:
    baseline = result.settings.baseline
    for group in result.groups:
        title = group_title(group, baseline, result.selections[group.method, baseline].learning_rate)
        yield results_grid(result, group, title, paths)
        yield differences_grid(group, baseline, paths)
        yield seeds_grid(group, result.settings.report_seeds)
    for method in result.settings.methods:
        yield search_grid(result, method)


def markdown(result: ComparisonResult) -> str:
    """comparison.md."""
    parts = ["# First- against second-order optimizers", setting_text(result), "## What survives"]
    parts += ["\n".join(f"- {line}" for line in statements(result))]
    parts += ["\n".join(f"- {line}" for line in warnings(result))]
    for grid in grids(result):
        parts += [f"## {grid.title}" if grid.head[0] in ("model", "lr") else f"### {grid.title}"]
        lines = [grid.head, ("---", *("---:" for _ in grid.head[1:])), *grid.rows]
        parts += ["\n".join(f"| {' | '.join(cells)} |" for cells in lines)]
    return "\n\n".join(part for part in parts if part) + "\n"


def setting_text(result: ComparisonResult) -> str:
    settings = result.settings
    sizes = ", ".join(f"{name} {size}" for name, size in result.sizes.items())
    return (
        f"Rows of {result.benchmark}: {sizes}. {result.steps} steps of {settings.batch_size} forget and as many retain rows, retain "
        f"weight {settings.retain_weight:g}; warm-up 10 %, linear decay, gradient norm clipped to 1, weight decay 0.1. Every optimizer "
        f"gets the same {len(settings.learning_rates)} learning rates on one seed and the selection half of the evaluated rows; selected "
        f"is {RULE.format(floor=settings.retain_floor)}. The tables show {settings.seeds} other seeds on the report half; answers are "
        f"generated with at most {result.max_new_tokens} tokens (the longest reference has {result.longest_answer}). Unlearning sees all "
        "forget rows, of both halves."
    )


def terminal(result: ComparisonResult) -> RenderableType:
    """For `rich.print`: the tables without the single seeds, then what survives."""
    shown: list[RenderableType] = []
    for grid in grids(result, ON_TERMINAL):
        if grid.head[1] == "seed":
            continue
        table = Table(*grid.head, title=Text(grid.title), box=box.SIMPLE_HEAD, pad_edge=False)
        for row in grid.rows:
            table.add_row(*map(Text, row))
        shown.append(table)
    return Renderables(*shown, *(Text(line) for line in (*statements(result), *warnings(result))))


def to_json(result: ComparisonResult) -> dict[str, Any]:
    """comparison.json."""
    baseline = result.settings.baseline
    return {
        "schema": 1,
        "benchmark": result.benchmark,
        "settings": result.settings.model_dump(mode="json"),
        "sizes": dict(result.sizes),
        "max_new_tokens": result.max_new_tokens,
        "longest_answer": result.longest_answer,
        "steps": result.steps,
        "rule": RULE.format(floor=result.settings.retain_floor),
        "models": {name: dict(entry) for name, entry in result.models.items()},
        "search": {
            method: {
                optimizer: {
                    "learning_rate": selection.learning_rate,
                    "qualifies": selection.qualifies,
                    "at_edge": selection.at_edge,
                    "trials": [
                        {
                            "learning_rate": t.learning_rate,
                            "forget_probability": t.forget_probability,
                            "retain_probability": t.retain_probability,
                        }
                        for t in selection.trials
                    ],
                }
                for optimizer in result.settings.optimizers
                for selection in [result.selections[method, optimizer]]
            }
            for method in result.settings.methods
        },
        "report": [_group_json(group, baseline) for group in result.groups],
        "statements": list(statements(result)),
        "warnings": list(warnings(result)),
    }


def _group_json(group: Group, baseline: str) -> dict[str, Any]:
    return {
        "method": group.method,
        "kind": group.kind,
        "learning_rates": dict(group.learning_rates),
        "optimizers": {
            optimizer: {path: {"mean": one.mean, "sd": one.sd, "values": list(one.values)} for path, one in found.items()}
            for optimizer, found in summaries(group).items()
        },
        "differences": {
            other: {
                path: {"mean": one.mean, "low": one.low, "high": one.high, "num_pairs": one.num_pairs, "verdict": one.verdict}
                for path, one in found.items()
            }
            for other, found in differences(group, baseline).items()
        },
    }
