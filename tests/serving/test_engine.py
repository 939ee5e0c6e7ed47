"""The engine's thread outlives cancelled rows, failed steps and its own closing."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from soul.models.hashes import model_sha256
from soul.records import InputError
from soul.serving.decoder import End, Row, RunningBatch, Sampling
from soul.serving.engine import Engine, load_engine
from soul.serving.likelihood import Likelihood
from soul.serving.settings import EngineSettings
from soul.serving.torch_engine import MAX_FAILURES
from soul.serving.work import ModelSpec
from tests.serving_runs import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("engine") / "m", 0)


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    made = load_engine(ModelSpec(model_sha256(folder), str(folder)), EngineSettings(max_rows=4, max_batch_tokens=10_000))
    yield made
    made.close()
    made.join(10)


def row(tokens: int = 6, seed: int = 0) -> Row:
    return Row((5, 6, 7 + seed % 9), Sampling(tokens), eos_ids=())


def finish(engine: Engine, rows: list[Row], timeout_s: float = 20) -> dict[Row, End | None]:
    ends: queue.Queue[tuple[Row, End | None]] = queue.Queue()
    assert engine.submit(rows, lambda row, _, end: ends.put((row, end)), every_step=False)
    return dict(ends.get(timeout=timeout_s) for _ in rows)


def test_rows_beyond_the_batch_wait_and_are_answered(engine: Engine) -> None:
    rows = [row(seed=seed) for seed in range(11)]
    assert set(finish(engine, rows).values()) == {"length"}
    assert all(len(found.tokens) == 6 for found in rows)
    assert engine.num_rows == 0


def test_cancelling_at_any_moment_leaves_the_engine_well(engine: Engine) -> None:
    dice, stop = random.Random(1), threading.Event()
    begun: list[list[Row]] = []

    def cancel() -> None:
        while not stop.is_set():
            if begun:
                engine.cancel(dice.choice(begun))

    threads = [threading.Thread(target=cancel) for _ in range(2)]
    for thread in threads:
        thread.start()
    for seed in range(60):
        rows = [row(30, seed), row(30, seed + 1)]
        assert engine.submit(rows, lambda *_: None, every_step=True)
        begun.append(rows)
        time.sleep(dice.random() * 0.01)
    stop.set()
    for thread in threads:
        thread.join()
    assert set(finish(engine, [row()]).values()) == {"length"}
    assert engine.is_well and engine.num_rows <= 120


def test_a_row_that_is_cancelled_between_two_looks_is_let_go_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    release = RunningBatch.release

    def release_and_lose(batch: RunningBatch) -> list[Row]:
        done = release(batch)
        engine.cancel(batch.rows)
        return done

    with monkeypatch.context() as patch:
        patch.setattr(RunningBatch, "release", release_and_lose)
        assert set(finish(engine, [row(50), row(50)]).values()) == {"cancelled"}
    assert set(finish(engine, [row()]).values()) == {"length"}


def test_a_failed_step_ends_its_rows_and_nothing_else(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: RunningBatch) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(RunningBatch, "step", fail)
        for turn in range(1, MAX_FAILURES + 1):
            assert set(finish(engine, [row(), row()]).values()) == {"broken"}
            assert engine.is_well == (turn < MAX_FAILURES)
    assert set(finish(engine, [row()]).values()) == {"length"}
    assert engine.is_well


def test_a_closed_engine_finishes_and_takes_nothing_new(engine: Engine) -> None:
    ends: queue.Queue[End | None] = queue.Queue()
    assert engine.submit([row(200)], lambda _, __, end: ends.put(end), every_step=False)
    engine.close()
    assert not engine.submit([row()], lambda *_: None, every_step=False)
    assert not engine.ask([[5, 6]], 0, lambda _: None)
    assert ends.get(timeout=20) == "length"
    engine.join(10)
    assert not engine.is_well


def test_questions_are_answered_while_rows_run(engine: Engine) -> None:
    assert engine.submit([row(200)], lambda *_: None, every_step=False)
    answers: queue.Queue[list[Likelihood] | None] = queue.Queue()
    assert engine.ask([[5, 6, 7], [8, 9]], 2, answers.put)
    found = answers.get(timeout=20)
    assert found is not None and [len(one.logps) for one in found] == [2, 1]
    assert engine.num_rows == 1


def test_files_that_changed_since_the_gate_are_not_loaded(folder: Path) -> None:
    with pytest.raises(InputError, match="have changed"):
        load_engine(ModelSpec("0" * 64, str(folder)), EngineSettings())


def test_a_full_gpu_says_what_to_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LlamaForCausalLM, "to", full)
    with pytest.raises(InputError, match="--max-models"):
        load_engine(ModelSpec(model_sha256(folder), str(folder)), EngineSettings())
