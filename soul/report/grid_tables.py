"""The tables of a grid: one row per cell, with mean, spread and interval over the seeds, and what each cell cost."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from soul.benchmarks.aggregate import SEARCHED, Comparison, Row, Table
from soul.benchmarks.outcomes import Outcome
from soul.benchmarks.paired import Difference
from soul.report.content import Grid
from soul.report.numbers import DASH, duration, fixed, memory
from soul.report.table import markdown_row, markdown_text
from soul.report.words import ARROWS, METRICS, OVERALL, SPLITS, Direction, run_title


@dataclass(frozen=True, slots=True)
class GridColumn:
    title: str
    path: str
    direction: Direction
    decimals: int = 3

    @property
    def header(self) -> str:
        return f"{self.title} {ARROWS[self.direction]}"


def _column(split: str, metric: str) -> GridColumn:
    word = METRICS[metric]
    return GridColumn(f"{SPLITS[split]} {word.title}", f"{split}.{metric}", word.forget if split == "forget" else word.retain)


COLUMNS: Final = (
    _column("forget", "rougeL_recall"),
    _column("retain", "rougeL_recall"),
    _column("forget", "probability"),
    _column("retain", "probability"),
    _column("forget", "exact_memorization"),
    _column("retain", "exact_memorization"),
    _column("real_authors", "rougeL_recall"),
    _column("world_facts", "rougeL_recall"),
    GridColumn(OVERALL["model_utility"].title, "model_utility", "higher"),
    GridColumn("forget quality, log10 p", "log10_forget_quality", "higher", 1),
)
LISTED: Final = 4
RESERVED: Final = re.compile(r"([&%$#_{}])")


def cell_title(row: Row, table: Table) -> str:
    title = run_title(row.cell.method, row.cell.optimizer)
    return title if len(table.models) == 1 else f"{title}, {row.cell.model}"


def shown_columns(table: Table) -> list[GridColumn]:
    """Those that any row has a value for."""
    return [column for column in COLUMNS if any(row.values(column.path) for row in table.rows)]


def spread(row: Row, column: GridColumn) -> str:
    """ "0.21 ± 0.03 [0.18, 0.24]": mean, standard deviation over the seeds, Student's 95 % interval of the mean."""
    found = row.summary(column.path)
    if found.mean is None:
        return DASH
    text = fixed(found.mean, column.decimals)
    interval = row.interval(column.path)
    if found.sd is None or interval is None:
        return text
    return f"{text} ± {fixed(found.sd, column.decimals)} [{fixed(interval[0], column.decimals)}, {fixed(interval[1], column.decimals)}]"


def settings_of(row: Row) -> str:
    """The choice that was selected, with the number of seeds where they differ."""
    words = [_choice_words(row, outcome) or "defaults" for outcome in row.selected]
    counted = {word: words.count(word) for word in words}
    return "; ".join(word if len(counted) == 1 else f"{word} ({number} of {len(words)} seeds)" for word, number in counted.items()) or DASH


def _choice_words(row: Row, outcome: Outcome) -> str:
    """ "learning_rate 0.002 (largest tried), retain_weight 2": at an edge of the search a better value may lie outside."""
    edges = {name: row.edge(outcome, name) for name in SEARCHED}
    said = outcome.trial.choice.said().items()
    return ", ".join(f"{name} {value}" + (f" ({edge} tried)" if (edge := edges.get(name)) else "") for name, value in said)


def trials_of(row: Row) -> str:
    """ "24, of which 1 failed"."""
    states = [outcome.state for outcome in row.outcomes]
    rest = [f"{states.count(state)} {state}" for state in ("failed", "crashed", "stopped", "missing") if state in states]
    return f"{len(states)}" + (f", of which {', '.join(rest)}" if rest else "")


def main_grid(table: Table) -> Grid:
    columns = shown_columns(table)
    costs = costs_of(table)
    head = ("cell", *(column.header for column in columns), "seeds", "trials", "settings", *costs, "time of all trials")
    rows = [*_references(table, columns, "target")]
    for row in table.rows:
        title = cell_title(row, table) + ("" if row.qualifies or not row.selected else " *")
        cells = [spread(row, column) for column in columns]
        means = [DASH if (mean := row.cost(name)) is None else write(mean) for name, write in costs.values()]
        rows.append((title, *cells, str(len(row.selected)), trials_of(row), settings_of(row), *means, duration(row.seconds)))
    rows += _references(table, columns, "retrained")
    return Grid(caption(table), head, tuple((*row, *[""] * (len(head) - len(row))) for row in rows))


def costs_of(table: Table) -> dict[str, tuple[str, Callable[[float], str]]]:
    """What a selected run costs, by heading: what was measured and how it is written. Runs that share a process have no peak memory."""
    known: dict[str, tuple[str, Callable[[float], str]]] = {
        "training time of a run": ("train_s", duration),
        "peak memory": ("peak_memory_bytes", memory),
    }
    return {title: cost for title, cost in known.items() if any(row.cost(cost[0]) is not None for row in table.rows)}


def caption(table: Table) -> str:
    """What the numbers of the main table are."""
    parts = ["Mean over the seeds ± standard deviation [Student's 95 % interval of the mean]."]
    if table.halved:
        metric = METRICS[table.metric].title
        parts.append(
            f"Each cell's settings, the same for all seeds, were selected on {_half(table)} (least mean {metric} on forget among those "
            f"that keep {table.floor:.0%} of the target's on retain) and are reported on the other rows, as are target and retrained model."
        )
    parts.append(f"* does not keep {table.floor:.0%} of the target's retain score in every seed.")
    if table.edges:
        parts.append("(largest tried) or (smallest tried): the search ended there, a better value may lie outside its range.")
    if "peak memory" not in costs_of(table):
        parts.append("Peak memory was not measured: the runs shared processes (--isolated gives each its own).")
    return " ".join(parts)


def _half(table: Table) -> str:
    if not table.shared_groups:
        return "half of the authors (groups of ids) of the forget and retain rows"
    return f"half of the forget and retain rows, which in {' and '.join(table.shared_groups)} share authors with the other half"


def _references(table: Table, columns: Sequence[GridColumn], kind: str) -> list[tuple[str, ...]]:
    rows = []
    for model in table.models:
        values = table.reference(model, kind)
        if values:
            cells = [fixed(values[column.path], column.decimals) if column.path in values else DASH for column in columns]
            rows.append((kind if len(table.models) == 1 else f"{kind}, {model}", *cells))
    return rows


def differences_grid(table: Table) -> Grid | None:
    """How much more (or less) a cell keeps than a first-order baseline of its method at equal forgetting, and forgets at the floor."""
    if not table.differences:
        return None
    rows = []
    for found in table.differences:
        place = DASH if found.level is None else f"{fixed(found.level)} ({METRICS[found.metric].title})"
        ratio = DASH if found.time_ratio is None else f"{found.time_ratio:.2f}"
        rows.append((_pair(found, table), place, difference_words(found.difference), difference_words(found.forgetting), ratio))
    text = (
        "Retain score minus the baseline's where both leave as much of the forget rows: the deepest forgetting that both reach in every "
        f"seed and at which one of them still keeps {table.floor:.0%}, read off the line through the runs on each one's front, which the "
        "selection rows decide. At the floor: forget score of the selected choices minus the baseline's, in the seeds in which both keep "
        f"{table.floor:.0%} (negative: it forgets more). Paired by seed, with Student's 95 % interval."
    )
    head = ("cell against baseline", "forget left", "retain difference", "forget difference at the floor", "× training time")
    return Grid(text, head, tuple(rows))


def _pair(found: Comparison, table: Table) -> str:
    model = "" if len(table.models) == 1 else f", {found.cell.model}"
    return f"{run_title(found.cell.method, found.cell.optimizer)} − {run_title(found.baseline.method, found.baseline.optimizer)}{model}"


def difference_words(difference: Difference) -> str:
    """ "+0.02 [−0.01, +0.05]: inside the noise"."""
    if difference.mean is None:
        return "not comparable in any seed"
    mean = signed(difference.mean)
    if difference.low is None or difference.high is None:
        return f"{mean}: one seed, no interval"
    verdict = "inside the noise" if difference.verdict == "inside the noise" else f"outside the noise of {difference.num_pairs} seeds"
    return f"{mean} [{signed(difference.low)}, {signed(difference.high)}]: {verdict}"


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def failures(table: Table) -> list[tuple[str, str]]:
    """(trials, why) for the trials without a result, by reason; grid.csv names every one."""
    by_reason: dict[str, list[str]] = {}
    for row in table.rows:
        for outcome in row.failures:
            by_reason.setdefault(outcome.reason, []).append(outcome.trial.id)
    return [(_listed(trials), reason) for reason, trials in by_reason.items()]


def _listed(names: Sequence[str]) -> str:
    """The first few, and how many more."""
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")


def trials_csv(table: Table) -> str:
    """Every trial, one line each, with all its numbers; the selected ones are marked."""
    paths = sorted({path for row in table.rows for outcome in row.outcomes for path in outcome.values})
    settings = sorted({name for row in table.rows for outcome in row.outcomes for name in outcome.trial.choice.settings})
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        [
            "trial",
            "model",
            "method",
            "optimizer",
            "seed",
            "state",
            "reason",
            "selected",
            *settings,
            "train_s",
            "eval_s",
            "peak_memory_bytes",
            *paths,
        ]
    )
    for row in table.rows:
        for outcome in row.outcomes:
            trial, chosen = outcome.trial, outcome in row.selected
            costs = [outcome.cost.get(name) for name in ("train_s", "eval_s", "peak_memory_bytes")]
            found = trial.choice.settings
            writer.writerow(
                [
                    trial.id,
                    trial.cell.model,
                    trial.cell.method,
                    trial.cell.optimizer,
                    trial.seed,
                    outcome.state,
                    outcome.reason,
                    int(chosen),
                ]
                + [found.get(name, "") for name in settings]
                + ["" if value is None else f"{value:.6g}" for value in costs]
                + [f"{outcome.values[path]:.6g}" if path in outcome.values else "" for path in paths]
            )
    return buffer.getvalue()


def markdown_grid(grid: Grid) -> str:
    lines = [markdown_row([markdown_text(title) for title in grid.head]), markdown_row(["---", *("---:" for _ in grid.head[1:])])]
    return "\n".join([*lines, *(markdown_row([markdown_text(cell) for cell in row]) for row in grid.rows)])


def latex_grid(grid: Grid, *, label: str) -> str:
    """A booktabs table as wide as the text, to be read by a LaTeX document."""
    head = " & ".join(map(latex_text, grid.head))
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex_text(grid.caption)}}}",
        rf"\label{{{label}}}",
        r"\resizebox{\textwidth}{!}{%",
    ]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(grid.head) - 1)}}}", r"\toprule", rf"{head} \\", r"\midrule"]
    lines += [rf"{' & '.join(map(latex_text, row))} \\" for row in grid.rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}", r"\end{table}", ""])


SYMBOLS: Final = {
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "≈": r"$\approx$",
    "±": r"$\pm$",
    "−": "$-$",
    DASH: "--",
    "<": "$<$",
    "×": r"$\times$",
}


def latex_text(text: str) -> str:
    parts = (RESERVED.sub(r"\\\1", part).replace("~", r"\textasciitilde{}").replace("^", r"\^{}") for part in text.split("\\"))
    text = r"\textbackslash{}".join(parts)
    for symbol, command in SYMBOLS.items():
        text = text.replace(symbol, command)
    return text.replace("\N{NO-BREAK SPACE}", "~")


def sort_key(text: str) -> str:
    """The number a cell begins with, for a page that sorts by it; empty where there is none."""
    found = re.match(r"[−+-]?[\d.,]+", text.replace("< ", ""))
    if found is None:
        return ""
    number = float(found[0].replace("−", "-").replace(",", "").rstrip(".") or "nan")
    return f"{number:g}" if math.isfinite(number) else ""
