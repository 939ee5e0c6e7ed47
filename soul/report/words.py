"""What every number of a report is called for people, what it means, and which way is good."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

Direction = Literal["lower", "higher", "retrained"]
ARROWS: Final[Mapping[Direction, str]] = {"lower": "↓", "higher": "↑", "retrained": "≈"}
ARROW_KEY: Final = "↑ higher is better, ↓ lower is better, ≈ the nearer to the retrained model the better"


@dataclass(frozen=True, slots=True)
class Word:
    """`forget` and `retain` say which way is good on the forget rows and on everything that is to be kept; a `share` lies in [0, 1]."""

    title: str
    meaning: str
    forget: Direction
    retain: Direction
    share: bool = True


METRICS: Final[Mapping[str, Word]] = {
    "rougeL_recall": Word(
        "ROUGE-L", "share of the reference answer's words that the model's own answer contains, in order", "lower", "higher"
    ),
    "probability": Word(
        "probability",
        "per-token probability the model gives the true answer (on real authors and world facts: its share against wrong answers)",
        "lower",
        "higher",
    ),
    "exact_memorization": Word("exact memory", "share of the answer's tokens that are the model's first choice", "lower", "higher"),
    "extraction_strength": Word(
        "extraction", "share of the answer that the model completes without error once it is given the beginning", "lower", "higher"
    ),
    "truth_ratio": Word(
        "truth ratio",
        "on forget rows: 1 when wrong answers are as likely as the right one; elsewhere: 1 when the right one is always preferred",
        "retrained",
        "higher",
    ),
    "accuracy": Word(
        "accuracy", "share of answers that a sentence model finds closer to the truth than to every wrong answer", "lower", "higher"
    ),
    "choice_accuracy": Word(
        "choice accuracy", "share of questions whose true answer is more probable than every wrong one", "lower", "higher"
    ),
    "nll": Word("answer loss", "mean negative log-likelihood of the true answer, in nats per token", "higher", "lower", share=False),
}

OVERALL: Final[Mapping[str, Word]] = {
    "model_utility": Word(
        "utility",
        "harmonic mean of probability, ROUGE-L and truth ratio on retained rows, real authors and world facts",
        "higher",
        "higher",
    ),
    "forget_quality": Word(
        "forget quality",
        "p-value of the test that the truth ratios on forget rows come from the retrained model; printed as log10 p, 0 is best, "
        "below −1.3 the two models can be told apart",
        "higher",
        "higher",
    ),
    "forget_quality_ks": Word(
        "KS distance", "largest gap between the truth-ratio distributions of this model and the retrained one; 0 is best", "lower", "lower"
    ),
}

ATTACKS: Final[Mapping[str, Word]] = {
    "loss": Word("loss", "guesses that a row was trained on when its loss is low", "retrained", "retrained"),
    "zlib": Word("zlib", "the loss divided by how well the text compresses", "retrained", "retrained"),
    "min_k": Word("Min-k", "mean log-probability of the least likely tokens", "retrained", "retrained"),
    "min_k_plus_plus": Word(
        "Min-k++", "Min-k with every token's log-probability standardised over the vocabulary", "retrained", "retrained"
    ),
}
ARROW_WORDS: Final[Mapping[Direction, str]] = {
    "lower": "lower is better",
    "higher": "higher is better",
    "retrained": "nearer to the retrained model is better",
}
AUC_MEANING: Final = (
    "Area under the curve of an attack that tells forgotten rows from rows no model has seen: 1 means it still recognises them, "
    "0.5 means it guesses, near 0 means they are conspicuously unlikely, which betrays them as well."
)

SPLITS: Final[Mapping[str, str]] = {
    "forget": "Forget",
    "retain": "Retain",
    "real_authors": "Real authors",
    "world_facts": "World facts",
}

COSTS: Final[Mapping[str, str]] = {
    "train_s": "training time",
    "eval_s": "evaluation time",
    "tokens_per_s": "tokens per second",
    "peak_memory_bytes": "peak memory",
    "optimizer_state_bytes_per_rank": "optimizer state per rank",
}

METHODS: Final[Mapping[str, str]] = {"ga": "GA", "grad_diff": "GradDiff", "po": "PO", "npo": "NPO", "influence": "Influence"}
ORDERS: Final[Mapping[str, str]] = {"adamw": "FO", "signum": "FO", "sophia": "SO", "sophia_h": "SO", "soul_release": "SO", "one_shot": "SO"}


def run_title(method: str, optimizer: str) -> str:
    """ "SO-NPO (sophia)": the paper's name, and the optimizer that was really used."""
    order = f"{ORDERS[optimizer]}-" if optimizer in ORDERS else ""
    return f"{order}{METHODS.get(method, method)} ({optimizer})"
