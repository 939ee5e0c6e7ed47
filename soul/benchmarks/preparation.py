"""Target and retrained model of a comparison: a tiny Llama trained here, in this process, kept in the output folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from soul.data.chat import ChatFormat
from soul.data.groups import groups_of, halves
from soul.data.refusals import refusal_records
from soul.data.sources import Benchmark, fingerprint
from soul.data.store import finish_store, is_store, write_part
from soul.data.tokenize import token_rows
from soul.device import seen
from soul.models.load import load_tokenizer, save_model
from soul.models.tiny import WORLD_SETS, TinyConfig, kept_texts, tiny_model, tiny_tokenizer
from soul.objectives.methods import Finetune
from soul.optim.configs import OPTIMIZERS
from soul.records import Record
from soul.rundir import digest
from soul.train.config import RECIPE, TrainConfig
from soul.train.engine import EngineConfig
from soul.train.job import TrainJob, run_job
from soul.train.single import SingleEngine

SEED = 0
LEARNING_RATE, WEIGHT_DECAY, BATCH_SIZE = 2e-3, 0.01, 16  # with which a tiny Llama memorises in a thousand steps

Say = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """`key` names the models' weights and rows. `probes` are the token stores of the selection halves; `reference` is where
    the first run that needs it leaves the forget rows' log-probabilities under the target. `shared_groups` are the splits whose halves
    had to share an author.
    """

    key: str
    target: Path
    retrained: Path
    stores: Mapping[str, Path]
    probes: Mapping[str, Path]
    reference: Path
    report_rows: Mapping[str, Sequence[Record]]
    longest_answer: int
    shared_groups: tuple[str, ...] = ()


def prepare(benchmark: Benchmark, folder: Path, *, tiny: TinyConfig, steps: int, say: Say) -> Prepared:
    """Tokenise, train both models for `steps` steps of AdamW, unless `folder` has it all."""
    trained = [split for split in ("forget", "retain", *WORLD_SETS) if split in benchmark.splits]
    prints = benchmark.fingerprints()
    key = digest([RECIPE, [prints[split] for split in trained], tiny.model_dump(), steps, LEARNING_RATE, WEIGHT_DECAY, BATCH_SIZE, SEED])
    root = folder / "models" / key
    start = _start(benchmark, root / "start", tiny)
    evaluated = {"forget": benchmark.splits["forget"], "retain": benchmark.splits.get("retain_eval") or benchmark.splits["retain"]}
    cut = {split: halves(groups_of([record.id for record in records])) for split, records in evaluated.items()}
    rows = {split: benchmark.splits[split] for split in trained}
    rows["refusal"] = refusal_records(benchmark.splits["forget"], seed=SEED)
    stores = {split: _store(records, split, start, root / "tokens", tiny) for split, records in rows.items()}
    chosen = {split: [evaluated[split][row] for row in half.selection] for split, half in cut.items()}
    probes = {split: _store(records, split, start, root / "tokens", tiny) for split, records in chosen.items()}
    for name in ("target", "retrained"):
        used = [stores[split] for split in trained if not (name == "retrained" and split == "forget")]
        if not (root / name / "config.json").is_file():
            say(f"training the {name} model: {steps} steps")
            _memorise(start, used, root / name, steps)
    report_rows = {split: tuple(evaluated[split][row] for row in half.report) for split, half in cut.items()}
    report_rows |= {split: tuple(benchmark.splits[split]) for split in WORLD_SETS if split in benchmark.splits}
    return Prepared(
        key=key,
        target=root / "target",
        retrained=root / "retrained",
        stores=stores,
        probes=probes,
        reference=root / "reference.npy",
        report_rows=report_rows,
        longest_answer=longest_answer(report_rows, root / "target", tiny.max_length),
        shared_groups=tuple(split for split, half in cut.items() if half.share_groups),
    )


def _start(benchmark: Benchmark, folder: Path, tiny: TinyConfig) -> Path:
    """Random weights, and a tokenizer made of what is to be kept."""
    if not (folder / "config.json").is_file():
        tokenizer = tiny_tokenizer(kept_texts(benchmark.splits), tiny.vocab_size)
        save_model(folder, tiny_model(tiny, tokenizer, seed=SEED), tokenizer)
    return folder


def _store(records: Sequence[Record], split: str, model: Path, cache: Path, tiny: TinyConfig) -> Path:
    folder = cache / digest(fingerprint(records))
    if not is_store(folder):
        rows = token_rows(records, split, load_tokenizer(str(model)), ChatFormat(), max_length=tiny.max_length)
        write_part(folder / "part-00000.arrow", [(row.ids, row.num_prompt) for row in rows])
        finish_store(folder, rows=len(rows), split=split)
    return folder


def _memorise(start: Path, stores: Sequence[Path], export: Path, steps: int) -> None:
    job = TrainJob(
        model=str(start),
        export=str(export),
        run_dir=str(export.with_name(f"{export.name}-training")),
        method=Finetune(),
        optimizer=OPTIMIZERS["adamw"](learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY),
        train=TrainConfig(
            epochs=steps,  # the steps end it
            max_steps=steps,
            batch_size=BATCH_SIZE,
            micro_batch_size=BATCH_SIZE,
            warmup_fraction=0.05,
            schedule="cosine",
            seed=SEED,
            eval_every=0,
        ),
        engine=EngineConfig(precision="fp32").decided(seen()),
        stores={"retain": tuple(map(str, stores))},
    )
    run_job(job, SingleEngine(job.engine), resume_from=None, save_checkpoint=lambda engine, progress: None)


def longest_answer(splits: Mapping[str, Sequence[Record]], model: Path, max_length: int) -> int:
    """Tokens of the longest reference answer, EOS included: what a generation cap has to leave room for."""
    tokenizer = load_tokenizer(str(model))
    rows = [row for split, records in splits.items() for row in token_rows(records, split, tokenizer, ChatFormat(), max_length=max_length)]
    return max(row.num_supervised for row in rows)
