"""vLLM behind the engine's interface: with a stub for the library, and, where it is installed, against transformers."""

from __future__ import annotations

import asyncio
import importlib.util
import queue
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from soul.models.hashes import model_sha256
from soul.models.load import load_tokenizer
from soul.records import InputError
from soul.serving import engine as engines
from soul.serving import vllm_engine
from soul.serving.decoder import End, Row, Sampling
from soul.serving.engine import Engine, chosen, load_engine
from soul.serving.likelihood import Likelihood
from soul.serving.settings import EngineSettings
from soul.serving.vllm_engine import VllmEngine
from soul.serving.work import ModelSpec
from tests.orchestration.mini import ROOT, wait_for
from tests.serving_runs import write_model

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
EOS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("vllm") / "m", 0)


@dataclass
class Part:
    token_ids: list[int]
    logprobs: list[dict[int, Any]] | None
    finish_reason: str | None


@dataclass
class Output:
    outputs: list[Part]
    prompt_logprobs: list[Any] | None = None


@dataclass
class Logprob:
    logprob: float
    rank: int


@dataclass
class Stub:
    """Writes 10, 11, 12, ... and EOS at its fifth token; a prompt that begins with 0 fails, one that begins with 1 never comes."""

    errored: bool = False
    is_down: bool = False
    aborted: list[int] = field(default_factory=list)

    class Model:
        max_model_len = 64

        @staticmethod
        def get_vocab_size() -> int:
            return 100

    model_config = Model()

    async def generate(self, prompt: dict[str, list[int]], sampling: Sampling, request: str) -> AsyncGenerator[Output, None]:
        ids = prompt["prompt_token_ids"]
        if ids[0] == 0:
            raise ValueError("the prompt is secret")
        try:
            if ids[0] == 1:
                await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.aborted.append(ids[0])
            raise
        for step in range(sampling.max_tokens):
            await asyncio.sleep(0.001)
            token = EOS if step == 4 else 10 + step
            places = {token: Logprob(-1.5, 2), 99: Logprob(-0.5, 1)}
            end = "stop" if token == EOS else "length" if step + 1 == sampling.max_tokens else None
            yield Output([Part([token], [places] if sampling.num_top is not None else None, end)])
            if end is not None:
                return

    def shutdown(self) -> None:
        self.is_down = True


@pytest.fixture
def stubbed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[VllmEngine, Stub]]:
    stub = Stub()

    async def build(_: Any) -> Stub:
        return stub

    monkeypatch.setattr(VllmEngine, "_build", staticmethod(build))
    monkeypatch.setattr(vllm_engine, "failures", lambda: (ValueError,))
    monkeypatch.setattr(vllm_engine, "_parameters", lambda sampling, _: sampling)
    arguments: Any = None
    made = VllmEngine(arguments, load_tokenizer(str(folder)), (EOS,))
    yield made, stub
    made.close()
    made.join(10)
    assert stub.is_down and not made.is_well


def row(first: int = 5, tokens: int = 3, num_top: int | None = None) -> Row:
    return Row((first, 6), Sampling(tokens, num_top=num_top), (EOS,))


def ends(engine: Engine, rows: list[Row]) -> dict[Row, End | None]:
    told: queue.Queue[tuple[Row, End | None]] = queue.Queue()
    assert engine.submit(rows, lambda row, _, end: told.put((row, end)), every_step=False)
    return dict(told.get(timeout=60) for _ in rows)


def test_rows_end_as_they_do_elsewhere(stubbed: tuple[VllmEngine, Stub]) -> None:
    engine, _ = stubbed
    short, closed = row(tokens=3), row(tokens=30, num_top=1)
    assert ends(engine, [short, closed]) == {short: "length", closed: "stop"}
    assert short.tokens == [10, 11, 12] and short.logps == [] and short.closing is None
    assert closed.tokens == [10, 11, 12, 13] and closed.closing == EOS
    assert closed.logps == [-1.5] * 5 and closed.tops == [((99, -0.5),)] * 5  # EOS among them, the more probable token first
    assert engine.positions == 63 and engine.vocab_size == 100


def test_every_step_is_told_where_it_is_wanted(stubbed: tuple[VllmEngine, Stub]) -> None:
    told: queue.Queue[tuple[int, End | None]] = queue.Queue()
    assert stubbed[0].submit([row()], lambda _, number, end: told.put((number, end)), every_step=True)
    assert [told.get(timeout=10) for _ in range(3)] == [(1, None), (2, None), (3, "length")]


def test_a_request_that_fails_is_alone_and_says_nothing_of_its_prompt(
    stubbed: tuple[VllmEngine, Stub], caplog: pytest.LogCaptureFixture
) -> None:
    engine, _ = stubbed
    bad, good = row(first=0), row()
    assert ends(engine, [bad, good]) == {bad: "broken", good: "length"}
    assert engine.is_well and "ValueError" in caplog.text and "secret" not in caplog.text


def test_a_cancelled_row_is_aborted_and_a_closed_engine_finishes_first(stubbed: tuple[VllmEngine, Stub]) -> None:
    engine, stub = stubbed
    stuck, told = row(first=1), queue.Queue[End | None]()
    assert engine.submit([stuck], lambda _, __, end: told.put(end), every_step=False)
    assert engine.num_rows == 1 and engine.is_well
    engine.close()
    assert not engine.is_open and not stub.is_down
    assert not engine.submit([row()], lambda *_: None, every_step=False) and not engine.ask([[5, 6]], 1, lambda _: None)
    engine.cancel([stuck])
    engine.join(10)
    assert engine.num_rows == 0 and stub.is_down


def test_a_start_that_fails_leaves_no_thread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def build(_: Any) -> Stub:
        raise RuntimeError("out of memory")

    made: list[VllmEngine] = []
    begin = VllmEngine._started

    def started(engine: VllmEngine, work: Any) -> Any:
        made.append(engine)
        return begin(engine, work)

    monkeypatch.setattr(VllmEngine, "_started", started)
    monkeypatch.setattr(VllmEngine, "_build", staticmethod(build))
    monkeypatch.setattr(vllm_engine, "failures", lambda: (ValueError,))
    arguments: Any = None
    with pytest.raises(RuntimeError, match="out of memory"):
        VllmEngine(arguments, load_tokenizer(str(folder)), (EOS,))
    (half,) = made
    half.close()  # what its end does
    half.join(10)
    assert not half._thread.is_alive() and not half.is_open


def test_which_engine_auto_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    there: Any = object()
    for device, spec, wanted in [("cpu", there, "transformers"), ("gpu", None, "transformers"), ("gpu", there, "vllm")]:
        monkeypatch.setattr(engines.importlib.util, "find_spec", lambda _, spec=spec: spec)
        assert chosen("auto", device) == wanted
        assert chosen("transformers", device) == "transformers"
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="extra llm"):
        chosen("vllm", "gpu")


PARENT = """
import subprocess, sys, time
from soul.serving.orphans import Orphans, children
before = children()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
watch = Orphans(list(children() - before))
if sys.argv[1] == "release":
    watch.release()
print(child.pid, flush=True)
time.sleep(120)
"""


@pytest.mark.parametrize("fate", ["killed", "release"])
def test_what_a_killed_process_began_ends_with_it(fate: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, fate], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait(timeout=10)
    if fate == "killed":
        wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, timeout_s=20)
    else:
        time.sleep(1)
        assert child.is_running() and child.status() != psutil.STATUS_ZOMBIE
        child.kill()


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[tuple[Engine, Engine]]:
    """The same model in vLLM and in transformers."""
    spec, settings = ModelSpec(model_sha256(folder), str(folder)), EngineSettings(max_rows=4)
    made = load_engine(spec, replace(settings, kind="vllm")), load_engine(spec, replace(settings, kind="transformers"))
    yield made
    for engine in made:
        engine.close()
        engine.join(30)


def written(engine: Engine, sampling: Sampling, eos_ids: tuple[int, ...] = ()) -> list[Row]:
    rows = [Row((5, 6, 7 + number), sampling, eos_ids) for number in range(9)]
    ends(engine, rows)
    return rows


@needs_vllm
def test_greedy_rows_have_the_tokens_and_probabilities_of_transformers(pair: tuple[Engine, Engine]) -> None:
    ours, theirs = (written(engine, Sampling(12, num_top=2)) for engine in pair)
    for one, other in zip(ours, theirs, strict=True):
        assert one.tokens == other.tokens and one.end == other.end == "length"
        assert one.logps == pytest.approx(other.logps, abs=1e-4)
        assert [[token for token, _ in top] for top in one.tops] == [[token for token, _ in top] for top in other.tops]


@needs_vllm
def test_a_row_ends_at_its_own_ids_and_no_others(pair: tuple[Engine, Engine]) -> None:
    usual = written(pair[1], Sampling(12))[0].tokens
    for engine in pair:
        found = written(engine, Sampling(12, num_top=0), (usual[3],))[0]
        place = usual.index(usual[3])
        assert (found.tokens, found.closing, found.end) == (usual[:place], usual[3], "stop")
        assert len(found.logps) == place + 1


@needs_vllm
def test_likelihoods_are_those_of_transformers(pair: tuple[Engine, Engine]) -> None:
    questions = [[5, 6, 7, 9, 11], [8, 9], [4], list(range(3, 258))]
    found: list[list[Likelihood]] = []
    for engine in pair:
        told: queue.Queue[list[Likelihood] | None] = queue.Queue()
        assert engine.ask(questions, 2, told.put)
        answer = told.get(timeout=60)
        assert answer is not None
        found.append(answer)
    for one, other in zip(*found, strict=True):
        assert one.logps == pytest.approx(other.logps, abs=1e-4)
        assert len(one.tops) == len(other.tops)


@needs_vllm
def test_the_same_seed_draws_the_same_tokens(pair: tuple[Engine, Engine]) -> None:
    drawn = [[row.tokens for row in written(pair[0], Sampling(12, temperature=1.0, top_p=0.9, seed=seed))] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    cold = Sampling(12, temperature=1.0, top_p=0.0, seed=1)
    assert [row.tokens for row in written(pair[0], cold)] == [row.tokens for row in written(pair[1], Sampling(12))]


@needs_vllm
def test_cancelled_rows_leave_the_engine_well(pair: tuple[Engine, Engine]) -> None:
    engine = pair[0]
    rows = [row(tokens=60, first=5) for _ in range(6)]
    assert engine.submit(rows, lambda *_: None, every_step=True)
    engine.cancel(rows)
    last = row(tokens=6)
    assert ends(engine, [last])[last] in ("length", "stop") and engine.is_well
    wait_for(lambda: engine.num_rows == 0, timeout_s=20)
