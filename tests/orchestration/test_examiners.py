"""Examiners on Ray: values do not depend on how many there are, or on who of them dies; and what names a kept evaluation."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from soul.config import Config
from soul.evaluate.eval_log import EvalLog
from soul.evaluate.settings import EvalSettings
from soul.models import stored
from soul.orchestration import evaluate
from soul.orchestration.data import open_sources
from soul.orchestration.evaluate import Asked, Judge
from soul.orchestration.examiners import Examiners
from soul.orchestration.gold import hub_id
from soul.orchestration.prepare import given_model
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


def test_a_kept_evaluation_is_named_by_what_changes_its_numbers(tofu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = mini(tofu, tmp_path)
    sources = open_sources(config.data, benchmark=config.benchmark, seed=0)

    def changed(section: str, **values: object) -> Config:
        return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})

    def kept(config: Config, **asked: object) -> str:
        return Judge(config, sources, QUIET).kept(replace(Asked("x", "m", "key", tmp_path), **asked)).name  # type: ignore[arg-type]

    cpu, fp32 = (changed("engine", device=device, precision="fp32") for device in ("cpu", "gpu"))
    first = kept(cpu)
    assert kept(changed("engine", device="cpu", precision="bf16", num_workers=4)) == first  # a CPU computes in fp32
    config = cpu
    others = {
        "weights": kept(cpu, key="other"),
        "revision": kept(cpu, revision="c0ffee"),
        "device": kept(fp32),
        "dtype": kept(changed("engine", device="gpu", precision="bf16")),
        "remote code": kept(changed("model", trust_remote_code=True)),
        "chat": kept(changed("data", chat="plain")),
        "max_length": kept(changed("data", max_length=77)),
        **{name: kept(changed("evaluate", **{name: value})) for name, value in OTHER_SETTINGS.items()},
    }
    for name in ("TOKENIZER", "METRICS_VERSION"):
        with monkeypatch.context() as patched:
            patched.setattr(evaluate, name, "other")
            others[name] = kept(cpu)
    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "zlib_name", lambda: "zlib-ng")
        others["zlib"] = kept(cpu)
    assert set(OTHER_SETTINGS) == set(EvalSettings.model_fields)
    assert len({first, *others.values()}) == 1 + len(others)
    assert kept(changed("model", revision="of the target only")) == first  # resolved in Asked.revision


OTHER_SETTINGS = {
    "truth_ratio": "arithmetic",
    "generate": False,
    "max_new_tokens": 3,
    "batch_tokens": 99,
    "generation_batch_tokens": 9999,
    "min_k": 0.123,
    "sentence_model": "org/other",
    "limit": 2,
}


def test_a_moved_branch_is_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def at(commit: str) -> object:
        file = tmp_path / "snapshots" / commit / "config.json"
        monkeypatch.setattr(stored, "hf_hub_download", lambda *_, **__: str(file))
        return given_model("org/model", "main")

    assert at("a" * 40) != at("b" * 40)
    assert hub_id("org/model@v2") == ("org/model", "v2") and hub_id("org/model") == ("org/model", None)
