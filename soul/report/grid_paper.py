"""SOUL's own tables beside ours: Table 2 (TOFU forget10, Llama-2-7B-chat) and Table 6 (cost), with what can be compared and what not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from soul.benchmarks.aggregate import Row, Table
from soul.benchmarks.outcomes import Values
from soul.report.content import Grid
from soul.report.numbers import DASH, duration, fixed, memory
from soul.report.words import METHODS, ORDERS

# Jia et al., EMNLP 2024 (arXiv 2404.18239), Table 2: forget quality, then accuracy (%) and ROUGE-L per split, with the attack on forget.
PAPER_HEAD: Final = ("FQ", "F-Acc", "F-RougeL", "MIA", "R-Acc", "R-RougeL", "RA-Acc", "RA-RougeL", "WF-Acc", "WF-RougeL")
PAPER_TABLE_2: Final[dict[str, tuple[float, ...]]] = {
    "Original": (0.36, 85.25, 0.9796, 0.7894, 85.75, 0.9825, 89.00, 0.9330, 86.32, 0.8960),
    "FO-GA": (0.14, 66.25, 0.4110, 0.7754, 63.25, 0.4504, 42.00, 0.4400, 76.92, 0.8170),
    "FO-GradDiff": (0.02, 72.75, 0.5174, 0.7627, 76.50, 0.6115, 71.00, 0.7677, 79.49, 0.8462),
    "SO-GradDiff": (1.00, 10.25, 0.0221, 0.2156, 72.25, 0.5960, 78.00, 0.8113, 82.03, 0.8675),
    "FO-PO": (0.72, 37.00, 0.0882, 0.7911, 82.75, 0.9051, 90.00, 0.9330, 84.62, 0.8875),
    "SO-PO": (0.92, 28.75, 0.0761, 0.7877, 82.75, 0.8137, 90.00, 0.9380, 86.32, 0.9046),
    "FO-NPO": (1.00, 16.00, 0.0458, 0.3062, 80.75, 0.8426, 85.00, 0.9110, 82.91, 0.8803),
    "SO-NPO": (1.00, 16.00, 0.0291, 0.2274, 81.25, 0.8314, 89.00, 0.9283, 85.47, 0.8917),
}
# Table 6: minutes and MiB.
PAPER_TABLE_6: Final[dict[str, tuple[float, float]]] = {
    "FO-GradDiff": (30, 76_362),
    "SO-GradDiff": (30, 76_378),
    "FO-PO": (30, 89_278),
    "SO-PO": (31, 89_294),
    "FO-NPO": (32, 89_280),
    "SO-NPO": (35, 89_362),
}
# Where each of the paper's columns has its like here; where there is none, choice accuracy is the nearest and has a column of its own.
OUR_PATHS: Final = (
    "legacy_self_ks_p",
    "forget.accuracy",
    "forget.rougeL_recall",
    "legacy_scrambled_mia_auc",
    "retain.accuracy",
    "retain.rougeL_recall",
    "real_authors.accuracy",
    "real_authors.rougeL_recall",
    "world_facts.accuracy",
    "world_facts.rougeL_recall",
)
OWN_COLUMNS: Final = {
    "TOFU FQ, log10 p": "log10_forget_quality",
    "MIA Min-k AUC": "mia_auc.min_k",
    "F-Choice": "forget.choice_accuracy",
    "R-Choice": "retain.choice_accuracy",
    "RA-Choice": "real_authors.choice_accuracy",
    "WF-Choice": "world_facts.choice_accuracy",
    "utility": "model_utility",
}
NOTES: Final = (
    "FQ is comparable: both are 1 − p of a test between one model's own forget and retain truth ratios, which is what the paper's numbers "
    "fit. No retrained model enters it, and a destroyed model scores 1. TOFU's forget quality, against the retrained model, is in our own "
    "columns.",
    "MIA is comparable as a defect: the paper's labels are in another order than its scores, so it cannot leave about [0.23, 0.77] however "
    "well a model forgot; ours repeats that. The attack's real AUC is in our own columns.",
    "Acc is comparable only where it is filled in: it needs a sentence model (--eval-sentence-model). Choice accuracy (is the true answer "
    "likelier than every wrong one) needs none and is another number.",
    "ROUGE-L is the same metric; the released code trained and evaluated on a malformed chat template.",
    "The paper's model has 7 billion pretrained parameters. A tiny model trained from scratch shows how methods and optimizers differ "
    "here, not the paper's numbers. FO-GA, FO-NPO and SO-NPO were published without settings.",
    "The paper's FO and SO runs differ in learning rate and retain weight as well as in optimizer; the preset repeats that. Rates scaled: "
    "the published settings with all learning rates multiplied (--learning-rate-scale), as another size of model needs.",
)
ORIGINS: Final = {"ours": " (our settings)", "scaled": " (rates scaled)"}


def paper_name(row: Row) -> str:
    """ "SO-NPO"."""
    return f"{ORDERS.get(row.cell.optimizer, '?')}-{METHODS.get(row.cell.method, row.cell.method)}"


def is_paper_shaped(table: Table) -> bool:
    """Whether the cells are those of the paper, with its settings or ours in their place."""
    return any(outcome.trial.choice.origin is not None for row in table.rows for outcome in row.outcomes)


def paper_rows(table: Table, model: str) -> list[Row]:
    return [row for row in table.rows if row.cell.model == model and row.cell.optimizer in ("adamw", "soul_release")]


def table_2(table: Table, model: str) -> Grid:
    """The paper's rows and columns: our number, and in brackets the paper's."""
    rows = [_beside("Original", "Original", [[value] for value in _values(table.reference(model, "target"), OUR_PATHS)])]
    for row in paper_rows(table, model):
        rows.append(_beside(f"{paper_name(row)}{_origin(row)}", paper_name(row), [row.values(path) for path in OUR_PATHS]))
    rows.append(_beside("Retrained", "Retrained", [[value] for value in _values(table.reference(model, "retrained"), OUR_PATHS)]))
    return Grid(f"Table 2 with {model}: means over the seeds [the paper's, Llama-2-7B-chat]", ("", *PAPER_HEAD), tuple(rows))


def own_table_2(table: Table, model: str) -> Grid:
    """What the paper's table lacks, for the same rows."""
    paths = tuple(OWN_COLUMNS.values())
    rows = [("Original", *map(_number, paths, [[value] for value in _values(table.reference(model, "target"), paths)]))]
    rows += [(f"{paper_name(row)}{_origin(row)}", *(_number(path, row.values(path)) for path in paths)) for row in paper_rows(table, model)]
    rows.append(("Retrained", *map(_number, paths, [[value] for value in _values(table.reference(model, "retrained"), paths)])))
    return Grid(f"Beside Table 2 with {model}: our own columns", ("", *OWN_COLUMNS), tuple(rows))


def _beside(title: str, name: str, found: Sequence[Sequence[float | None]]) -> tuple[str, ...]:
    printed = _printed(name)
    return title, *(f"{_number(path, values)}{paper}" for path, values, paper in zip(OUR_PATHS, found, printed, strict=True))


def _printed(name: str) -> list[str]:
    """The paper's row as it prints it, in brackets; nothing where it has none."""
    row = PAPER_TABLE_2.get(name)
    if row is None:
        return [""] * len(PAPER_HEAD)
    return [f" [{value:.{2 if 'Acc' in title or title == 'FQ' else 4}f}]" for title, value in zip(PAPER_HEAD, row, strict=True)]


def _origin(row: Row) -> str:
    return ORIGINS.get(row.outcomes[0].trial.choice.origin or "", "")


def _values(known: Values, paths: Sequence[str]) -> list[float | None]:
    return [known.get(path) for path in paths]


def _number(path: str, values: Sequence[float | None]) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return DASH
    mean = sum(found) / len(found)
    if path == "legacy_self_ks_p":
        return f"{1 - mean:.2f}"
    if path == "log10_forget_quality":
        return fixed(mean, 1)
    return f"{100 * mean:.2f}" if path.endswith("accuracy") else f"{mean:.4f}"


def our_table_6(table: Table, model: str) -> Grid:
    """Time and memory, ours and the paper's, each with second over first order."""
    rows = []
    times = {paper_name(row): row.cost("train_s") for row in paper_rows(table, model)}
    peaks = {paper_name(row): row.cost("peak_memory_bytes") for row in paper_rows(table, model)}
    for name in times:
        twin = name.replace("SO-", "FO-")
        paper = PAPER_TABLE_6.get(name)
        rows.append(
            (
                name,
                DASH if times[name] is None else duration(times[name] or 0.0),
                _ratio(times.get(name), times.get(twin)) if name != twin else "",
                DASH if peaks[name] is None else memory(peaks[name] or 0.0),
                _ratio(peaks.get(name), peaks.get(twin)) if name != twin else "",
                DASH if paper is None else f"{paper[0]:.0f} min",
                DASH if paper is None or name == twin else _ratio(paper[0], PAPER_TABLE_6[twin][0]),
                DASH if paper is None else f"{paper[1]:,.0f} MiB",
            )
        )
    head = ("", "our time", "× FO", "our peak memory", "× FO", "paper: time", "paper: × FO", "paper: memory")
    return Grid(f"Table 6 with {model}: training time and peak memory of a run, means over the seeds", head, tuple(rows))


COST_NOTES: Final = (
    "Runs that share a process have no peak memory of their own: --isolated measures it. Runs side by side slow each other down: "
    "--max-concurrent 1 gives comparable times.",
    "The paper's 12.9 GB more for PO and NPO is a copy of the model that PO never uses; ours keeps one number per forget row instead.",
    "The released second-order optimizer makes no curvature pass: its time is that of the first order. sophia and sophia_h make one.",
)


def _ratio(value: float | None, other: float | None) -> str:
    return DASH if not value or not other else f"{value / other:.2f}"
