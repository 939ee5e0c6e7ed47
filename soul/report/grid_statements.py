"""What a grid shows, in plain sentences that claim no more than its seeds can carry."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Final

from soul.benchmarks.aggregate import Row, Table
from soul.report.grid_second_order import second_order
from soul.report.grid_tables import cell_title
from soul.report.numbers import percent
from soul.report.words import METRICS, run_title

WEAK_TARGET: Final = 0.5


def statements(table: Table) -> Iterator[str]:
    """The best cells per model, second against first order, and what limits all of it."""
    for model in table.models:
        yield from _best(table, model)
        yield from second_order(table, model)
    yield from _limits(table)


def _best(table: Table, model: str) -> Iterator[str]:
    forget, retain = f"forget.{table.metric}", f"retain.{table.metric}"
    rows = [row for row in table.rows if row.cell.model == model and row.values(forget)]
    kept = [row for row in rows if row.qualifies]
    name = "" if len(table.models) == 1 else f"{model}: "
    if not kept:
        if rows:
            yield f"{name}No cell keeps {table.floor:.0%} of the target's retain {METRICS[table.metric].title} in every seed."
        return
    best = min(kept, key=lambda row: fmean(row.values(forget)))
    yield (
        f"{name}Of the {len(kept)} of {len(rows)} cells that keep {table.floor:.0%} of the target's retain {METRICS[table.metric].title}, "
        f"{cell_title(best, table)} leaves least: {percent(fmean(best.values(forget)))} of the forget rows left, "
        f"{percent(fmean(best.values(retain)))} of the retain rows kept.{_ties(best, kept, forget)}"
    )
    front = [row for row in table.best if row.cell.model == model]
    yield f"{name}On the Pareto front of (forget, retain), by their means: {', '.join(cell_title(row, table) for row in front)}."


def _ties(best: Row, kept: list[Row], path: str) -> str:
    """The cells whose interval meets the best one's: with so few seeds they are not told apart."""
    own = best.interval(path)
    if own is None:
        return " One seed: this ranks runs, not optimizers."
    rivals = [row for row in kept if row is not best and (other := row.interval(path)) is not None and other[0] <= own[1]]
    if not rivals:
        return ""
    return f" Inside the noise of it: {', '.join(run_title(row.cell.method, row.cell.optimizer) for row in rivals)}."


def _limits(table: Table) -> Iterator[str]:
    seeds = {outcome.trial.seed for row in table.rows for outcome in row.outcomes}
    intervals = sum(difference.low is not None for found in table.differences for difference in (found.difference, found.forgetting))
    if intervals:
        yield (
            f"{intervals} differences with a 95 % interval: about {0.05 * intervals:.1g} of them would leave zero out by chance. "
            "Seeds vary data order and sampled labels; target and forget set are the same, so nothing is said about others."
        )
    outcomes = [outcome for row in table.rows for outcome in row.outcomes]
    if missing := sum(outcome.state == "missing" for outcome in outcomes):
        yield f"{missing} of {len(outcomes)} trials have not run yet: until they have, the cells' budgets are not equal."
    if table.edges:
        names = ", ".join(
            f"{cell_title(row, table)} ({', '.join(f'{edge} {name}' for name, edge in row.edges.items())})" for row in table.edges
        )
        yield f"The search of {len(table.edges)} of {len(table.rows)} cells ended at the edge of its range: {names}."
    for model in table.models:
        start = table.reference(model, "target").get(f"forget.{table.metric}")
        if start is not None and start < WEAK_TARGET:
            yield f"The target {model} itself reproduces only {percent(start)} of the forget rows: train it longer (--prepare-epochs)."
    if len(seeds) < 3:
        yield f"{len(seeds)} seed(s): seed noise is as large as the gaps between methods; run at least 3 before ranking anything."
