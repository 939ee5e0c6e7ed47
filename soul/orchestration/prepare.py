"""Target and retrained model: given, or trained here and cached by a hash of data, model and settings.

A tiny model from scratch also learns the two world sets (it has no pre-training to know them from); they are never in the retain
batches of unlearning, so they show collateral damage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from soul.config import Config, prepare_key
from soul.data.sources import Benchmark
from soul.data.store import TokenStore
from soul.models.load import check_model_folder, save_model
from soul.models.stored import commit_of
from soul.models.tiny import KEPT_SPLITS, WORLD_SETS, kept_texts, tiny_model, tiny_tokenizer
from soul.objectives.methods import Finetune
from soul.orchestration.progress import Display
from soul.orchestration.train import fit
from soul.rundir import RunDir, digest
from soul.store import attach, discard, local, place_of, publish, pull, skim
from soul.train.config import RECIPE
from soul.train.engine import EngineConfig
from soul.train.job import TrainJob

Kind = Literal["target", "retrained"]
WEIGHTS = ".safetensors"  # what only processes that compute with a model need of it
STAMPED = (WEIGHTS, ".bin", ".json", ".jinja", ".model", ".txt", ".py")


@dataclass(frozen=True)
class Prepared:
    """A model folder or hub id, and a key that names its weights. `revision`: the hub's commit, where it is known."""

    path: str
    key: str
    revision: str | None = None


def given_model(path: str, revision: str | None = None) -> Prepared:
    """A model that was made elsewhere; new weights under an old name are another model. A branch of a hub id is named by its commit."""
    folder = Path(path)
    if folder.is_dir():
        return Prepared(path, f"{place_of(folder.resolve())} {weights_stamp(folder)}")
    found = commit_of(path, revision) or revision
    return Prepared(path, path if found is None else f"{path}@{found}", found)


def weights_stamp(folder: Path) -> str:
    """Names weights, tokenizer and settings in a folder, wherever it lies, without reading them."""
    files = sorted(item for ending in STAMPED for item in folder.glob(f"*{ending}"))
    return str([(item.name, item.stat().st_size, item.stat().st_mtime_ns) for item in files])


def starting_model(config: Config, benchmark: Benchmark, cache: Path) -> str:
    """What training starts from: the given model, or a tiny Llama with random weights and a tokenizer made of what is to be kept."""
    if config.model.path is not None:
        given = local(config.model.path)
        check_model_folder(given)
        return given
    prints = [printed for split, printed in benchmark.fingerprints().items() if split in KEPT_SPLITS]
    folder = cache / "init" / digest([RECIPE, prints, config.model.tiny.model_dump(), config.prepare.seed], length=20)
    if not (pull(folder) and (folder / "config.json").is_file()):
        tokenizer = tiny_tokenizer(kept_texts(benchmark.splits), config.model.tiny.vocab_size)
        save_model(folder, tiny_model(config.model.tiny, tokenizer, seed=config.prepare.seed), tokenizer)
        publish(folder)
    return str(folder)


def preparing_engine(config: Config) -> EngineConfig:
    """The run's own engine for a base model; one process for a tiny one, which gains nothing from sharding."""
    if not config.model.finetune:
        return EngineConfig(precision="fp32").decided(config.engine.runs_on)
    return config.engine.model_copy(update={"precision": config.engine.preparing_precision})


def prepared_model(config: Config, kind: Kind, *, start: str, stores: Mapping[str, Path], cache: Path, display: Display) -> Prepared:
    """The target (trained on everything) or the retrained model (on everything but the forget set)."""
    splits = [split for split in ("forget", "retain", *WORLD_SETS) if split in stores]
    if config.model.finetune:
        splits = [split for split in splits if split not in WORLD_SETS]
    if kind == "retrained":
        splits.remove("forget")
    commit = None if Path(start).is_dir() else commit_of(start, config.model.revision)  # a branch may have moved since
    key = prepare_key(config, digest([*(stores[split].name for split in splits), *([commit] if commit else [])]), kind)
    run = RunDir(cache / "models" / key)
    attach(run.path)
    if run.finished("train", key) is not None and skim(run.model, without=WEIGHTS):
        discard(run.checkpoints)
        display.say(f"{kind} model: made before ({run.place})")
        return Prepared(str(run.model), key)
    run.create()
    job = TrainJob(
        model=place_of(start),
        export=place_of(run.model),
        run_dir=run.place,
        method=Finetune(),
        optimizer=config.prepare_optimizer(),
        train=config.prepare_train(sum(len(TokenStore.open(stores[split])) for split in splits)),
        engine=preparing_engine(config),
        stores={"retain": tuple(place_of(stores[split]) for split in splits)},
        revision=config.model.revision,
        trust_remote_code=config.model.trust_remote_code,
    )
    fit(job, name="train", on_progress=lambda step, total: display.update(f"train {kind} model", step, total))
    run.finish("train", key, {"splits": splits})
    skim(run.model, without=WEIGHTS)
    discard(run.checkpoints)
    return Prepared(str(run.model), key)
