"""Invented results in the shape and range of real ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from soul.report.results import Results
from tests.removal_numbers import removal_tests

Document = dict[str, Any]
DocumentFactory = Callable[..., Document]


def split(rouge: float, probability: float, truth_ratio: float | None, memorized: float) -> Document:
    return {
        "probability": probability,
        "rougeL_recall": rouge,
        "truth_ratio": truth_ratio,
        "exact_memorization": memorized,
        "extraction_strength": memorized / 2,
    }


def model(
    *, forget: float, retain: float, authors: float, p_value: float | None, auc: float, why: str = "it is the reference itself"
) -> Document:
    nulls = {} if p_value is not None else {"forget_quality": why, "forget_quality_ks": why}
    return {
        "forget": split(forget, forget * 0.9, 0.75 - forget / 4, forget),
        "retain": split(retain, retain * 0.97, 0.47, retain),
        "real_authors": split(authors, authors / 2, 0.6, authors),
        "world_facts": split(authors - 0.04, authors / 2 - 0.03, 0.54, authors - 0.04),
        "forget_quality": p_value,
        "forget_quality_ks": None if p_value is None else 0.4,
        "model_utility": retain * 0.63,
        "mia_auc": {"loss": auc, "zlib": auc - 0.01, "min_k": auc, "min_k_plus_plus": auc - 0.03},
        "tests": None if p_value is None else removal_tests(p_value, auc),
        "reasons": nulls,
    }


def epoch_rows(forget: float, retain: float, num_epochs: int = 5) -> list[Document]:
    """Forgets fast, dips on retain, recovers."""
    rows = []
    for epoch in range(num_epochs + 1):
        left = forget + (0.98 - forget) * 0.35**epoch
        kept = retain - (0.06 if 0 < epoch < 3 else 0.0)
        rows.append(
            {
                "epoch": epoch,
                "step": 25 * epoch,
                "forget": {"rougeL_recall": left, "probability": left * 0.9},
                "retain": {"rougeL_recall": kept, "probability": kept * 0.97},
            }
        )
    return rows


@pytest.fixture
def document() -> DocumentFactory:
    """results.json of an unlearning run: `document(optimizer="adamw", forget=0.4)`."""

    def make(
        *,
        method: str = "npo",
        optimizer: str = "sophia",
        seed: int = 0,
        forget: float = 0.12,
        retain: float = 0.97,
        p_value: float = 5e-10,
        auc: float = 0.999,
        retrained: bool = True,
        train_s: float = 312.4,
    ) -> Document:
        never = model(forget=0.06, retain=0.98, authors=0.92, p_value=None, auc=0.52)
        return {
            "schema": 1,
            "benchmark": "tofu/forget10",
            "method": method,
            "optimizer": optimizer,
            "seed": seed,
            "splits": {"forget": 400, "retain": 3600, "real_authors": 100, "world_facts": 117},
            "models": {
                "target": model(forget=0.98, retain=0.99, authors=0.93, p_value=1.8e-21, auc=1.0),
                "unlearned": model(forget=forget, retain=retain, authors=0.91, p_value=p_value, auc=auc),
                "retrained": never if retrained else None,
            },
            "epochs": epoch_rows(forget, retain),
            "cost": {
                "train_s": train_s,
                "eval_s": 88.0,
                "tokens_per_s": 5120.7,
                "peak_memory_bytes": None,
                "optimizer_state_bytes_per_rank": 7_200_000,
            },
            "settings": {
                "learning_rate": 5e-5,
                "epochs": 5,
                "batch_size": 4,
                "retain_weight": 1.0,
                "engine": "ddp",
                "num_workers": 2,
                "rho": 0.04,
            },
            "reasons": {"cost.peak_memory_bytes": "the device keeps no peak (CPU)"}
            | ({} if retrained else {"models.retrained": "not asked for"}),
        }

    return make


@pytest.fixture
def results(document: DocumentFactory) -> Callable[..., Results]:
    return lambda **changes: Results.model_validate(document(**changes))


def step_lines(optimizer: str, num_steps: int = 125) -> list[Document]:
    lines = []
    for step in range(num_steps):
        decay = 0.97**step
        lines.append(
            {
                "step": step,
                "epoch": step / 25,
                "loss": 2 * decay + 0.1 * (step % 3),
                "terms": {"forget": -4 * (1 - decay), "retain": 0.2 + 0.3 * decay},
                "learning_rate": 5e-5 * min(1.0, (step + 1) / 12) * (1 - step / num_steps),
                "grad_norm": 40 * decay + 1,
                "update_norm": 0.02 * decay + 0.001,
                "unclipped_fraction": 0.3 - 0.1 * decay if optimizer.startswith("sophia") else None,
                "rho": 0.04,
                "hessian_mean": 1e-3 * decay,
                "tokens": 900 + step,
                "seconds": 0.4,
            }
        )
    return lines


@pytest.fixture
def run_dir(tmp_path: Path, document: DocumentFactory) -> Callable[..., Path]:
    """A run directory with results.json and metrics.jsonl: `run_dir("a", optimizer="adamw")`."""

    def make(name: str, **changes: Any) -> Path:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        written = document(**changes)
        (folder / "results.json").write_text(json.dumps(written), encoding="utf-8")
        lines = [json.dumps(line) for line in step_lines(written["optimizer"])]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return folder

    return make
