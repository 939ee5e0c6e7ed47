"""What a comparison of optimizers found: differences by seed, and in words which of them survive."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

from soul.benchmarks.comparison import ComparisonResult, Group
from soul.benchmarks.paired import Difference, Summary, paired_difference, summary
from soul.benchmarks.selection import RULES
from soul.objectives.methods import TITLES
from soul.statistics.means import CONFIDENCE

FORGET_QUALITY: Final = "forget_quality_log10_p"
METRICS: Final[Mapping[str, str]] = {
    "forget.rougeL_recall": "forget ROUGE-L",
    "retain.rougeL_recall": "retain ROUGE-L",
    "forget.probability": "forget prob.",
    "retain.probability": "retain prob.",
    "forget.exact_memorization": "forget exact mem.",
    "forget.truth_ratio": "forget truth ratio",
    "real_authors.rougeL_recall": "authors ROUGE-L",
    "world_facts.rougeL_recall": "facts ROUGE-L",
    "model_utility": "utility",
    FORGET_QUALITY: "forget quality log10 p",
}
SMALLEST_P: Final = 1e-300


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


def title(group: Group) -> str:
    """How the group's rates came about; the baseline's rate is the first one."""
    rate = next(iter(group.learning_rates.values()))
    names = {"equal": f"equal learning rate {rate:g}", "keep": "after the search, rule keep", "forget": "after the search, rule forget"}
    return f"{TITLES[group.method]}, {' = '.join(names[kind] for kind in group.kinds)}"


def conclusions(result: ComparisonResult) -> Iterator[str]:
    """Per method and other optimizer what survives the search: under both rules of selection and with the same sign.

    Rules that select the same rates for both optimizers show the same runs twice: that is one comparison, and is said to be.
    """
    baseline = result.settings.baseline
    for method in result.settings.methods:
        under = [next(group for group in result.groups if group.method == method and rule in group.kinds) for rule in RULES]
        for other in result.settings.optimizers[1:]:
            rates = list(dict.fromkeys((group.learning_rates[baseline], group.learning_rates[other]) for group in under))
            found = [differences(group, baseline)[other] for group in under][: len(rates)]
            lasting = [path for path in METRICS if len({_sign(one[path]) for one in found}) == 1 and _sign(found[0][path]) != 0]
            listed = "; ".join(f"{METRICS[path]} of {baseline} {_size([one[path] for one in found])}" for path in lasting)
            who = f"{TITLES[method]}, {baseline} against {other}"
            if len(rates) == 1:
                said = listed or "every difference is inside the noise"
                yield f"{who}: both rules select the same runs, which is one comparison and not two: {said}."
            else:
                yield f"{who}: {listed or 'no difference survives the search under both rules'}.{_shared(rates, baseline, other)}"


def _shared(rates: list[tuple[float, float]], *names: str) -> str:
    """Which optimizer's runs are the same under both rules."""
    same = [name for name, pair in zip(names, zip(*rates, strict=True), strict=True) if len(set(pair)) == 1]
    return f" The runs of {same[0]} are the same under both rules." if same else ""


def statements(result: ComparisonResult) -> Iterator[str]:
    """Per comparison the metrics whose interval leaves zero out; then how many would do so by chance."""
    baseline = result.settings.baseline
    intervals: set[tuple[str, float, str, float, str]] = set()  # the groups share runs where rates coincide
    for group in result.groups:
        for other, found in differences(group, baseline).items():
            pair = (group.method, group.learning_rates[baseline], other, group.learning_rates[other])
            intervals |= {(*pair, path) for path, difference in found.items() if difference.low is not None}
            listed = "; ".join(f"{METRICS[path]} of {baseline} {_size([found[path]])}" for path in METRICS if _sign(found[path]) != 0)
            rates = "" if "equal" in group.kinds else f" ({group.learning_rates[baseline]:g} against {group.learning_rates[other]:g})"
            yield f"{title(group)}: {baseline} against {other}{rates}: {listed or 'every difference is inside the noise'}."
    if intervals:
        chance = (1 - CONFIDENCE) * len(intervals)
        yield (
            f"{len(intervals)} intervals at {CONFIDENCE:.0%} were computed: about {chance:.0f} of them would leave zero out by chance if "
            "nothing differed. Seeds vary data order and sampled labels only: there is one target model and one forget set, so nothing is "
            "said about others."
        )


def _of_halves(result: ComparisonResult) -> str:
    if not result.shared_groups:
        return "No author or group of ids has rows in both halves."
    return f"There is one author or group of ids in {' and '.join(result.shared_groups)}, which has rows in both halves."


def _sign(difference: Difference) -> int:
    """+1 or -1 for a difference that survives, else 0."""
    if difference.verdict != "survives" or not difference.mean:
        return 0
    return 1 if difference.mean > 0 else -1


def _size(found: list[Difference]) -> str:
    """ "higher by 0.11", of several "higher by 0.11 and 0.2"."""
    side = "higher" if _sign(found[0]) > 0 else "lower"
    return f"{side} by {' and '.join(f'{abs(one.mean or 0.0):.2g}' for one in found)}"


def warnings(result: ComparisonResult) -> Iterator[str]:
    for (method, optimizer), search in result.searches.items():
        for rule, selection in search.selections.items():
            who = f"{TITLES[method]} with {optimizer}, rule {rule}"
            if not selection.qualifies:
                yield f"{who}: no learning rate of the grid meets the bound; the nearest to it was taken."
            if selection.at_edge:
                yield f"{who}: the selected rate {selection.learning_rate:g} is at the grid's edge; a better one may lie outside."
    cap, longest = result.max_new_tokens, result.longest_answer
    if longest > cap:
        yield f"Generation stops at {cap} tokens, but the longest reference has {longest}: ROUGE-L cannot reach 1 on it."


def setting(result: ComparisonResult) -> Iterator[str]:
    """How it was measured, a paragraph each."""
    settings = result.settings
    sizes = ", ".join(f"{name} {size}" for name, size in result.sizes.items())
    yield (
        f"Rows of {result.benchmark}: {sizes}. {result.steps} steps of {settings.batch_size} forget and as many retain rows, retain "
        f"weight {settings.retain_weight:g}; warm-up 10 %, linear decay, gradient norm clipped to 1, weight decay 0.1."
    )
    yield (
        f"The search gives every optimizer the same {len(settings.learning_rates)} learning rates on one seed and the selection half of "
        f"the evaluated rows. The tables show {settings.seeds} other seeds on the report half; answers are generated with at most "
        f"{result.max_new_tokens} tokens (the longest reference has {result.longest_answer}). Unlearning sees all forget rows, of both "
        f"halves. {_of_halves(result)}"
    )
    yield (
        "Selected are, apart from each other, "
        + "; ".join(
            f"by rule {rule}, {text.format(floor=settings.retain_floor, ceiling=settings.forget_ceiling)}" for rule, text in RULES.items()
        )
        + "."
    )
