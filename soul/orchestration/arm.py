"""One arm of a run: unlearn the target with one optimizer, into one run directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from soul.config import Config
from soul.objectives.methods import TITLES, needs_reference
from soul.orchestration.checks import needs_on_card
from soul.orchestration.data import cache_of, trained_splits
from soul.orchestration.prepare import WEIGHTS, Prepared
from soul.orchestration.progress import Display
from soul.orchestration.train import fit
from soul.rundir import RunDir, digest
from soul.store import discard, place_of, skim
from soul.train.config import CADENCE, RECIPE
from soul.train.engine import PLACEMENT
from soul.train.job import JobResult, TrainJob
from soul.train.reference import reference_path

# What checkpoints' keys hold of when they are written: always this, so that a run goes on when that is changed, or began with a version
# that knew nothing else.
USUAL_CADENCE = {"save_every": 1, "keep_checkpoints": 2}
DTYPES = {"fp32": "float32", "bf16": "bfloat16", None: None}


def unlearn(
    config: Config, target: Prepared, stores: Mapping[str, Path], display: Display, *, fit: Callable[..., JobResult] = fit
) -> JobResult:
    """Train one arm to its end, or return what a finished one measured. `fit` runs the job: as a Ray Train run, unless told otherwise."""
    run = RunDir.at(config.output)
    splits = trained_splits(config)
    settings = config.model_dump(mode="json", include={"method", "optimizer", "train"})
    settings["train"] = {name: value for name, value in settings["train"].items() if name not in CADENCE} | USUAL_CADENCE
    computed = config.engine.model_dump(mode="json", exclude=set(PLACEMENT))  # a run can be resumed on other workers
    key = digest([RECIPE, settings, computed, target.key, [stores[split].name for split in splits]])
    done: dict[str, Any] | None = run.finished("train", key)
    title = f"{TITLES[config.method.name]} with {config.optimizer.name}"
    if done is not None and skim(run.model, without=WEIGHTS):
        discard(run.checkpoints)
        display.say(f"{title}: done before ({run.place})")
        return JobResult(**done)
    reference = None
    if needs_reference(config.method):
        reference = reference_path(
            cache_of(config),
            model_key=target.key,
            revision=config.model.revision,
            trust_remote_code=config.model.trust_remote_code,
            rows=stores[splits[0]].name,
            engine=config.engine,
        )
    job = TrainJob(
        model=place_of(target.path),
        export=place_of(run.model),
        run_dir=run.place,
        method=config.method,
        optimizer=config.optimizer,
        train=config.train,
        engine=config.engine,
        stores={split: (place_of(stores[split]),) for split in splits},
        reference=None if reference is None else place_of(reference),
        probes={name: place_of(stores[name]) for name in ("forget", "retain")},
        revision=config.model.revision,
        trust_remote_code=config.model.trust_remote_code,
        export_dtype=DTYPES[config.model.export_dtype],
        needs=needs_on_card(config, stores),
    )
    result = fit(job, name=key, on_progress=lambda step, total: display.update(f"unlearn: {title}", step, total))
    run.finish("train", key, dataclasses.asdict(result))
    skim(run.model, without=WEIGHTS)
    discard(run.checkpoints)  # nothing is left to resume
    return result
