"""What the runs of a grid share: token stores, target and retrained model, their evaluations.

Made once by the driver, in the cache; a trial asks for the same things and finds them there. A trial must never have to make one: that
would need a CPU beside its own. Reference log-probabilities are the exception: the engine of the trial that needs them first makes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

from soul.config import Config, DataConfig
from soul.evaluate.eval_log import EvalLog
from soul.models.tiny import WORLD_SETS
from soul.orchestration.data import Sources, cache_of, open_sources, trained_splits
from soul.orchestration.evaluate import Asked, Judge, Judged, judge_together
from soul.orchestration.gold import given_standard
from soul.orchestration.parallel import run_together
from soul.orchestration.prepare import Prepared, given_model, prepared_model, starting_model
from soul.orchestration.progress import Display
from soul.orchestration.tokens import token_settings, tokenise


@dataclass(frozen=True)
class Shared:
    """One run's view of what it shares. `inputs` names data and models, as the marker of a finished run wants it."""

    sources: Sources
    start: str
    stores: dict[str, Path]

    def inputs(self, config: Config) -> list[object]:
        return [
            self.sources.fingerprints(),
            self.sources.benchmark.fingerprints(),
            given_model(self.start, config.model.revision).key,
            repr(standard(config)),
        ]


def standard(config: Config) -> Prepared | EvalLog | None:
    return None if config.model.retrained is None else given_standard(config.model.retrained)


@lru_cache(maxsize=8)
def _sources(data: str, benchmark: str, seed: int) -> Sources:
    return open_sources(DataConfig.model_validate_json(data).for_benchmark(benchmark), benchmark=benchmark, seed=seed)


def share(config: Config, sources: Sources | None = None) -> Shared:
    """Rows, starting model and token stores of a run; all of them are cached. A trial is handed its rows: its node may not have them."""
    if sources is None:
        sources = _sources(config.data.model_dump_json(), config.benchmark, config.train.seed)
    start = starting_model(config, sources.benchmark, cache_of(config))
    settings = token_settings(config.data, config.model, start)
    wanted = {"forget", "retain", *trained_splits(config)} | (set(WORLD_SETS) & set(sources.rows))
    stores = {split: tokenise(sources.rows[split], split, settings, cache=cache_of(config)) for split in sorted(wanted)}
    return Shared(sources, start, stores)


def kinds_of(config: Config) -> tuple[Literal["target", "retrained"], ...]:
    """The models that are trained before a run; none where both are given."""
    return () if not config.makes_target else ("target", "retrained") if config.makes_retrained else ("target",)


def model_of(config: Config, kind: Literal["target", "retrained"], shared: Shared, display: Display) -> Prepared:
    return prepared_model(config, kind, start=shared.start, stores=shared.stores, cache=cache_of(config), display=display)


def target_of(config: Config, shared: Shared, display: Display) -> Prepared:
    return model_of(config, "target", shared, display) if config.makes_target else given_model(shared.start, config.model.revision)


def retrained_of(config: Config, shared: Shared, display: Display) -> Prepared | EvalLog | None:
    return model_of(config, "retrained", shared, display) if config.makes_retrained else standard(config)


def judge_shared(config: Config, shared: Shared, display: Display) -> tuple[Judged, EvalLog | None]:
    """Target and retrained model, evaluated on the run's rows."""
    asked, retrained = _asked(config, shared, display), standard(config)
    judged = [judge.judge(model) for judge, model in asked]
    return judged[0], judged[1].log if len(judged) > 1 else retrained if isinstance(retrained, EvalLog) else None


def _asked(config: Config, shared: Shared, display: Display) -> list[tuple[Judge, Asked]]:
    """The target, and the retrained model where it is one, with who judges them."""
    judge = Judge(config, shared.sources, display, num_examiners=config.engine.num_workers)
    target, retrained = target_of(config, shared, display), retrained_of(config, shared, display)
    models = {"target": target} | ({"retrained": retrained} if isinstance(retrained, Prepared) else {})
    return [
        (judge, Asked(kind, model.path, model.key, cache_of(config) / "evaluations", revision=model.revision))
        for kind, model in models.items()
    ]


def make_shared(configs: Sequence[Config], display: Display, *, trainings: int, room: int) -> list[Shared]:
    """Everything that these runs share; returns each one's view of it. `trainings` at a time; `room`: examiners at a time."""
    views = [share(config) for config in configs]
    firsts = {config.model.model_dump_json(): (config, view) for config, view in reversed(list(zip(configs, views, strict=True)))}
    models = [partial(model_of, config, kind, view, display) for config, view in firsts.values() for kind in kinds_of(config)]
    run_together(models, slots=trainings)
    judge_together([asked for config, view in firsts.values() for asked in _asked(config, view, display)], room=room)
    return views
