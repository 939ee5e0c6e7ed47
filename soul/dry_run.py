"""`--dry-run`: the resolved settings, the batch arithmetic and the memory of one worker, without Ray and without training.

It opens the data to count rows; the model is counted from its config on the meta device, so no weight is read.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import yaml

from soul.config import Config
from soul.data.columns import ColumnMap
from soul.device import Device, num_gpus_here
from soul.plan import Machine, ModelShape, Plan, plan_run, shape_of, shortages, tiny_shape
from soul.records import InputError
from soul.report.numbers import memory
from soul.store import COPIES_VARIABLE, copies, is_uri, local
from soul.train.config import TrainConfig

# English text has about four characters a token; three leave a margin.
CHARACTERS_PER_TOKEN = 3
TEMPLATE_TOKENS = 32
CHECKED_ROWS = 1000


@dataclass(frozen=True, slots=True)
class Rows:
    """What a plan has to know of the data. `longest` is the most characters of a question with its answer."""

    num_forget: int
    num_retain: int
    longest: int


def dry_run(config: Config) -> str:
    """Everything there is to say before a run.

    Raises:
        InputError: the data cannot be opened, or has fewer rows than a step takes.
    """
    rows = count_rows(config)
    shape, limit, reason = model_shape(config)
    guess = rows.longest // CHARACTERS_PER_TOKEN + TEMPLATE_TOKENS
    length = min(value for value in (guess, config.data.max_length, limit) if value is not None)
    decided = config.decided(likely_device(config))
    plan = plan_run(decided, num_forget=rows.num_forget, num_retain=rows.num_retain, shape=shape, max_length=length)
    sections = [
        "# settings (a file for --config)",
        yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True).rstrip(),
        "",
        *table("batches", batch_lines(config, plan, rows)),
        "",
    ]
    if shape is None:
        sections += [f"# memory of one worker: unknown, because {reason}"]
    else:
        engine = decided.engine
        title = (
            f"memory of one worker ({engine.name} on {engine.device}, {engine.precision}, {engine.num_workers} worker(s), rows of at most "
            f"about {length} tokens)"
        )
        lines = [(item.name, memory(item.num_bytes) + (" in CPU memory" if item.on_cpu else "")) for item in plan.memory]
        lines.append(("together", memory(plan.memory_bytes)))
        sections += table(title, [("parameters", f"{shape.num_params:,}"), *lines])
        sections += ["", *table("what is written", disk_lines(config, plan))]
    warnings = list(config.warnings())
    if config.address is None:  # nobody knows the machines of a cluster before it is joined
        warnings += shortages(plan, this_machine(), num_workers=config.engine.num_workers)
        if config.engine.device == "gpu" and not num_gpus_here() and not os.environ.get("RAY_ADDRESS"):
            warnings.append("device gpu: torch sees no GPU on this machine, where the run would stop at once.")
    return "\n".join([*sections, *(f"# warning: {text}" for text in warnings)])


def likely_device(config: Config) -> Device:
    """What the run will compute on; a cluster is asked when it is joined, and counts until then as one with GPUs."""
    if config.engine.device != "auto":
        return config.engine.device
    joins = config.address or os.environ.get("RAY_ADDRESS")
    return "gpu" if joins or num_gpus_here() else "cpu"


def this_machine() -> Machine:
    """Memory of the machine this runs on, or of the container, and of its smallest GPU."""
    import torch

    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        host = min(host, int(text))
    gpus = [torch.cuda.get_device_properties(i).total_memory for i in range(num_gpus_here())]
    return Machine(host, min(gpus, default=0))


def count_rows(config: Config) -> Rows:
    """Rows of the forget and the retain split."""
    data = config.data
    assert data.forget is not None  # filled in by the config
    if config.benchmark == "own":
        assert data.retain is not None
        forget = _sizes("forget", data.forget, data.limit_forget, data.columns)
        retain = _sizes("retain", data.retain, data.limit_retain, data.columns)
        return Rows(len(forget), len(retain), max([*forget, *retain], default=0))
    from soul.data.sources import open_benchmark

    opened = open_benchmark(
        data.source,
        forget=data.forget,
        retain=data.retain,
        num_authors=data.num_authors,
        seed=data.seed,
        revision=data.revision,
        limit_forget=data.limit_forget,
        limit_retain=data.limit_retain,
        allow_overlap=data.allow_overlap,
    )
    records = [record for split in ("forget", "retain") for record in opened.splits[split]]
    longest = max(len(record.prompt) + len(record.response) for record in records)
    return Rows(len(opened.splits["forget"]), len(opened.splits["retain"]), longest)


def _sizes(split: str, uri: str, limit: int | None, columns: ColumnMap) -> list[int]:
    """Characters of every row of a file, all its columns together. The first rows are checked, the rest when the run reads them."""
    from soul.data.files import read_rows
    from soul.data.sources import load_split

    load_split(uri, split=split, columns=columns, limit=min(limit or CHECKED_ROWS, CHECKED_ROWS))
    return [sum(len(value) for value in row.values() if isinstance(value, str)) for _, row in islice(read_rows(uri), limit)]


def model_shape(config: Config) -> tuple[ModelShape | None, int | None, str]:
    """The target's sizes and the tokens it takes, or None and why they are not known."""
    model = config.model
    if model.path is None:
        return tiny_shape(model.tiny), model.tiny.max_length, ""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from soul.models.load import check_model_folder

    folder = local(model.path)
    check_model_folder(folder)
    try:
        found = AutoConfig.from_pretrained(folder, revision=model.revision, trust_remote_code=model.trust_remote_code)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(found, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        return None, None, f"the config of {model.path} cannot be read ({type(error).__name__})"
    width = int(getattr(found, "hidden_size", 0))
    try:
        shape = shape_of(
            skeleton,
            hidden_size=width,
            intermediate_size=int(getattr(found, "intermediate_size", None) or 4 * width),
            vocab_size=int(found.vocab_size),
        )
    except InputError as error:
        return None, None, str(error)
    return shape, getattr(found, "max_position_embeddings", None), ""


def batch_lines(config: Config, plan: Plan, rows: Rows) -> list[tuple[str, str]]:
    """The batch arithmetic, from rows to steps to extra passes."""
    train, workers = config.train, config.engine.num_workers
    lines = [
        ("forget rows", f"{rows.num_forget:,}"),
        ("retain rows", f"{rows.num_retain:,}"),
        ("rows of a step", " + ".join(f"{plan.rows_per_step} {split}" for split in plan.splits)),
        ("on each worker", f"{plan.rows_per_worker} of each, as {plan.micro_batches} micro-batch(es) of at most {plan.micro_batch_rows}"),
        ("steps an epoch", f"{plan.steps_per_epoch:,}"),
        ("steps", f"{plan.total_steps:,} ({plan.total_steps / plan.steps_per_epoch:.3g} epochs of the forget rows), {workers} worker(s)"),
        ("warm-up steps", f"{plan.warmup_steps:,}, then {train.schedule}"),
    ]
    if config.optimizer.second_order:
        share = f"{plan.curvature_cost:.0%} more forward and backward passes"
        lines.append(("curvature updates", f"{plan.curvature_updates:,}: about {share}"))
    lines.append(("checkpoints", checkpoint_text(train, plan.checkpoints)))
    if config.makes_target:
        chosen = config.prepare_train(rows.num_forget + rows.num_retain)
        models = "target and retrained model" if config.makes_retrained else "target"
        length = f"{chosen.epochs:,} epochs" if chosen.max_steps is None else f"about {chosen.max_steps:,} steps"
        lines.append((f"before that, {models}", f"{length} of {chosen.batch_size} rows each, unless they are in {config.cache_folder}"))
    return lines


def checkpoint_text(train: TrainConfig, counted: int) -> str:
    """How many, or how often where the clock decides, and how many stay."""
    if not train.saves:
        return "none: a run that is killed starts again"
    if not train.save_minutes:
        return f"{counted:,}, of which the last {train.keep_checkpoints:,} are kept until the run is done"
    beside = f" and {counted:,} at their steps" if counted else ""
    return f"one every {train.save_minutes:g} minutes{beside}; the last {train.keep_checkpoints:,} are kept until the run is done"


def disk_lines(config: Config, plan: Plan) -> list[tuple[str, str]]:
    """Bytes of one checkpoint, of all that is written and of what lies there at once."""
    by_clock = f" and a checkpoint every {config.train.save_minutes:g} minutes" if config.train.save_minutes else ""
    lines = [
        ("one checkpoint", memory(plan.checkpoint_bytes)),
        ("exported model", memory(plan.export_bytes(config))),
        ("in the whole run", memory(plan.written_bytes(config)) + by_clock),
        ("at once, at most", f"{memory(plan.disk_bytes(config))} in {config.output}"),
    ]
    if is_uri(config.output):
        lines.append(("on a node, at most", f"{memory(plan.staging_bytes(config))} in {copies()} ({COPIES_VARIABLE})"))
    return lines


def table(title: str, lines: list[tuple[str, str]]) -> list[str]:
    """Two columns under a title, as YAML comments: the whole output is a config file."""
    width = max(len(name) for name, _ in lines)
    return [f"# {title}", *(f"#   {name:<{width}}  {value}" for name, value in lines)]
