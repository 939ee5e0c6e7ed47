"""The settings of a run: the sections that live beside their owners, assembled, with the rules that hold across them.

The same words work in Python (`Config(method={"name": "npo", "beta": 0.2})`), in YAML (soul/settings.py) and as flags (soul/flags.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError
from pydantic_core.core_schema import ValidationInfo

from soul.data.settings import DataConfig as DataConfig  # part of this module's interface
from soul.device import Device, Wanted
from soul.evaluate.settings import EvalSettings
from soul.models.tiny import TinyConfig
from soul.objectives.methods import NPO, Influence, MethodConfig
from soul.optim.configs import OPTIMIZERS, OneShotConfig, OptimizerConfig
from soul.rundir import digest
from soul.store import local
from soul.train.config import RECIPE, TrainConfig
from soul.train.curvature import hessian_splits
from soul.train.engine import EngineConfig, Precision

# What a section means when it is one word instead of a mapping: `method: npo`, `--model DIR`.
SHORT_FORM = {"data": "source", "model": "path", "method": "name", "optimizer": "name", "engine": "name"}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, validate_default=True)


class ModelConfig(_Section):
    """Which model forgets."""

    path: str | None = Field(
        None, min_length=1, description="target: a Hugging Face folder or hub id (null: train a tiny Llama from scratch on the data)"
    )
    retrained: str | None = Field(
        None,
        min_length=1,
        description="gold standard trained without the forget set: a model folder, a run directory or a published log (.json, .json.gz)",
    )
    allow_mismatch: bool = Field(False, description="compare with a gold standard of other rows, tokenizer or template all the same")
    finetune: bool = Field(False, description="path is a base model: fine-tune it on the data to make the target (and the retrained model)")
    tiny: TinyConfig = Field(TinyConfig(), description="shape of the tiny Llama that is trained when no path is given")
    revision: str | None = Field(None, min_length=1, description="branch, tag or commit of a hub id (null: its main branch)")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model; only for models you trust")
    export_dtype: Literal["fp32", "bf16"] | None = Field(
        None, description="type of the saved weights (null: the type the target was saved in)"
    )

    @model_validator(mode="after")
    def _path_for_what_needs_one(self) -> Self:
        for name in ("finetune", "revision", "trust_remote_code"):
            if getattr(self, name) and self.path is None:
                raise ValueError(f"{name} needs a model path, got none. Set model.path (--model) to a folder or a hub id.")
        return self


class Preparation(_Section):
    """The settings with which target and retrained model are trained; every choice made."""

    learning_rate: float
    epochs: int
    max_steps: int | None
    batch_size: int
    warmup_fraction: float
    schedule: Literal["linear", "cosine", "constant"]
    weight_decay: float
    seed: int


# The tiny Llama memorises a few hundred rows in a thousand steps, more rows in about thirty passes (first measurements); fine-tuning
# follows TOFU, arXiv 2401.06121.
TINY_RATE = 5e-4  # of the rates tried on invented authors, the one at which NPO forgets and keeps under Sophia and AdamW alike
FROM_SCRATCH_STEPS, FROM_SCRATCH_PASSES = 1000, 30
FROM_SCRATCH: dict[str, Any] = {"learning_rate": 2e-3, "epochs": 10**6, "max_steps": None, "batch_size": 16} | {
    "warmup_fraction": 0.05,
    "schedule": "cosine",
}
FROM_BASE: dict[str, Any] = {"learning_rate": 1e-5, "epochs": 5, "max_steps": None, "batch_size": 32} | {
    "warmup_fraction": 0.2,
    "schedule": "linear",
}


class PrepareConfig(_Section):
    """How target and retrained model are made, where they are not given. null: the mode's own default, named in the description."""

    learning_rate: float | None = Field(None, gt=0, description="peak learning rate (null: 2e-3 from scratch, 1e-5 with finetune)")
    epochs: int | None = Field(
        None, ge=1, description="passes over the data (null: from scratch 30, and as many as make 1000 steps; 5 with finetune)"
    )
    max_steps: int | None = Field(None, ge=1, description="optimizer steps (null: what the epochs take)")
    batch_size: int | None = Field(None, ge=1, description="rows per optimizer step (null: 16 from scratch, 32 with finetune)")
    warmup_fraction: float | None = Field(
        None, ge=0, lt=1, description="share of warm-up steps (null: 0.05 from scratch, 0.2 with finetune)"
    )
    schedule: Literal["linear", "cosine", "constant"] | None = Field(
        None, description="decay (null: cosine from scratch, linear with finetune)"
    )
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay of AdamW")
    seed: int = Field(0, ge=0, description="initial weights and data order; apart from the run's seed, so that seeds share one target")

    def resolved(self, *, finetune: bool) -> Preparation:
        """Every null replaced by its mode's default."""
        defaults = FROM_BASE if finetune else FROM_SCRATCH
        return Preparation(**{**defaults, **{name: value for name, value in self.model_dump().items() if value is not None}})


class Config(_Section):
    """A whole run: prepare, train, evaluate, report."""

    benchmark: Literal["tofu", "own"] = Field("tofu", description="tofu: splits by name, with TOFU's metrics; own: files of your own")
    data: DataConfig = Field(DataConfig(), description="where the rows come from")
    model: ModelConfig = Field(ModelConfig(), description="which model forgets")
    prepare: PrepareConfig = Field(PrepareConfig(), description="how target and retrained model are trained where they are not given")
    method: MethodConfig = Field(NPO(), description="unlearning objective")
    optimizer: OptimizerConfig = Field(OPTIMIZERS["sophia"](), description="optimizer that minimises it")
    train: TrainConfig = Field(TrainConfig(), description="schedule and batches of unlearning")
    engine: EngineConfig = Field(EngineConfig(), description="where the model lives while it trains")
    evaluate: EvalSettings = Field(EvalSettings(), description="what is measured")
    output: str = Field("runs/tofu", min_length=1, description="run directory: a folder or a URI such as s3://bucket/run")
    cache: str | None = Field(
        None, min_length=1, description="target and retrained models made before (null: .cache beside the run directory)"
    )
    address: str | None = Field(
        None, min_length=1, description="Ray cluster to join (null: RAY_ADDRESS if set, else a local Ray for this run)"
    )
    twin: str | None = Field(None, description=f"a second optimizer to run beside and compare with: {', '.join(OPTIMIZERS)} (null: none)")
    twin_learning_rate: float | None = Field(None, gt=0, description="learning rate of the twin (null: its optimizer's default)")
    resume: bool = Field(False, description="continue the run that the output folder holds")
    samples: bool = Field(False, description="write the first generated answers to samples.jsonl; they quote the data")
    wandb: str | None = Field(None, min_length=1, description="Weights & Biases project that receives the metrics (null: none)")
    progress: bool = Field(True, description="show progress on the terminal")
    verbose: bool = Field(False, description="log more, and show tracebacks of bad input")

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return with_tiny_rate(expand_short_forms(with_one_shot(expand_short_forms(values, defaults=False))))

    @field_validator("data")
    @classmethod
    def _data_of_the_benchmark(cls, data: DataConfig, info: ValidationInfo) -> DataConfig:
        return data.for_benchmark(info.data.get("benchmark", "tofu"))

    @field_validator("engine")
    @classmethod
    def _engine_for_the_workers(cls, engine: EngineConfig) -> EngineConfig:
        if engine.num_workers == 1 or engine.name != "single":
            return engine
        if "name" not in engine.model_fields_set:
            return engine.model_copy(update={"name": "fsdp"})
        raise ValueError(f"engine single has one worker, got num_workers {engine.num_workers}. Choose ddp or fsdp, or one worker.")

    @field_validator("twin")
    @classmethod
    def _known_twin(cls, twin: str | None) -> str | None:
        if twin is not None and twin not in OPTIMIZERS:
            raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": " or ".join(map(repr, OPTIMIZERS))})
        return twin

    @model_validator(mode="after")
    def _across_sections(self) -> Self:
        self.engine.check_adapters(self.train.lora_rank)
        self._check_one_shot()
        for optimizer in (self.optimizer, *(() if self.twin is None else (OPTIMIZERS[self.twin](),))):
            self.engine.check_estimator(optimizer.name, optimizer.estimator)
            hessian_splits(self.method, optimizer)
        if self.twin == self.optimizer.name:
            raise ValueError(f"twin must be another optimizer than {self.optimizer.name}. Choose one of {_others(self.optimizer.name)}.")
        if self.twin_learning_rate is not None and self.twin is None:
            raise ValueError("twin_learning_rate needs a twin, got none. Set twin (--twin) as well.")
        if self.benchmark == "own" and self.model.path is None:
            raise ValueError("own data needs a model that has seen it, got none. Set model.path (--model) to a folder or a hub id.")
        return self

    def _check_one_shot(self) -> None:
        """Influence and its step belong together, and nothing else fits between them."""
        if isinstance(self.optimizer, OneShotConfig) and not isinstance(self.method, Influence):
            raise ValueError(f"optimizer one_shot belongs to method influence, got {self.method.name}. Choose one of {_others('')}.")
        if not isinstance(self.method, Influence):
            return
        if not isinstance(self.optimizer, OneShotConfig):
            raise ValueError(f"method influence takes one step of its own, got optimizer {self.optimizer.name}. Remove it (--optimizer).")
        if self.twin is not None:
            raise ValueError(f"method influence takes one step of its own, got twin {self.twin}. Remove it (--twin).")
        if self.engine.max_grad_norm is not None:
            raise ValueError(
                f"method influence sums gradients and clips none, got max_grad_norm {self.engine.max_grad_norm}. Remove "
                "engine.max_grad_norm (--max-grad-norm)."
            )

    def decided(self, device: Device, precision: Precision | None = None) -> Self:
        """What the driver has decided, in place of every auto. `precision`: that of a run that is continued."""
        if self.engine.precision == "auto":
            rounds = self.train.lora_rank is not None and self.engine.name == "deepspeed"  # EngineConfig.check_adapters
            chosen = precision or ("fp32" if rounds else self.engine.precision_on(device))
            return self._with_engine(self.engine.model_copy(update={"precision": chosen}).decided(device))
        return self._with_engine(self.engine.decided(device))

    def _with_engine(self, engine: EngineConfig) -> Self:
        return self.model_copy(update={"engine": engine})

    @property
    def makes_target(self) -> bool:
        """Whether the target has to be trained before it can forget."""
        return self.model.path is None or self.model.finetune

    @property
    def makes_retrained(self) -> bool:
        """Whether the run trains the gold standard itself."""
        return self.makes_target and self.model.retrained is None

    @property
    def preparation(self) -> Preparation:
        return self.prepare.resolved(finetune=self.model.finetune)

    def prepare_train(self, num_rows: int) -> TrainConfig:
        """The preparation on so many rows as the training loop takes it."""
        chosen = self.preparation
        max_steps = chosen.max_steps
        if self.model.path is None and self.prepare.epochs is None and max_steps is None:
            max_steps = max(FROM_SCRATCH_STEPS, FROM_SCRATCH_PASSES * -(-num_rows // chosen.batch_size))
        return TrainConfig(
            save_minutes=self.train.save_minutes,
            epochs=chosen.epochs,
            max_steps=max_steps,
            batch_size=chosen.batch_size,
            micro_batch_size=min(chosen.batch_size, 2 * self.train.micro_batch_size),
            warmup_fraction=chosen.warmup_fraction,
            schedule=chosen.schedule,
            seed=chosen.seed,
            eval_every=0,
        )

    def prepare_optimizer(self) -> OptimizerConfig:
        """AdamW with the preparation's learning rate and weight decay."""
        chosen = self.preparation
        return OPTIMIZERS["adamw"](learning_rate=chosen.learning_rate, weight_decay=chosen.weight_decay)

    def twin_run(self) -> Config | None:
        """The run of the twin optimizer: the same in all else, in a folder beside this one. None without a twin."""
        if self.twin is None:
            return None
        optimizer: dict[str, Any] = {"name": self.twin}
        if self.twin_learning_rate is not None:
            optimizer["learning_rate"] = self.twin_learning_rate
        changed = {"optimizer": optimizer, "twin": None, "twin_learning_rate": None, "output": f"{self.output.rstrip('/')}-{self.twin}"}
        return Config.model_validate({**self.model_dump(), "cache": self.cache_folder, **changed})

    @property
    def cache_folder(self) -> str:
        """Where prepared models are kept: `cache`, or `.cache` beside the run directory."""
        if self.cache is not None:
            return self.cache
        parent, _, _ = self.output.rstrip("/").rpartition("/")
        return f"{parent}/.cache" if parent else ("/.cache" if self.output.startswith("/") else ".cache")

    def warnings(self) -> tuple[str, ...]:
        """What is allowed and probably not meant; for the log of a run."""
        train, workers = self.train, self.engine.num_workers
        found = [] if isinstance(self.optimizer, OneShotConfig) else self.engine.cautions(self.optimizer.learning_rate)
        if workers > train.batch_size:
            found.append(
                f"batch_size {train.batch_size} leaves some of {workers} workers without rows. Raise batch_size or use fewer workers."
            )
        elif train.batch_size % workers:
            found.append(f"batch_size {train.batch_size} does not divide by {workers} workers: some forward a row less in every step.")
        share, chosen = -(-train.batch_size // workers), "micro_batch_size" in train.model_fields_set  # the default is an upper limit
        if chosen and train.micro_batch_size * workers >= train.batch_size + workers:
            found.append(f"micro_batch_size {train.micro_batch_size} is never filled: a worker's share of a batch is {share} row(s).")
        if self.samples:
            found.append("samples writes generated answers, which quote the data, to samples.jsonl.")
        return tuple(found)


class EvaluateConfig(_Section):
    """The measurement of one model, without training."""

    benchmark: Literal["tofu", "own"] = Field("tofu", description="tofu: splits by name, with TOFU's metrics; own: files of your own")
    data: DataConfig = Field(DataConfig(), description="where the rows come from")
    model: ModelConfig = Field(description="which model is measured")
    evaluate: EvalSettings = Field(EvalSettings(), description="what is measured")
    device: Wanted = Field("auto", description="what computes (auto: GPUs where the cluster has or can add some, else CPUs)")
    num_workers: int = Field(1, ge=1, description="workers that share the rows, each with a GPU or a CPU of its own")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="compute precision (auto: bf16 on GPUs, fp32 on CPUs)")
    output: str = Field("runs/evaluate", min_length=1, description="folder or URI that receives results.json and the report")
    address: str | None = Field(
        None, min_length=1, description="Ray cluster to join (null: RAY_ADDRESS if set, else a local Ray for this run)"
    )
    samples: bool = Field(False, description="write the first generated answers to samples.jsonl; they quote the data")
    progress: bool = Field(True, description="show progress on the terminal")
    verbose: bool = Field(False, description="log more, and show tracebacks of bad input")

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, values: Any) -> Any:
        return expand_short_forms(values) if isinstance(values, dict) else values

    @field_validator("data")
    @classmethod
    def _data_of_the_benchmark(cls, data: DataConfig, info: ValidationInfo) -> DataConfig:
        return data.for_benchmark(info.data.get("benchmark", "tofu"))

    @model_validator(mode="after")
    def _model_and_data(self) -> Self:
        if self.model.path is None:
            raise ValueError("model.path: expected a model folder or a hub id, got none.")
        if self.model.finetune:
            raise ValueError("finetune means nothing to an evaluation. Remove it.")
        return self

    def decided(self, device: Device) -> Self:
        """What the driver has decided, in place of every auto."""
        precision = self.precision if self.precision != "auto" else "bf16" if device == "gpu" else "fp32"
        return self.model_copy(update={"device": device, "precision": precision})


def expand_short_forms(values: dict[str, Any], *, defaults: bool = True) -> dict[str, Any]:
    """`method: npo` as `method: {name: npo}`; with `defaults`, a method or optimizer without a name gets the default one's."""
    expanded = dict(values)
    for section, field in SHORT_FORM.items():
        if isinstance(expanded.get(section), str):
            expanded[section] = {field: expanded[section]}
    for section in ("method", "optimizer") if defaults else ():
        given = expanded.get(section)
        if isinstance(given, dict) and "name" not in given:
            expanded[section] = {"name": Config.model_fields[section].default.name, **given}
    return expanded


def with_one_shot(values: dict[str, Any]) -> dict[str, Any]:
    """What method influence brings along where nothing else is given: its optimizer, one pass, no clipping."""
    method = values.get("method")
    if (method.get("name") if isinstance(method, dict) else getattr(method, "name", None)) != "influence":
        return values
    brought: dict[str, dict[str, Any]] = {"optimizer": {"name": "one_shot"}, "train": {"epochs": 1}, "engine": {"max_grad_norm": None}}
    given = {section: values.get(section, {}) for section in brought}
    return {**values, **{section: {**brought[section], **own} if isinstance(own, dict) else own for section, own in given.items()}}


def with_tiny_rate(values: dict[str, Any]) -> dict[str, Any]:
    """The tiny model needs a larger learning rate than a pre-trained one: TINY_RATE where none is given and it is trained here."""
    model, optimizer = values.get("model", {}), values.get("optimizer", {"name": Config.model_fields["optimizer"].default.name})
    path = model.get("path") if isinstance(model, dict) else getattr(model, "path", None)
    if path is not None or not isinstance(optimizer, dict) or "learning_rate" in optimizer or optimizer.get("name") == "one_shot":
        return values
    return {**values, "optimizer": {**optimizer, "learning_rate": TINY_RATE}}


def prepare_key(config: Config, fingerprint: str, kind: Literal["target", "retrained"]) -> str:
    """A name for the model that these settings and the data of this fingerprint produce: equal names, equal models.

    `fingerprint` is of the rows it is trained on. Settings of unlearning do not enter, so all methods and seeds share one target.
    """
    model = config.model
    facts = {
        "recipe": RECIPE,
        "kind": kind,
        "data": fingerprint,
        "format": [config.data.chat, config.data.max_length],
        "start": model.tiny.model_dump() if model.path is None else [model.path, model.revision, _weights_stamp(model.path)],
        "prepare": config.preparation.model_dump() if config.makes_target else None,
        "precision": config.engine.preparing_precision if config.model.finetune else "fp32",  # prepare.preparing_engine
    }
    return digest(facts, length=20)


def _weights_stamp(path: str) -> list[tuple[str, int, int]]:
    """Name, size and time of a local folder's weights, so that new weights under an old name are noticed. Empty for a hub id."""
    files = [item for item in sorted(Path(local(path)).glob("*")) if item.suffix in (".safetensors", ".json")]
    return [(item.name, item.stat().st_size, item.stat().st_mtime_ns) for item in files]


def _others(name: str) -> str:
    return ", ".join(other for other in OPTIMIZERS if other != name)
