"""What second order buys in a grid and what it does not, in sentences that follow from the table's differences and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from soul.benchmarks.aggregate import BASELINES, Comparison, Table
from soul.benchmarks.grid import Cell
from soul.benchmarks.paired import Difference
from soul.report.grid_tables import signed
from soul.report.words import METRICS, ORDERS, run_title

Measure = Callable[[Comparison], Difference]


def second_order(table: Table, model: str) -> Iterator[str]:
    """Against each first-order baseline of the model, then the sum of it; nothing where the grid has no such comparison."""
    compared = [found for found in table.differences if found.cell.model == model and ORDERS.get(found.cell.optimizer) == "SO"]
    if not compared:
        return
    name = "" if len(table.models) == 1 else f"{model}: "
    for baseline in BASELINES:
        against = [found for found in compared if found.baseline.optimizer == baseline]
        if against:
            yield f"{name}{_against(against, baseline, table)}"
    yield f"{name}{_sum(compared)}"


def _against(found: Sequence[Comparison], baseline: str, table: Table) -> str:
    what = "the optimizer without curvature" if baseline == BASELINES[1] else "first order"
    times = [one.time_ratio for one in found if one.time_ratio is not None]
    price = "" if not times else f" A run trains {_span(times)} times as long as with {baseline}."
    return (
        f"Second order against {baseline}, {what}. Retain score at equal forgetting: {_counts(found, _kept, 'higher', 'lower')}. Forget "
        f"{METRICS[table.metric].title} at the floor: {_counts(found, _left, 'higher', 'lower', good_first=False)}.{price}"
    )


def _kept(found: Comparison) -> Difference:
    return found.difference


def _left(found: Comparison) -> Difference:
    return found.forgetting


def _counts(found: Sequence[Comparison], measure: Measure, above: str, below: str, *, good_first: bool = True) -> str:
    """ "higher in 1 of 6 (SO-NPO (sophia) +0.020), lower in 2 (...), inside the noise in 3"."""
    known = [one for one in found if measure(one).low is not None]
    if not known:
        return "no interval, for want of two seeds in which both can be compared"
    sides = [(above, 1), (below, -1)] if good_first else [(below, -1), (above, 1)]
    parts = []
    for word, sign in sides:
        chosen = [one for one in known if _sign(measure(one)) == sign]
        listed = "; ".join(f"{_name(one)} {signed(measure(one).mean or 0.0)}" for one in chosen)
        parts.append(f"{word} in {len(chosen)} of {len(known)}" + (f" ({listed})" if listed else ""))
    inside = sum(_sign(measure(one)) == 0 for one in known)
    rest = "" if len(known) == len(found) else f", not comparable in {len(found) - len(known)}"
    return f"{', '.join(parts)}, inside the noise in {inside}{rest}"


def _sum(compared: Sequence[Comparison]) -> str:
    """A gain counts only where every first-order baseline of the grid lacks it."""
    if all(measure(one).low is None for one in compared for measure in (_kept, _left)):
        return "What second order buys at this scale cannot be said: no difference has an interval."
    cells = list(dict.fromkeys(one.cell for one in compared))
    gains: dict[Cell, str] = {}
    shared: list[str] = []
    for cell in cells:
        own = [one for one in compared if one.cell == cell]
        for measure, sign, words in ((_kept, 1, "keeps more at equal forgetting"), (_left, -1, "forgets more at the floor")):
            beaten = [one.baseline.optimizer for one in own if _sign(measure(one)) == sign]
            if len(beaten) == len(own):
                gains[cell] = f"{gains[cell]} and {words}" if cell in gains else f"{_name(own[0])} {words}"
            elif BASELINES[0] in beaten:
                shared.append(f"{_name(own[0])} {words}")
    losers = list(dict.fromkeys(_name(one) for one in compared if _sign(_kept(one)) < 0 or _sign(_left(one)) > 0))
    baselines = " and ".join(dict.fromkeys(one.baseline.optimizer for one in compared))
    said = [f"What second order buys at this scale, outside the noise and against {baselines}: {'; '.join(gains.values()) or 'nothing'}."]
    if shared:
        said.append(f"Better than {BASELINES[0]} but not than {BASELINES[1]}, so not owed to curvature: {'; '.join(shared)}.")
    said.append(f"What it does not: an advantage in {len(cells) - len(gains)} of its {len(cells)} cells.")
    if losers:
        said.append(f"Worse outside the noise, in either respect and against either: {', '.join(losers)}.")
    return " ".join(said)


def _sign(difference: Difference) -> int:
    """+1 or -1 for a difference outside the noise, else 0."""
    if difference.verdict != "survives" or not difference.mean:
        return 0
    return 1 if difference.mean > 0 else -1


def _name(found: Comparison) -> str:
    return run_title(found.cell.method, found.cell.optimizer)


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"
