"""What can be known of a run before Ray starts, so that a mistake in its input takes seconds and not a training run to show."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from soul.config import Config, EvaluateConfig, ModelConfig
from soul.data.chat import ChatFormat
from soul.data.files import read_rows
from soul.data.store import TokenStore
from soul.data.tokenize import check_tokenizer, tokenize_record
from soul.device import Wanted
from soul.dry_run import likely_device, model_shape
from soul.evaluate.eval_log import EvalLog
from soul.evaluate.plan import EvalPlan, foreseen
from soul.evaluate.same_rows import check_comparable
from soul.models.load import check_model_folder, check_weights, load_tokenizer
from soul.orchestration.cluster import is_local
from soul.orchestration.data import Sources
from soul.orchestration.evaluate import plan_for
from soul.orchestration.prepare import Prepared
from soul.orchestration.tokens import FileSplit, Rows, token_settings
from soul.plan import plan_run
from soul.preflight import check_workers, here, preflight
from soul.train.engine import Need


def check_local_workers(address: str | None, num_workers: int, wanted: Wanted) -> None:
    """A cluster that is joined is asked when it is joined.

    Raises:
        InputError: a local Ray would have fewer CPUs or GPUs.
    """
    if is_local(address):
        device, most = here(wanted)
        check_workers(num_workers, device, most)


def check_model(path: str, model: ModelConfig) -> None:
    """Everything about a model but its weights' values.

    Raises:
        InputError: folder, weights or tokenizer cannot be used.
    """
    check_model_folder(path)
    check_weights(path)
    check_tokenizer(load_tokenizer(path, revision=model.revision, trust_remote_code=model.trust_remote_code))


def check_run(config: Config, sources: Sources, start: str, given: Prepared | EvalLog | None) -> None:
    """Rows against the batch, the model's positions and the disk. Own retain rows are read where they are needed, and checked there.

    Raises:
        InputError: a split has fewer rows than a step takes, a row does not fit into the model, the disk is too small, or the
            gold standard is of other rows.
    """
    settings = token_settings(config.data, config.model, start)
    shape, _, _ = model_shape(config)
    forget = sources.benchmark.splits["forget"]
    num_retain = _at_least(sources.rows["retain"], len(forget))
    likely = config.decided(likely_device(config))
    plan = plan_run(likely, num_forget=len(forget), num_retain=num_retain, shape=shape, max_length=settings.max_length)
    preflight(config, plan, is_local=is_local(config.address))
    tokenizer = load_tokenizer(start, revision=config.model.revision, trust_remote_code=config.model.trust_remote_code)
    chat = ChatFormat(settings.chat)
    for record in forget:
        tokenize_record(record, tokenizer, chat, max_length=settings.max_length, truncate=settings.truncate, split="forget")
    check_standard(config, sources, plan_for(config, sources, start, tokenizer, config.model.revision), given)


def check_standard(config: Config | EvaluateConfig, sources: Sources, plan: EvalPlan, given: Prepared | EvalLog | None) -> None:
    """Whether what --retrained names can be compared with the evaluation in `plan`, before that is made.

    Raises:
        InputError: it is of other rows, or reads them otherwise, and nobody insists.
    """
    if given is None or config.model.allow_mismatch:
        return
    if isinstance(given, Prepared):
        tokenizer = load_tokenizer(given.path, revision=given.revision, trust_remote_code=config.model.trust_remote_code)
        given = foreseen(plan_for(config, sources, given.path, tokenizer, given.revision), given.path)
    check_comparable(foreseen(plan, "this evaluation"), given)


def needs_on_card(config: Config, stores: Mapping[str, Path]) -> tuple[Need, ...]:
    """What a rank of a decided run needs of its card; nothing where it computes on CPUs, or the model's sizes are not known."""
    shape = model_shape(config)[0] if config.engine.runs_on == "gpu" else None
    if shape is None:
        return ()
    opened = {split: TokenStore.open(folder) for split, folder in stores.items() if split in ("forget", "retain", "refusal")}
    longest = max(int(store.lengths_R.max()) for store in opened.values())
    sizes = {"num_forget": len(opened["forget"]), "num_retain": len(opened["retain"])}
    return plan_run(config, **sizes, shape=shape, max_length=longest).needs


def _at_least(rows: Rows, enough: int) -> int:
    """How many rows there are; a file is not read further than `enough`."""
    if not isinstance(rows, FileSplit):
        return len(rows)
    return sum(1 for _ in islice(read_rows(rows.uri), enough if rows.limit is None else min(enough, rows.limit)))
