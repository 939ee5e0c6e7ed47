"""Examiners on Ray: values do not depend on how many there are, or on who of them dies; and what names a kept evaluation."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from soul.config import Config
from soul.evaluate.eval_log import EvalLog
from soul.orchestration.data import open_sources
from soul.orchestration.evaluate import Asked, Judge
from soul.orchestration.examiners import Examiners
from soul.orchestration.progress import Display
from soul.orchestration.trial import judge_here
from tests.orchestration.mini import Finished, mini

QUIET = Display(enabled=False)


def own_pid(_: object) -> int:
    return os.getpid()


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_values_do_not_depend_on_the_number_of_examiners_or_on_their_deaths(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process here, one examiner in the finished run, and two of which the first to work is killed in the middle of its item."""
    import ray

    config = finished.config.decided("gpu")  # which Ray counts, and nobody has
    sources = open_sources(config.data, benchmark=config.benchmark, seed=config.train.seed)
    alone = judge_here(config, sources, str(finished.target), "target", None).log
    kept = [TypeAdapter(EvalLog).validate_json(file.read_bytes()) for file in (Path(config.cache_folder) / "evaluations").glob("*.json")]
    assert alone in kept
    started: list[int] = []
    killed: list[int] = []
    start, ask = Examiners.start, Examiners.ask

    def counted(self: Examiners, seat: int) -> None:
        started.append(seat)
        start(self, seat)

    def struck(self: Examiners, seat: int, item: int) -> None:
        pid = 0 if killed else ray.get(self.on_seat[seat].__ray_call__.remote(own_pid))
        ask(self, seat, item)
        if pid:
            time.sleep(0.005)  # an item takes some ten times as long
            os.kill(pid, signal.SIGKILL)
            killed.append(seat)

    monkeypatch.setattr(Examiners, "start", counted)
    monkeypatch.setattr(Examiners, "ask", struck)
    together = Judge(config, sources, QUIET, num_examiners=2).evaluate("target", str(finished.target))
    assert together.log == alone
    assert len(killed) == 1 and sorted(started) == sorted([0, 1, *killed])


def test_a_kept_evaluation_is_named_by_what_changes_its_numbers(tofu: Path, tmp_path: Path) -> None:
    config = mini(tofu, tmp_path)
    sources = open_sources(config.data, benchmark=config.benchmark, seed=0)

    def kept(config: Config) -> str:
        return Judge(config, sources, QUIET).kept(Asked("x", "m", "key", tmp_path)).name

    def with_engine(device: str, precision: str, num_workers: int = 1) -> Config:
        engine = config.engine.model_copy(update={"device": device, "precision": precision, "num_workers": num_workers})
        return config.model_copy(update={"engine": engine})

    first = kept(with_engine("cpu", "fp32"))
    assert kept(with_engine("cpu", "bf16", 4)) == first  # a CPU computes in fp32, on any number of workers
    assert kept(with_engine("gpu", "fp32")) == first
    assert kept(with_engine("gpu", "bf16")) == kept(with_engine("gpu", "pure_bf16")) != first
    model = config.model.model_copy(update={"path": "org/model", "revision": "v2"})
    assert kept(with_engine("cpu", "fp32").model_copy(update={"model": model})) != first
