"""Ray Data's feeds: a streamed step is LocalFeed's step, tokenised stores hold what tokenising in place gives, errors hide rows."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("ray")

import ray.train.collective

from soul.batch import Batch
from soul.data.chat import ChatFormat
from soul.data.columns import ColumnMap
from soul.data.feed import LocalFeed
from soul.data.steps import STEPS_PER_BLOCK
from soul.data.store import TokenStore, finish_store, write_part
from soul.data.tokenize import token_rows
from soul.models.load import load_tokenizer, save_model
from soul.models.tiny import TinyConfig, tiny_model, tiny_tokenizer
from soul.objectives.methods import NPO, GradDiff
from soul.optim.configs import AdamWConfig
from soul.orchestration import tokens
from soul.orchestration.stream import ray_steps, step_dataset
from soul.orchestration.tokens import FileSplit, TokenSettings, row_hash, tokenise
from soul.records import InputError, Record
from soul.train.config import TrainConfig
from soul.train.job import TrainJob
from tests.orchestration.mini import on_gpus
from tests.train.loop_runs import ragged

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

CANARY = "zanzibarquokka"
COLUMNS = ColumnMap()
RECORDS = [Record(f"retain/{i}", f"What is {i} times {i + 1}, in {'long ' * (i % 5)}words?", f"It is {i * (i + 1)}.") for i in range(23)]


# --- steps


def job_in(folder: Path, **train: Any) -> TrainJob:
    """Seven forget rows in steps of three: of two ranks, the second has none in an epoch's last step."""
    rows = {"forget": ragged(1, 7), "retain": ragged(2, 9)}
    for split, split_rows in rows.items():
        write_part(folder / split / "part-00000.arrow", ((row.ids, row.num_prompt) for row in split_rows))
        finish_store(folder / split)
    np.save(folder / "reference.npy", np.array([row.reference_logp for row in rows["forget"]]))
    return TrainJob(
        model="",
        export="",
        run_dir=str(folder),
        method=NPO(),
        optimizer=AdamWConfig(),
        train=TrainConfig(**{"batch_size": 3, "micro_batch_size": 2, "seed": 5, **train}),
        engine=on_gpus(),
        stores={split: (str(folder / split),) for split in rows},
        reference=str(folder / "reference.npy"),
    )


class Broadcast:
    """Stands in for Ray Train's collective where the ranks are threads."""

    def __init__(self) -> None:
        self.arrived, self.value = threading.Event(), None

    def __call__(self, value: Any) -> Any:
        if value is not None:
            self.value = value
            self.arrived.set()
        assert self.arrived.wait(20)
        return self.value


def streamed(job: TrainJob, world: int, start: int, stop: int, monkeypatch: pytest.MonkeyPatch) -> list[list[list[Batch]]]:
    """Every rank's steps through Ray, the ranks in threads."""
    monkeypatch.setattr(ray.train.collective, "broadcast_from_rank_zero", Broadcast())
    with ThreadPoolExecutor(world) as pool:
        ranks = [pool.submit(_consume, job, feed, start, stop) for feed in feeds(job, world)]
        return [rank.result(timeout=100) for rank in ranks]


def _consume(job: TrainJob, feed: LocalFeed, start: int, stop: int) -> list[list[Batch]]:
    return [list(step) for step in ray_steps(job, feed, start, stop)]


def feeds(job: TrainJob, world: int) -> list[LocalFeed]:
    plan, stores = job.source.open()
    return [LocalFeed(plan, stores, rank, world, job.train.micro_batch_size, 0) for rank in range(world)]


def assert_same_batches(found: list[list[Batch]], expected: list[list[Batch]]) -> None:
    assert [len(step) for step in found] == [len(step) for step in expected]
    for one, other in zip((b for step in found for b in step), (b for step in expected for b in step), strict=True):
        for name in Batch.__slots__:
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("world", "start", "stop"),
    [(1, 0, 2 * STEPS_PER_BLOCK + 3), (1, 7, 12), (2, 0, STEPS_PER_BLOCK + 5), (2, 13, 2 * STEPS_PER_BLOCK + 13), (3, 1, 3)],
)
def test_streamed_steps_are_the_local_feeds(world: int, start: int, stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_in(tmp_path)
    found = streamed(job, world, start, stop, monkeypatch)
    for rank, feed in enumerate(feeds(job, world)):
        assert_same_batches(found[rank], list(feed.steps(start, stop)))


def test_steps_without_reference_are_the_local_feeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = replace(job_in(tmp_path, micro_batch_size=1, bucket_window=1), method=GradDiff(), reference=None)
    [found] = streamed(job, 1, 0, 4, monkeypatch)
    assert_same_batches(found, list(feeds(job, 1)[0].steps(0, 4)))
    assert all(torch.isnan(batch.reference_logps_B).all() for step in found for batch in step)


def test_no_steps_start_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert streamed(job_in(tmp_path), 1, 4, 4, monkeypatch) == [[]]


def test_steps_of_another_rank_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_in(tmp_path)
    everything = step_dataset(job, world=2, start=0, stop=30).streaming_split(1, equal=True)  # one consumer of what was made for two
    monkeypatch.setattr(ray.train.collective, "broadcast_from_rank_zero", lambda value: [ray.put(everything)])
    steps = ray_steps(job, replace(feeds(job, 2)[0], rank=0), 0, 30)
    with pytest.raises(RuntimeError, match=f"rank 0 expected step {STEPS_PER_BLOCK}, Ray Data delivered step 0 of rank 1"):
        list(steps)


# --- tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = tiny_tokenizer([record.prompt + record.response for record in RECORDS], 330)
    save_model(
        path,
        tiny_model(TinyConfig(hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, max_length=128), tokenizer, seed=0),
        tokenizer,
    )
    return path


def settings_of(folder: Path, **changes: Any) -> TokenSettings:
    return replace(TokenSettings(str(folder), None, False, "plain", 128, "error"), **changes)


def expected_rows(folder: Path, records: Any = RECORDS) -> list[tuple[list[int], int]]:
    rows = token_rows(records, "retain", load_tokenizer(str(folder)), ChatFormat("plain"), max_length=128)
    return [(list(row.ids), row.num_prompt) for row in rows]


def stored_rows(store: Path) -> list[tuple[list[int], int]]:
    return [(list(row.ids), row.num_prompt) for row in TokenStore.open(store).rows()]


def write_jsonl(path: Path, records: Any = RECORDS, *broken: str) -> Path:
    lines = [json.dumps({"question": record.prompt, "answer": record.response}) for record in records]
    path.write_text("".join(line + "\n" for line in [*lines, *broken]))
    return path


def test_records_in_many_parts_are_tokenised_in_their_order(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "RECORDS_PER_PART", 12)
    store = tokenise(RECORDS, "retain", settings_of(folder), cache=tmp_path)
    assert len(list(store.glob("part-*.arrow"))) == 2
    assert stored_rows(store) == expected_rows(folder)


def test_a_file_gives_what_its_records_give(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "mine.jsonl")
    monkeypatch.chdir(tmp_path)  # the workers are elsewhere
    store = tokenise(FileSplit("mine.jsonl", COLUMNS), "retain", settings_of(folder), cache=tmp_path / "cache")
    assert stored_rows(store) == expected_rows(folder)
    few = tokenise(FileSplit("mine.jsonl", COLUMNS, limit=4), "retain", settings_of(folder), cache=tmp_path / "cache")
    assert stored_rows(few) == expected_rows(folder)[:4]


def test_a_finished_store_is_used_again_and_an_unfinished_one_is_not(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tokenise(RECORDS, "retain", settings_of(folder), cache=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(ray.data, "from_items", _not_called)
        assert tokenise(list(RECORDS), "retain", settings_of(folder), cache=tmp_path) == store
    part = store / "part-00000.arrow"
    (store / "store.json").unlink()
    part.write_bytes(part.read_bytes()[:50])
    assert tokenise(RECORDS, "retain", settings_of(folder), cache=tmp_path) == store
    assert stored_rows(store) == expected_rows(folder)


def _not_called(*_: Any, **__: Any) -> None:
    raise AssertionError("the cached store was not used")


def test_whatever_changes_the_ids_changes_the_store(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys only: the work is cut short behind them."""

    def key(rows: Any, settings: TokenSettings) -> str:
        monkeypatch.setattr(tokens, "pull", lambda path: True)
        monkeypatch.setattr(tokens, "is_store", lambda path: True)
        monkeypatch.setattr(tokens, "store_facts", lambda path: {"checked_against": getattr(rows, "checked_against", lambda: None)()})
        return tokenise(rows, "retain", settings, cache=tmp_path).name

    other = tmp_path / "other"
    shutil.copytree(folder, other)
    same = key(RECORDS, settings_of(other))
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}")
    file = FileSplit(str(write_jsonl(tmp_path / "mine.jsonl")), COLUMNS)
    changed = [
        key(RECORDS, settings_of(other)),
        key(RECORDS[:-1], settings_of(folder)),
        key(RECORDS[::-1], settings_of(folder)),
        key(RECORDS, settings_of(folder, max_length=64)),
        key(RECORDS, settings_of(folder, chat="auto")),
        key(RECORDS, settings_of(folder, truncate="answer")),
        key(RECORDS, replace(settings_of(folder), model="some/model")),
        key(RECORDS, replace(settings_of(folder), model="some/model", revision="main")),
        key(file, settings_of(folder)),
        key(replace(file, limit=4), settings_of(folder)),
        key(replace(file, columns=ColumnMap(prompt="answer", response="question")), settings_of(folder)),
    ]
    assert key(RECORDS, settings_of(folder)) == same
    assert len({same, *changed}) == 1 + len(changed)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (f'{{"question": "{CANARY}", "answer": null}}', r"mine\.jsonl, row 24: response \(column answer\) is missing"),
        (f'{{"question": "{CANARY}"}}', r"mine\.jsonl, row 24: no column for the response"),
        (f'{{"question": "{CANARY}', r"mine\.jsonl, line 24 is not JSON"),
        (json.dumps({"question": f"{CANARY} " * 100, "answer": "x"}), "retain row retain/24 has .* tokens"),
    ],
)
def test_a_malformed_row_is_named_and_not_shown(broken: str, message: str, folder: Path, tmp_path: Path, capfd: Any) -> None:
    file = write_jsonl(tmp_path / "mine.jsonl", RECORDS, broken)
    with pytest.raises(InputError, match=message) as caught:
        tokenise(FileSplit(str(file), COLUMNS), "retain", settings_of(folder), cache=tmp_path / "cache")
    shown = [str(caught.value), repr(caught.value.__cause__), repr(caught.value.__context__), *capfd.readouterr()]
    assert not any(CANARY in text or "Traceback" in text for text in shown)
    assert not list((tmp_path / "cache").rglob("part-*")) and not list((tmp_path / "cache").rglob("store.json"))


def test_the_first_of_several_bad_records_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "RECORDS_PER_PART", 5)
    bad = [replace(record, prompt=f"{CANARY} " * 100) if i in (8, 17) else record for i, record in enumerate(RECORDS)]
    with pytest.raises(InputError, match=r"retain row retain/8 has .* tokens") as caught:
        tokenise(bad, "retain", settings_of(folder), cache=tmp_path)
    assert CANARY not in str(caught.value)


def test_a_forbidden_row_is_refused_even_where_a_store_is_cached(folder: Path, tmp_path: Path) -> None:
    file = FileSplit(str(write_jsonl(tmp_path / "mine.jsonl")), COLUMNS)
    store = tokenise(file, "retain", settings_of(folder), cache=tmp_path / "cache")
    strangers = replace(file, forbidden=frozenset({row_hash(Record("x", "What else?", "Nothing."))}))
    assert tokenise(strangers, "retain", settings_of(folder), cache=tmp_path / "cache") == store
    overlapping = replace(file, forbidden=frozenset(map(row_hash, RECORDS[6:8])))
    with pytest.raises(
        InputError, match=r"mine\.jsonl: row 7 of retain is also in forget or holdout\. Remove it, or set --allow-overlap\."
    ) as caught:
        tokenise(overlapping, "retain", settings_of(folder), cache=tmp_path / "cache")
    assert RECORDS[6].response not in str(caught.value)


def test_no_records_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the retain split has no rows, expected at least one"):
        tokenise([], "retain", settings_of(folder), cache=tmp_path)
