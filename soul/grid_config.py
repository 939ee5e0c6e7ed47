"""The settings of a grid: which cells, how they are searched, and everything that its runs have in common."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from soul.benchmarks.grid import TINY_MODELS, Cell, Choice, Search, Trial, cells_of, grid_choices, random_choices, trials_of
from soul.benchmarks.presets import paper_cells
from soul.config import Config, DataConfig, PrepareConfig, expand_short_forms
from soul.evaluate.settings import EvalSettings
from soul.train.config import TrainConfig
from soul.train.engine import EngineConfig

# influence takes one step of its own, with no optimizer to cross it with
MethodName = Literal["ga", "grad_diff", "po", "npo"]
OptimizerName = Literal["adamw", "sophia", "sophia_h", "soul_release", "signum"]
# The furthest a weight of a tiny model may usefully move in a step is larger than a pretrained one's.
RATES_TINY, RATES_PRETRAINED = (2e-5, 4e-3), (1e-6, 5e-5)
WEIGHTS = (0.5, 8.0)


def _of_a_run(name: str) -> Any:
    """A setting that a grid's runs take as it is, described in the same words."""
    field = Config.model_fields[name]
    return FieldInfo(default=field.default, description=field.description)


class GridConfig(BaseModel):
    """A grid of runs."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, validate_default=True)

    preset: Literal["paper", "equal", "quick"] | None = Field(
        None, description="paper: SOUL's cells; equal: the same search for every optimizer; quick: minutes on a laptop (null: none)"
    )
    methods: tuple[MethodName, ...] = Field(("grad_diff", "npo"), min_length=1, description="unlearning objectives")
    optimizers: tuple[OptimizerName, ...] = Field(("adamw", "sophia"), min_length=1, description="optimizers")
    models: tuple[str, ...] = Field(
        ("tiny",), min_length=1, description=f"targets: {', '.join(TINY_MODELS)} (trained from scratch), folders or hub ids"
    )
    seeds: int = Field(1, ge=1, description="runs of every cell with each choice of settings, from --seed on")
    search: Search = Field(
        "grid", description="grid: all combinations of the settings below; random: --trials of each cell; asha: random, stopped early"
    )
    trials: int = Field(8, ge=1, description="choices of settings per cell that random and asha try; the same number for every optimizer")
    learning_rates: tuple[float, ...] = Field((), description="values for grid, the two ends of a range for random and asha")
    retain_weights: tuple[float, ...] = Field((), description="values for grid, the two ends of a range for random and asha")
    learning_rate_scale: float = Field(1.0, gt=0, description="multiplies the learning rates of the paper preset, which are for 7B models")
    utility_floor: float = Field(0.9, ge=0, le=1, description="share of the target's retain score that a choice must keep to be selected")
    max_concurrent: int | None = Field(None, ge=1, description="runs at a time (null: as many as the cluster has room for)")
    isolated: bool = Field(False, description="every run in processes of its own (Ray Train): comparable peak memory, 10 s more each")
    finetune: bool = Field(False, description="models are base models: fine-tune them on the data first")
    retrained: str | None = Field(
        None, min_length=1, description="gold standard of the one model that is given by path: a folder, a run directory or a log"
    )
    allow_mismatch: bool = Field(False, description="compare with a gold standard of other rows, tokenizer or template all the same")
    report: bool = Field(False, description="only rebuild the report of what has run so far")
    data: DataConfig = _of_a_run("data")
    prepare: PrepareConfig = _of_a_run("prepare")
    train: TrainConfig = _of_a_run("train")
    engine: EngineConfig = _of_a_run("engine")
    evaluate: EvalSettings = _of_a_run("evaluate")
    output: str = Field("runs/grid", min_length=1, description="folder or URI of the grid: trials/, cache/, tune/ and the report")
    cache: str | None = Field(None, min_length=1, description="target and retrained models made before (null: cache in the grid's folder)")
    address: str | None = _of_a_run("address")
    samples: bool = Field(False, description="show one generated answer per method in the report; it quotes the data")
    wandb: str | None = _of_a_run("wandb")
    progress: bool = _of_a_run("progress")
    verbose: bool = _of_a_run("verbose")

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, values: Any) -> Any:
        return expand_short_forms(values, defaults=False) if isinstance(values, dict) else values

    @field_validator("methods", "optimizers", "models")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(names))

    @field_validator("data")
    @classmethod
    def _data_of_the_benchmark(cls, data: DataConfig) -> DataConfig:
        return data.for_benchmark("tofu")

    @model_validator(mode="after")
    def _runs_are_valid(self) -> Self:
        if self.search != "grid":
            for name in ("learning_rates", "retain_weights"):
                ends = getattr(self, name)
                if ends and (len(ends) != 2 or not 0 < ends[0] <= ends[1]):
                    raise ValueError(
                        f"{name} of a {self.search} search are the two ends of a range, got {len(ends)} value(s). Give low,high."
                    )
        if self.preset != "paper" and self.learning_rate_scale != 1.0:
            raise ValueError("learning_rate_scale belongs to the paper preset. Remove it, or set preset (--preset) to paper.")
        if self.retrained is not None and len([model for model in self.models if model not in TINY_MODELS]) != 1:
            raise ValueError("retrained belongs to one model given by path. Name exactly one such model, or remove it.")
        if self.search == "asha" and self.runs_alone:
            raise ValueError("an asha search needs runs that share processes. Remove isolated, and use the engine single.")
        for cell, choices in self.cells().items():
            try:
                self.run_config(Trial(cell, choices[0], self.train.seed))
            except ValidationError as error:
                first = error.errors(include_url=False, include_input=False, include_context=False)[0]
                place = ".".join(str(part) for part in first["loc"])
                raise ValueError(f"the runs of {cell.slug} are not possible: {place} {first['msg']}") from None
        return self

    @property
    def runs_alone(self) -> bool:
        """Whether every run is a Ray Train run of its own: where asked for, and where ranks have to find each other."""
        return self.isolated or self.engine.num_workers > 1 or self.engine.name != "single"

    def cells(self) -> dict[Cell, list[Choice]]:
        """Every cell with the choices of settings that it tries."""
        if self.preset == "paper":
            return paper_cells(self.models, learning_rate_scale=self.learning_rate_scale)
        cells = cells_of(self.models, self.methods, self.optimizers)
        if self.search == "grid":
            return {cell: grid_choices(cell, learning_rates=self.learning_rates, retain_weights=self.retain_weights) for cell in cells}
        return {
            cell: random_choices(
                cell, self.trials, learning_rates=self._rates(cell.model), retain_weights=_ends(self.retain_weights, WEIGHTS)
            )
            for cell in cells
        }

    def _rates(self, model: str) -> tuple[float, float]:
        return _ends(self.learning_rates, RATES_TINY if model in TINY_MODELS else RATES_PRETRAINED)

    def all_trials(self) -> list[Trial]:
        return list(trials_of(self.cells(), seeds=self.seeds, first_seed=self.train.seed))

    def describe(self) -> list[str]:
        """One line per run: its folder and what is special about it."""
        trials = self.all_trials()
        width = max(len(trial.id) for trial in trials)
        lines = [f"{trial.id:<{width}}  {trial.choice.words or 'default settings'}" for trial in trials]
        return [f"{len(trials)} runs of {len(self.cells())} cells in {self.output}/trials", *lines]

    def run_config(self, trial: Trial) -> Config:
        """The config of one run, in its folder under trials/."""
        name = trial.cell.model
        model: dict[str, Any] = (
            {"tiny": TINY_MODELS[name]}
            if name in TINY_MODELS
            else {"path": name, "finetune": self.finetune, "retrained": self.retrained, "allow_mismatch": self.allow_mismatch}
        )
        return Config.model_validate(
            {
                "data": self.data.model_dump(),
                "model": model,
                "prepare": self.prepare.model_dump(),
                **trial.sections(),
                "train": {**self.train.model_dump(exclude_unset=True), "seed": trial.seed},
                "engine": self.engine.model_dump(exclude_unset=True),
                "evaluate": self.evaluate.model_dump(),
                "output": f"{self.output.rstrip('/')}/trials/{trial.id}",
                "cache": self.cache or f"{self.output.rstrip('/')}/cache",
                "samples": self.samples,
                "progress": False,
            }
        )


def _ends(given: tuple[float, ...], default: tuple[float, float]) -> tuple[float, float]:
    return (given[0], given[1]) if given else default
