"""Reference log-probabilities of the leading split under the frozen target: one Ray Data pass, then a column; never a second model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
import torch

from soul.batch import collate
from soul.data.store import TokenStore
from soul.device import Device, torch_device
from soul.models.load import load_model
from soul.models.scoring import answer_logps
from soul.rundir import digest
from soul.store import local, place_of, pull_file, push

ROWS_PER_BATCH = 16


@dataclass(frozen=True)
class ScoreRows:
    """A Ray Data task body: batch number -> (row index, log-probability of its answer in nats). Batches are fixed by row length."""

    model: str
    store: str
    revision: str | None
    trust_remote_code: bool
    device: Device

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        store = TokenStore.open(Path(local(self.store)))
        model, device = _target(local(self.model), self.revision, self.trust_remote_code, self.device)
        order = np.argsort(store.lengths_R, kind="stable")
        found: dict[str, list[Any]] = {"index": [], "logp": []}
        for number in batch["batch"].tolist():
            rows = [store.row(int(i)) for i in order[number * ROWS_PER_BATCH : (number + 1) * ROWS_PER_BATCH]]
            with torch.inference_mode():
                scores = answer_logps(model, collate([("forget", row) for row in rows], pad_id=0).to(device))
            found["index"] += [row.index for row in rows]
            found["logp"] += scores.sum_B().double().tolist()
        return found


@lru_cache(maxsize=1)
def _target(path: str, revision: str | None, trust_remote_code: bool, device_name: Device) -> tuple[torch.nn.Module, torch.device]:
    device = torch_device(device_name)
    return load_model(path, revision=revision, trust_remote_code=trust_remote_code).eval().to(device), device


def reference_logps(
    model: str, store: Path, *, cache: Path, revision: str | None, trust_remote_code: bool, model_key: str, device: Device
) -> Path:
    """The .npy file (float64, one number per row of `store`), made unless the cache holds it for this model and these rows."""
    path = cache / "reference" / f"{digest([model_key, store.name], length=20)}.npy"
    if pull_file(path):
        return path
    num_rows = len(TokenStore.open(store))
    num_batches = -(-num_rows // ROWS_PER_BATCH)
    batches = ray.data.from_items([{"batch": i} for i in range(num_batches)], override_num_blocks=min(num_batches, 4))
    scored = batches.map_batches(
        ScoreRows(place_of(model), place_of(store), revision, trust_remote_code, device),
        batch_size=1,
        num_cpus=1,
        num_gpus=1 if device == "gpu" else 0,
    ).take_all()
    logps_R = np.full(num_rows, np.nan)
    for row in scored:
        logps_R[row["index"]] = row["logp"]
    if not np.isfinite(logps_R).all():
        raise ArithmeticError("the target gives some forget rows a log-probability that is not finite; check the model's weights")
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_suffix(f".tmp{id(logps_R)}.npy")
    np.save(staging, logps_R, allow_pickle=False)
    staging.replace(path)
    push(path)
    return path
