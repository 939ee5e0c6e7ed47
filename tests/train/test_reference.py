"""Every engine's reference log-probabilities are the target's, bit for bit alike, and no process loads a whole model to score it."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import soul.train.job
import soul.train.reference
from soul.batch import collate
from soul.models.load import load_model, load_tokenizer, save_model
from soul.models.scoring import answer_logps
from soul.train.engine import Engine, EngineConfig
from soul.train.engines import make_engine
from soul.train.job import TrainJob, run_job
from soul.train.loop import Progress
from soul.train.lora import add_adapters
from soul.train.reference import NonFiniteReference, make_reference, reference_path
from tests.distributed import spawn
from tests.train.reference_runs import LORA_RANK, NUM_ROWS, forget, job_in, label, module_digest, prepared, refused, scored, write_target

pytest.importorskip("peft")
ADAPTED: dict[str, Any] = {"lora_rank": LORA_RANK}
ENGINES: list[dict[str, Any]] = [{"name": "ddp"}, {"name": "fsdp"}, {"name": "deepspeed"}]
WITH_ADAPTERS = [engine | ADAPTED for engine in ENGINES]  # two ranks of them: test_lora.py
CHEAP = ENGINES[:2]  # ZeRO at two ranks without files: test_lora.py
RUNS = [*ENGINES, *WITH_ADAPTERS]
IN_PROCESS = [{"name": "single"}, {"name": "single"} | ADAPTED, {"name": "ddp"} | ADAPTED, {"name": "fsdp"} | ADAPTED]
STAGES = [{"name": "deepspeed", "zero_stage": stage} | more for stage in (1, 2) for more in ({}, ADAPTED)]
IN_BF16 = [settings | {"precision": "bf16"} for settings in RUNS if settings != {"name": "deepspeed"} | ADAPTED]
BROKEN = "the target gives some forget rows a log-probability that is not finite; check the model's weights"


def ranks_that_score(rank: int, world: int, folder: str, runs: list[dict[str, Any]], broken: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {f"broken {name}": refused(rank, world, folder, name) for name in broken}
    return found | {label(settings): scored(rank, world, folder, settings) for settings in runs}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reference")
    write_target(root)
    model = load_model(str(root / "target"))
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = torch.nan
    save_model(root / "broken", model, load_tokenizer(str(root / "target")))
    return root


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    return spawn(ranks_that_score, 2, str(folder), CHEAP, ["fsdp"], timeout_s=240)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> np.ndarray[Any, Any]:
    """The whole model in fp32, a row at a time."""
    model, found = load_model(str(folder / "target")).eval(), []
    for row in forget(folder).rows():
        with torch.no_grad():
            found.append(float(answer_logps(model, collate([("forget", row)], pad_id=0)).sum_B()))
    return np.array(found)


def numbers(run: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    return np.array(run["again"])


def check(ranks: list[dict[str, Any]], settings: dict[str, Any], oracle: np.ndarray[Any, Any], *, rtol: float = 1e-5) -> None:
    runs = [rank[label(settings)] for rank in ranks]
    np.testing.assert_allclose(numbers(runs[0]), oracle, rtol=rtol)
    for run in runs:
        assert run["file"] == runs[0]["file"] and run["file"].endswith(numbers(run).tobytes())
        assert run.get("trained", run["again"]) == runs[0]["again"]
        if "adapters" in run:
            start, end = map(np.array, run["adapters"])
            np.testing.assert_allclose(start, oracle[:4], rtol=max(rtol, 1e-4))
            assert np.abs(end - start).max() > 1.0


def check_reading(ranks: list[dict[str, Any]], settings: dict[str, Any], folder: Path) -> None:
    weights = [parameter.nbytes for parameter in load_model(str(folder / "target")).parameters()]
    first, *others = (rank[label(settings)]["reading"] for rank in ranks)
    assert not any(other.total for other in others) and first.largest == max(weights) < sum(weights) / 4
    twice = settings["name"] == "deepspeed" and "lora_rank" not in settings  # the fp32 weights, then ZeRO's copies of them
    assert first.total == sum(weights) * (2 if twice else 1)


@pytest.mark.parametrize("settings", CHEAP, ids=label)
def test_two_ranks_score_the_target(settings: dict[str, Any], two: list[dict[str, Any]], oracle: np.ndarray[Any, Any]) -> None:
    check(two, settings, oracle)
    assert two[0][label(settings)]["file"] == two[0]["ddp"]["file"]


@pytest.mark.parametrize("settings", CHEAP, ids=label)
def test_rank_zero_alone_reads_a_tensor_at_a_time(settings: dict[str, Any], two: list[dict[str, Any]], folder: Path) -> None:
    check_reading(two, settings, folder)


def test_shards_are_gathered_a_block_at_a_time(two: list[dict[str, Any]], folder: Path) -> None:
    whole = sum(parameter.nbytes for parameter in load_model(str(folder / "target")).parameters())
    for rank in two:
        assert rank["fsdp"]["scoring"] - rank["ddp"]["scoring"] < 0.5 * whole


@pytest.mark.parametrize("settings", CHEAP, ids=label)
def test_engines_start_from_the_very_weights_of_the_files(settings: dict[str, Any], two: list[dict[str, Any]], folder: Path) -> None:
    assert two[0][label(settings)]["weights"] == module_digest(load_model(str(folder / "target")))


def test_a_broken_target_is_an_error_of_every_rank(two: list[dict[str, Any]]) -> None:
    assert [rank["broken fsdp"] for rank in two] == [BROKEN] * 2


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("settings", IN_PROCESS, ids=label)
def test_one_rank_scores_the_target(
    settings: dict[str, Any], two: list[dict[str, Any]], folder: Path, oracle: np.ndarray[Any, Any]
) -> None:
    found = scored(0, 1, str(folder), settings)
    check([{label(settings): found}], settings, oracle)
    assert found["file"] == two[0]["ddp"]["file"]
    model: torch.nn.Module = load_model(str(folder / "target"))
    if "lora_rank" in settings:
        model = add_adapters(model, LORA_RANK, seed=job_in(folder, folder).train.seed)
    assert found["weights"] == module_digest(model)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "runs"), [(1, RUNS), (2, [ENGINES[-1], *WITH_ADAPTERS, *STAGES]), (3, [*RUNS, *STAGES])])
def test_any_ranks_and_every_stage_score_the_target(
    world: int, runs: list[dict[str, Any]], two: list[dict[str, Any]], folder: Path, oracle: np.ndarray[Any, Any]
) -> None:
    names = [run["name"] for run in runs]
    ranks = spawn(ranks_that_score, world, str(folder), runs, names, timeout_s=280)
    for settings in runs:
        check(ranks, settings, oracle)
        check_reading(ranks, settings, folder)
        assert ranks[0][label(settings)]["file"] == two[0]["ddp"]["file"]
    assert all(rank[f"broken {name}"] == BROKEN for rank in ranks for name in names)


@pytest.mark.slow
def test_bf16_has_the_numbers_of_its_engine_at_any_number_of_ranks(folder: Path, oracle: np.ndarray[Any, Any]) -> None:
    ranks = {world: spawn(ranks_that_score, world, str(folder), IN_BF16, [], timeout_s=280) for world in (1, 2)}
    for settings in IN_BF16:
        for world in ranks:
            check(ranks[world], settings, oracle, rtol=0.03)
        assert ranks[1][0][label(settings)]["file"] == ranks[2][0][label(settings)]["file"]
    assert ranks[1][0]["ddp, precision bf16"]["file"] != ranks[1][0]["fsdp, precision bf16"]["file"]


# --- a whole job


def run(job: TrainJob, *, resume_from: Path | None = None, saves: bool = False) -> str:
    """Run the job, with checkpoints of every step if it `saves`; its rows (seconds left out) and a digest of its export."""
    run_dir = Path(job.run_dir)

    def save(engine: Engine, progress: Progress) -> None:
        engine.save(run_dir / str(progress.step), progress.to_json())

    rows: list[dict[str, Any]] = []
    run_job(
        job,
        make_engine(job.engine, rank=0, world=1, local_rank=0),
        resume_from=resume_from,
        save_checkpoint=save,
        must_save=lambda: saves,
        on_step=lambda row, total: rows.append({name: value for name, value in row.items() if name != "seconds"}),
    )
    exported = hashlib.sha256((run_dir / "model" / "model.safetensors").read_bytes()).hexdigest()
    return f"{rows} {exported}"


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize(("name", "lora_rank"), [("single", None), ("ddp", LORA_RANK)])
def test_a_job_on_a_stored_model_is_the_job_on_the_loaded_one(
    name: str, lora_rank: int | None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = run(job_in(folder, tmp_path / "stored", name=name, lora_rank=lora_rank))
    monkeypatch.setattr(soul.train.job, "stored_model", lambda *args, **kwargs: None)
    assert run(job_in(folder, tmp_path / "loaded", name=name, lora_rank=lora_rank)) == stored


def test_a_resumed_job_that_has_lost_the_numbers_scores_the_target_again(folder: Path, tmp_path: Path) -> None:
    job = job_in(folder, tmp_path, name="single")
    assert job.reference is not None
    exported = run(job, saves=True).rsplit(" ", 1)[1]
    numbers = Path(job.reference).read_bytes()
    Path(job.reference).unlink()
    assert run(job, resume_from=tmp_path / "1").endswith(exported)
    assert Path(job.reference).read_bytes() == numbers


def test_numbers_that_are_there_are_used(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_in(folder, tmp_path, name="single")
    assert job.reference is not None
    made = run(job)
    monkeypatch.setattr(soul.train.reference, "score_rows", lambda *args: pytest.fail("scored again"))
    assert run(job) == made
    np.save(job.reference, np.zeros(NUM_ROWS))
    assert run(job) != made


def test_a_broken_target_ends_a_job_before_its_first_step(folder: Path, tmp_path: Path) -> None:
    job = replace(job_in(folder, tmp_path, name="single"), model=str(folder / "broken"))
    with pytest.raises(NonFiniteReference, match="not finite; check the model's weights"):
        run(job)
    assert not list(tmp_path.rglob("*.npy")) and not (tmp_path / "metrics.jsonl").exists()


def test_two_that_make_the_same_numbers_both_have_them(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have looked before either writes."""
    job, both, look = job_in(folder, tmp_path, name="single"), threading.Barrier(2), soul.train.reference.pull_file

    def look_together(path: Path) -> bool:
        found = look(path)
        both.wait(timeout=60)
        return found

    monkeypatch.setattr(soul.train.reference, "pull_file", look_together)

    def one(engine: Engine) -> list[float]:
        make_reference(engine, job.source)
        _, stores = job.source.open()
        found: list[float] = stores["forget"].reference_logps_R.tolist()  # type: ignore[union-attr]
        return found

    engines = [prepared(job), prepared(job)]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(one, engines)
    assert first == second and len(first) == NUM_ROWS
    assert job.reference is not None and [path.name for path in Path(job.reference).parent.iterdir()] == ["numbers.npy"]


# --- the cache's key


FACTS: dict[str, Any] = {"model_key": "m", "revision": None, "trust_remote_code": False, "rows": "r"}


def key(engine: EngineConfig = EngineConfig(device="cpu", precision="fp32"), **facts: Any) -> Path:  # noqa: B008
    return reference_path(Path("cache"), engine=engine, **(FACTS | facts))


def on(**settings: Any) -> Path:
    return key(EngineConfig(**({"device": "cpu", "precision": "fp32"} | settings)))


def test_the_key_has_what_changes_a_number_and_nothing_else() -> None:
    changed = [key(model_key="n"), key(revision="v"), key(trust_remote_code=True), key(rows="s"), on(device="gpu"), on(precision="bf16")]
    changed += [on(precision="bf16", name="fsdp"), on(precision="bf16", name="deepspeed"), on(precision="pure_bf16")]
    assert len({key(), *changed}) == 1 + len(changed)
    assert on(name="fsdp", num_workers=4) == on(name="deepspeed", zero_stage=2) == on(max_grad_norm=0.1) == key()
    assert on(precision="bf16", name="ddp", num_workers=3) == on(precision="bf16")
    assert key().parent == Path("cache/reference") and key().suffix == ".npy"
