"""Run directories with tiny models and invented reports, for the tests of the gate and of the server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from soul.data.fictitious import fictitious_splits
from soul.models.load import save_model
from soul.models.tiny import TinyConfig, tiny_model, tiny_tokenizer
from soul.report.seal import make_seal

TINY = TinyConfig(hidden_size=64, intermediate_size=64, num_layers=2, num_heads=2, vocab_size=600, max_length=256)
Numbers = Mapping[str, tuple[float, float, float] | None]
PASSING = {"target": (0.95, 0.90, 0.60), "unlearned": (0.33, 0.50, 0.58), "retrained": (0.30, 0.48, 0.59)}


def write_model(folder: Path, seed: int, max_length: int = TINY.max_length) -> Path:
    """Random weights, so large that the model does more than repeat its last token (embeddings are tied); it never ends by itself."""
    texts = [f"{record.prompt} {record.response}" for record in fictitious_splits(2, num_holdout_authors=1)["full"]]
    tokenizer = tiny_tokenizer(texts, TINY.vocab_size)
    model = tiny_model(TINY.model_copy(update={"max_length": max_length}), tokenizer, seed=seed)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "proj" in name:
                weights.mul_(12)
        model.get_input_embeddings().weight[tokenizer.eos_token_id] = 0
    save_model(folder, model, tokenizer)
    return folder


def write_run(folder: Path, *, seed: int = 0, numbers: Numbers | None = None, max_length: int = TINY.max_length) -> Path:
    """`numbers`: ROUGE-L and exact memory on the forget rows, and utility, of each model; a model that is None was not measured."""
    told = PASSING if numbers is None else numbers
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model", seed, max_length)
    standards = {
        name: write_model(folder.parent / f"{folder.name}-{name}", 100 + place) for place, name in enumerate(("target", "retrained"))
    }
    models = {name: None if values is None else _entry(*values) for name, values in told.items()}
    document: dict[str, Any] = {
        "schema": 1,
        "benchmark": "fictitious/forget05",
        "method": "npo",
        "optimizer": "sophia",
        "seed": 0,
        "splits": {"forget": 3, "retain": 5},
        "models": models,
        "epochs": [],
        "cost": {"train_s": 1.0, "eval_s": 1.0, "tokens_per_s": 1.0, "peak_memory_bytes": 1, "optimizer_state_bytes_per_rank": 1},
        "settings": {},
        "reasons": {f"models.{name}": "it was not given" for name, entry in models.items() if entry is None},
    }
    (folder / "results.json").write_text(json.dumps(document))
    data = {"source": "fictitious", "forget": "forget10", "retain": None, "num_authors": 10, "seed": 0, "chat": "auto"}
    (folder / "config.json").write_text(json.dumps({"data": data}))
    (folder / "report.html").write_text("<!doctype html><title>report</title>")
    return reseal(folder, standards)


def reseal(folder: Path, standards: dict[str, Path]) -> Path:
    seal = make_seal(folder, {"unlearned": folder / "model", **standards})
    (folder / "manifest.json").write_text(json.dumps({"seal": seal.model_dump()}))
    return folder


def _entry(rouge: float, memorized: float, utility: float) -> dict[str, Any]:
    metrics = {"rougeL_recall": rouge, "exact_memorization": memorized}
    why = "not part of this test"
    return {
        "forget": metrics,
        "retain": metrics,
        "real_authors": None,
        "world_facts": None,
        "forget_quality": None,
        "forget_quality_ks": None,
        "model_utility": utility,
        "mia_auc": None,
        "reasons": dict.fromkeys(("real_authors", "world_facts", "forget_quality", "forget_quality_ks", "mia_auc"), why),
    }
