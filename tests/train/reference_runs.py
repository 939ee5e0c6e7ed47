"""Ranks that score a stored target, and what each of them read, held and found, for the tests of the reference log-probabilities."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import soul.train.job
from soul.batch import collate
from soul.data.store import TokenStore, finish_store, write_part
from soul.models.load import save_model
from soul.models.scoring import answer_logps
from soul.models.stored import StoredWeights
from soul.models.tiny import tiny_tokenizer
from soul.objectives.methods import NPO
from soul.optim.configs import AdamWConfig
from soul.train.config import TrainConfig
from soul.train.engine import Engine, EngineConfig, unwrap
from soul.train.engines import make_engine
from soul.train.job import TrainJob, _builders
from soul.train.reference import NonFiniteReference, make_reference, score_rows
from soul.train.sharding import decoder_blocks
from tests.train.loop_runs import ragged

NUM_ROWS = 37  # three batches, so that the second of two ranks has none in the last turn
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2, "vocab_size": 300}
LORA_RANK = 2


def write_target(root: Path) -> None:
    """A small Llama in several files, and token stores."""
    tokenizer = tiny_tokenizer(["a b c"], 300)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    save_model(root / "target", model, tokenizer)
    model.save_pretrained(root / "target", max_shard_size="50KB")
    (root / "target" / "model.safetensors").unlink()
    for split, rows in (("forget", ragged(1, NUM_ROWS)), ("retain", ragged(2, 9))):
        write_part(root / split / "part-00000.arrow", ((row.ids, row.num_prompt) for row in rows))
        finish_store(root / split)


def job_in(root: Path, run_dir: Path, *, lora_rank: int | None = None, **engine: Any) -> TrainJob:
    return TrainJob(
        model=str(root / "target"),
        export=str(run_dir / "model"),
        run_dir=str(run_dir),
        method=NPO(),
        optimizer=AdamWConfig(learning_rate=0.05),
        train=TrainConfig(epochs=1, max_steps=2, batch_size=4, micro_batch_size=2, lora_rank=lora_rank, eval_every=0),
        engine=EngineConfig(**engine).decided("cpu"),
        stores={split: (str(root / split),) for split in ("forget", "retain")},
        reference=str(run_dir / "reference" / "numbers.npy"),
    )


def forget(root: Path) -> TokenStore:
    return TokenStore.open(root / "forget")


def alive() -> int:
    """Bytes of the tensors of this process."""
    tensors = [item for item in gc.get_objects() if isinstance(item, torch.Tensor) and not item.is_meta]
    plain = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in plain}.values())


@dataclass
class Reading:
    """Bytes that were read from model files, in all and at once."""

    total: int = 0
    largest: int = 0


@contextmanager
def watched() -> Iterator[Reading]:
    """While open, nobody loads a whole model, and every tensor that is read is counted."""
    found, read, load = Reading(), StoredWeights.__getitem__, soul.train.job.load_model

    def counted(weights: StoredWeights, name: str) -> torch.Tensor:
        value = read(weights, name)
        found.total, found.largest = found.total + value.nbytes, max(found.largest, value.nbytes)
        return value

    def refuse(*args: object, **kwargs: object) -> Any:
        raise AssertionError("a whole model is loaded")

    StoredWeights.__getitem__, soul.train.job.load_model = counted, refuse  # type: ignore[method-assign, assignment]
    try:
        yield found
    finally:
        StoredWeights.__getitem__, soul.train.job.load_model = read, load  # type: ignore[method-assign]


def peak_of_scoring(engine: Engine, store: TokenStore) -> int:
    """The most bytes alive when the last block has computed, beyond those that the engine holds."""
    before, peak = alive(), 0

    def weigh(*args: object) -> None:
        nonlocal peak
        peak = max(peak, alive() - before)

    handle = decoder_blocks(unwrap(engine.model))[-1].register_forward_hook(weigh)
    score_rows(engine, store, "forget")
    handle.remove()
    return peak


def prepared(job: TrainJob, rank: int = 0, world: int = 1) -> Engine:
    engine = make_engine(job.engine, rank=rank, world=world, local_rank=rank)
    engine.prepare(*_builders(job))
    return engine


def two_steps(engine: Engine, store: TokenStore) -> None:
    """Move everything that is trained."""
    engine.model.train()
    for _ in range(2):
        batch = collate([("forget", store.row(i)) for i in range(4)], pad_id=0).to(engine.device)
        with engine.autocast():
            loss = answer_logps(engine.model, batch).logps_N.sum() / engine.world
        engine.backward(loss, last=True)
        engine.step()


def adapted_scores(engine: Engine, store: TokenStore) -> list[float]:
    """Of the first rows, adapters on."""
    engine.model.eval()
    with torch.no_grad(), engine.autocast():
        found = answer_logps(engine.model, collate([("forget", store.row(i)) for i in range(4)], pad_id=0)).sum_B()
    return [float(value) for value in found]


def weights_digest(engine: Engine) -> str:
    """Of all weights by name; on rank 0."""
    hashed = hashlib.sha256()
    for name, entry in engine.iter_full_state():
        hashed.update(name.encode() + entry.param.contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def module_digest(model: nn.Module) -> str:
    hashed = hashlib.sha256()
    for name, value in model.named_parameters():
        hashed.update(name.encode() + value.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def label(settings: Mapping[str, Any]) -> str:
    return ", ".join([settings["name"], *(f"{key} {value}" for key, value in settings.items() if key != "name")])


def scored(rank: int, world: int, folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    """An engine's numbers, twice, and what it read; with adapters, their numbers before and after they were trained."""
    root, store = Path(folder), forget(Path(folder))
    run_dir = root / f"{label(settings)}, {world}"
    job = job_in(root, run_dir, num_workers=world, **settings)
    with watched() as reading:
        engine = prepared(job, rank, world)
    make_reference(engine, job.source)
    assert job.reference is not None
    results = {
        "file": Path(job.reference).read_bytes(),
        "again": score_rows(engine, store, "forget").tolist(),
        "reading": reading,
        "weights": weights_digest(engine),
    }
    if settings["name"] in ("ddp", "fsdp") and "lora_rank" not in settings and world > 1:
        results["scoring"] = peak_of_scoring(engine, store)
    if "lora_rank" in settings:
        start = adapted_scores(engine, store)
        two_steps(engine, store)
        results |= {"trained": score_rows(engine, store, "forget").tolist(), "adapters": (start, adapted_scores(engine, store))}
    return results


def refused(rank: int, world: int, folder: str, name: str) -> str:
    """The error of a target that is broken."""
    root = Path(folder)
    job = replace(job_in(root, root / f"broken-{name}", name=name, num_workers=world), model=str(root / "broken"))
    try:
        make_reference(prepared(job, rank, world), job.source)
    except NonFiniteReference as error:
        assert not list((root / f"broken-{name}").glob("**/*"))
        return str(error)
    return "no error"
