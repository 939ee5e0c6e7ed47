from __future__ import annotations

import re
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from soul.config import Config
from soul.data.pairing import PairedPlan
from soul.device import Device
from soul.dry_run import dry_run, model_shape
from soul.models.tiny import TinyConfig, tiny_model, tiny_tokenizer
from soul.optim.configs import OPTIMIZERS
from soul.plan import Machine, ModelShape, Plan, plan_run, shape_of, shortages, tiny_shape
from soul.preflight import check_disk, check_output, check_workers, preflight
from soul.records import InputError

GIB = 2**30
# Llama-2-7B: 32 blocks of 202,383,360, two embeddings of 32,000 x 4,096 and a norm
SEVEN_B = ModelShape(6_738_415_616, 32, 202_383_360, 4096, 11008, 32000, 78_080)


def plan(
    values: dict[str, Any], *, num_forget: int = 40, num_retain: int = 360, max_length: int = 128, shape: ModelShape | None = None
) -> Plan:
    config = Config.model_validate(values).decided("cpu")
    return plan_run(config, num_forget=num_forget, num_retain=num_retain, shape=shape, max_length=max_length)


def seven_b(engine: dict[str, Any], **values: Any) -> Plan:
    """4,096 tokens a GPU: four pairs of rows of 512 tokens, with checkpointing, as in the notes."""
    engine = {"gradient_checkpointing": True, "precision": "bf16", **engine}
    train = {"batch_size": 4 * engine.get("num_workers", 1), "micro_batch_size": 4, **values.pop("train", {})}
    return plan({"engine": engine, "train": train, **values}, num_forget=400, num_retain=3600, max_length=512, shape=SEVEN_B)


def test_a_plan_worked_out_by_hand() -> None:
    # 41 rows in batches of 6: 7 steps an epoch, 21 in 3 epochs; 6 rows on 4 workers: 2 a worker, micro-batches of 1
    made = plan(
        {
            "engine": {"num_workers": 4},
            "train": {"epochs": 3, "batch_size": 6, "micro_batch_size": 1, "warmup_fraction": 0.1, "save_every": 2},
            "optimizer": {"hessian_every": 8},
        },
        num_forget=41,
    )
    assert (made.steps_per_epoch, made.total_steps, made.warmup_steps) == (7, 21, 2)
    assert (made.rows_per_step, made.rows_per_worker, made.micro_batches, made.micro_batch_rows) == (6, 2, 2, 1)
    assert made.curvature_updates == 3  # before steps 0, 8 and 16
    assert made.curvature_cost == pytest.approx(3 * 0.5 / 21)  # retain rows only: half of a step's rows
    assert made.checkpoints == 1  # after epoch 2; at the end there is the model
    assert made.splits == ("forget", "retain") and made.memory == () and made.checkpoint_bytes == 0


@pytest.mark.parametrize(
    ("values", "share"),
    [
        ({"optimizer": "adamw"}, 0.0),
        ({"optimizer": "soul_release"}, 0.0),
        ({"optimizer": {"hessian_every": 1}}, 0.5),
        ({"optimizer": {"hessian_every": 1, "hessian_data": "both"}}, 1.0),
        ({"optimizer": {"hessian_every": 1}, "method": "ga"}, 1.0),
    ],
)
def test_curvature_costs_what_it_forwards(values: dict[str, Any], share: float) -> None:
    assert plan(values).curvature_cost == pytest.approx(share)


@pytest.mark.parametrize(
    ("train", "checkpoints"),
    [
        ({}, []),
        ({"save_every": 1}, [5, 10, 15, 20]),
        ({"save_every": 2}, [10, 20]),
        ({"save_every": 5}, []),
        ({"save_every": 1, "max_steps": 7}, [5]),
        ({"save_every": 1, "max_steps": 10}, [5]),
        ({"save_every": 1, "save_steps": 4, "max_steps": 17}, [4, 5, 8, 10, 12, 15, 16]),
    ],
)
def test_checkpoints_are_counted_as_the_job_saves_them(train: dict[str, Any], checkpoints: list[int]) -> None:
    assert plan({"train": train}).checkpoints == len(checkpoints)  # 40 rows in batches of 8: 5 steps an epoch


@pytest.mark.parametrize(
    ("train", "written", "at_once"),
    [
        ({"save_minutes": None, "save_every": 1}, 4, 3),
        ({"save_minutes": None, "save_every": 3}, 1, 1),
        ({"save_minutes": None}, 0, 0),
        ({"save_every": 3}, 1, 3),
        ({}, 0, 3),
        ({"keep_checkpoints": 1}, 0, 2),
    ],
)
def test_bytes_are_those_of_the_checkpoints(train: dict[str, Any], written: int, at_once: int) -> None:
    """By the clock there may be any number, so that as many as are kept are at the disk's fullest, and one that is being written."""
    config = Config.model_validate({"train": train, "model": {"export_dtype": "bf16"}}).decided("cpu")
    made = plan_run(config, num_forget=40, num_retain=360, shape=SEVEN_B, max_length=128)
    one, model = 12 * SEVEN_B.num_params, 2 * SEVEN_B.num_params
    assert made.checkpoint_bytes == one
    assert (made.written_bytes(config), made.disk_bytes(config)) == (written * one + model, at_once * one + model)
    assert made.staging_bytes(config) == (one if config.train.saves else 0) + model


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ({}, ["checkpoints  one every 15 minutes; the last 2 are kept until", "MiB and a checkpoint every 15 minutes"]),
        ({"save_every": 1}, ["one every 15 minutes and 4 at their steps; the last 2"]),
        ({"save_minutes": None, "save_every": 1}, ["checkpoints  4, of which the last 2 are kept", "at once, at most"]),
        ({"save_minutes": 0}, ["none: a run that is killed starts again"]),
    ],
)
def test_a_dry_run_says_how_often_and_how_much_is_written(train: dict[str, Any], told: list[str]) -> None:
    shown = re.sub(" +", " ", dry_run(Config.model_validate({"train": train, "data": {"num_authors": 20}})))
    assert [text for text in told if re.sub(" +", " ", text) not in shown] == [], shown


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("micro", [1, 3, 8])
def test_the_plan_is_what_the_feed_hands_out(workers: int, micro: int) -> None:
    made = plan({"engine": {"num_workers": workers}, "train": {"batch_size": 7, "micro_batch_size": micro}}, num_forget=21, num_retain=30)
    lengths = {"forget": torch.arange(21).numpy(), "retain": torch.arange(30).numpy()}
    paired = PairedPlan(lengths, batch_size=7, seed=0)
    shares = [paired.share(0, rank=rank, world=workers, micro_batch_size=micro) for rank in range(workers)]
    assert {len(share) for share in shares} == {made.micro_batches}
    assert max(len(batch) for share in shares for batch in share) == made.micro_batch_rows * len(made.splits)
    assert paired.steps_per_epoch == made.steps_per_epoch


def test_too_few_rows_are_bad_input() -> None:
    with pytest.raises(InputError, match=r"the retain split has 3 rows, need >= 8"):
        plan({}, num_retain=3)


@pytest.mark.parametrize(
    ("engine", "gib"),
    [
        ({"name": "fsdp"}, 106.0),
        ({"name": "fsdp", "num_workers": 4}, 30.7),
        ({"name": "fsdp", "num_workers": 8}, 18.2),
        ({"name": "single"}, 115.7),
        ({"name": "ddp"}, 115.7),
        ({"name": "ddp", "num_workers": 4}, 115.7),  # the notes add 25 GiB of buckets, which are views of the gradients here
        ({"name": "deepspeed", "zero_stage": 1}, 128.3),
        ({"name": "deepspeed", "zero_stage": 1, "num_workers": 4}, 71.8),
        ({"name": "deepspeed", "zero_stage": 2, "num_workers": 4}, 48.5 - 1.7),  # the notes' buckets are ten times ours
        ({"name": "deepspeed", "zero_stage": 3}, 122.5),
        ({"name": "deepspeed", "zero_stage": 3, "num_workers": 4}, 37.8),
    ],
)
def test_memory_of_llama_2_7b_as_in_the_notes(engine: dict[str, Any], gib: float) -> None:
    assert seven_b(engine).memory_bytes / GIB == pytest.approx(gib, rel=0.03)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloading_moves_memory_and_adds_none(stage: int) -> None:
    kept = seven_b({"name": "deepspeed", "zero_stage": stage, "num_workers": 2})
    moved = seven_b({"name": "deepspeed", "zero_stage": stage, "num_workers": 2, "offload": "optimizer"})
    assert sum(item.num_bytes for item in kept.memory) == sum(item.num_bytes for item in moved.memory) == kept.memory_bytes
    assert kept.memory_bytes - moved.memory_bytes >= 12 * SEVEN_B.num_params / 2  # fp32 weights and two states


def test_memory_follows_its_causes() -> None:
    sharded = {item.name: item.num_bytes for item in seven_b({"name": "fsdp"}).memory}
    assert sharded["weights (fp32)"] == 4 * SEVEN_B.num_params
    assert sharded["optimizer state (2 x fp32)"] == 8 * SEVEN_B.num_params
    assert sharded["reference log-probabilities"] == 400 * 8
    assert sharded["logits (at most)"] == 4096 * 32000 * 10
    assert seven_b({"name": "fsdp"}, method="grad_diff").memory_bytes == seven_b({"name": "fsdp"}).memory_bytes - 3200
    assert seven_b({"name": "single"}, optimizer="signum").memory_bytes == seven_b({"name": "single"}).memory_bytes - 4 * SEVEN_B.num_params
    kept = seven_b({"name": "fsdp", "gradient_checkpointing": False}).memory_bytes - seven_b({"name": "fsdp"}).memory_bytes
    block = 2 * 4096 * (8 * 4096 + 3 * 11008)
    assert kept == 32 * block - (32 * 2 * 4096 * 4096 + block)
    full = {item.name: item.num_bytes for item in seven_b({"name": "single", "precision": "fp32"}).memory}
    assert "bf16 copy of the weights" not in full and full["logits (at most)"] == 4096 * 32000 * 12


def items(made: Plan) -> dict[str, int]:
    return {item.name: item.num_bytes for item in made.memory}


def test_adapters_leave_weights_and_little_else() -> None:
    """Rank 16 on the seven linear layers of a block: 78,080 inputs and outputs."""
    adapters = 32 * 78_080 * 16
    for engine, parts in (({"name": "single"}, 1), ({"name": "fsdp", "num_workers": 4}, 4)):
        made = items(seven_b({**engine, "precision": "fp32"}, train={"lora_rank": 16}))
        assert made["weights (fp32)"] == 4 * (SEVEN_B.num_params + adapters) // parts
        assert made["gradients (fp32)"] == 4 * adapters // parts
        assert made["optimizer state (2 x fp32)"] == 8 * adapters // parts
    zero = items(seven_b({"name": "deepspeed", "zero_stage": 1, "num_workers": 2, "precision": "fp32"}, train={"lora_rank": 16}))
    assert zero["weights (fp32)"] == 4 * (SEVEN_B.num_params + adapters) and zero["master weights (fp32)"] == 4 * adapters // 2
    made = seven_b({"name": "single"}, train={"lora_rank": 16})
    assert (made.checkpoint_bytes, made.model_bytes) == (12 * adapters, 4 * SEVEN_B.num_params)


def test_a_hessian_product_has_its_price() -> None:
    first, second = (seven_b({"name": "single"}, optimizer=name) for name in ("sophia", "sophia_h"))
    extra = items(second)["Hessian product"]
    assert extra == second.memory_bytes - first.memory_bytes == 16 * SEVEN_B.num_params + items(first)["activations"]
    assert first.curvature_updates == second.curvature_updates and second.curvature_cost == 2 * first.curvature_cost


def test_what_does_not_fit_is_said() -> None:
    on_gpu = seven_b({"name": "fsdp", "num_workers": 4})  # 30.7 GiB a worker
    assert shortages(on_gpu, Machine(500 * GIB, 40 * GIB), num_workers=4) == []
    [line] = shortages(on_gpu, Machine(500 * GIB, 24 * GIB), num_workers=4)
    assert re.search(r"a worker needs about 30\.\d.GiB, its GPU has 24\.0.GiB\. .*--engine fsdp.*--gradient-checkpointing", line)
    [line] = shortages(on_gpu, Machine(64 * GIB), num_workers=4)
    assert re.search(r"4 worker\(s\) need about 12\d\.\d.GiB together, this machine has 64\.0.GiB", line)
    offloaded = seven_b({"name": "fsdp", "num_workers": 4, "offload": "all"})  # 16 N bytes in CPU memory over the workers
    assert shortages(offloaded, Machine(120 * GIB, 24 * GIB), num_workers=4) == []
    [line] = shortages(offloaded, Machine(64 * GIB, 24 * GIB), num_workers=4)
    assert re.search(r"4 worker\(s\) need about 100\.\d.GiB of offloaded memory together", line)
    assert shortages(plan({}), Machine(1, 1), num_workers=1) == [], "a shape that is not known"


def test_a_dry_run_warns_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"data": {"num_authors": 20}, "output": str(tmp_path)}
    assert "worker(s) need about" not in dry_run(Config.model_validate(values))
    monkeypatch.setattr("soul.dry_run.this_machine", lambda: Machine(2**20))
    assert "# warning: 1 worker(s) need about" in dry_run(Config.model_validate(values))
    assert "worker(s) need about" not in dry_run(Config.model_validate({**values, "address": "ray://elsewhere:10001"}))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_is_counted_as_the_optimizer_allocates_it(optimizer: str) -> None:
    config = Config(optimizer=optimizer)  # type: ignore[arg-type]
    model = torch.nn.Linear(7, 5)
    built = config.optimizer.build(model.named_parameters())
    model(torch.ones(1, 7)).sum().backward()
    built.step()
    allocated = sum(value.numel() for state in built.state.values() for value in state.values() if value.dim() > 0)
    assert allocated == config.optimizer.state_tensors * 40


@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 24, "intermediate_size": 40, "num_layers": 3, "num_heads": 2, "vocab_size": 301}])
def test_the_tiny_model_is_counted_without_building_it(sizes: dict[str, int]) -> None:
    config = TinyConfig(**sizes)  # type: ignore[arg-type]
    tokenizer = tiny_tokenizer(["a few words and some more"], config.vocab_size)
    built = tiny_model(config, tokenizer, seed=0)
    built.resize_token_embeddings(config.vocab_size)  # the vocabulary a larger text would fill
    counted = shape_of(built, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size, vocab_size=config.vocab_size)
    assert counted == tiny_shape(config)


def test_a_7b_folder_is_counted_without_its_weights(tmp_path: Path) -> None:
    LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    shape, limit, reason = model_shape(Config(model=str(tmp_path)))  # type: ignore[arg-type]
    assert (shape, limit, reason) == (SEVEN_B, 2048, "")


def test_a_model_of_another_kind_has_no_estimate_but_a_plan(tmp_path: Path) -> None:
    with torch.device("meta"):
        bare = LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    assert shape_of(bare, hidden_size=8, intermediate_size=8, vocab_size=300).num_blocks == 1
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    shown = dry_run(Config.model_validate({"model": str(tmp_path), "data": {"num_authors": 20}}))
    assert "memory of one worker: unknown, because the config of" in shown and "steps an epoch" in shown


# preflight


@pytest.mark.parametrize(
    ("workers", "device", "most", "word"),
    [(3, "cpu", {"CPU": 2}, "has 2"), (2, "gpu", {"CPU": 64, "GPU": 1}, "GPUs"), (5, "cpu", {"CPU": 4.0, "GPU": 8.0}, "CPUs")],
)
def test_more_workers_than_devices_are_refused(workers: int, device: Device, most: dict[str, float], word: str) -> None:
    with pytest.raises(InputError, match=word):
        check_workers(workers, device, most)
    check_workers(int(most[device.upper()]), device, most)
    check_workers(workers, "gpu", most, waits=True)  # an autoscaler that does not say how far it goes


def test_output_must_be_a_folder_that_can_be_made(tmp_path: Path) -> None:
    check_output(str(tmp_path / "a" / "b"))
    check_output("s3://bucket/run")
    assert list(tmp_path.iterdir()) == []  # nothing is made yet
    (tmp_path / "file").write_text("")
    for output in ("file", "file/below"):
        with pytest.raises(InputError, match="--output"):
            check_output(str(tmp_path / output))


def test_a_full_disk_is_told_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = seven_b({"name": "fsdp", "num_workers": 8}, output=str(tmp_path / "run"))
    config = Config.model_validate({"output": str(tmp_path / "run"), "engine": {"num_workers": 8}})
    # two checkpoints are kept while a third is written, 12 bytes a parameter each, and the model is exported in fp32
    assert made.disk_bytes(config) == (3 * 12 + 4) * SEVEN_B.num_params
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, made.disk_bytes(config)))
    preflight(config, made, is_local=False)
    with pytest.raises(InputError, match=r"needs about 502\.\d.GiB .* 251\.\d.GiB free"):
        preflight(config.model_copy(update={"twin": "adamw"}), made, is_local=False)


def test_the_disk_of_a_store_s_copies_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOUL_STORE_COPIES", str(tmp_path / "copies"))
    config = Config.model_validate({"output": "s3://bucket/run"}).decided("cpu")
    made = plan_run(config, num_forget=40, num_retain=360, shape=SEVEN_B, max_length=128)
    usage, asked = namedtuple("usage", "total used free"), []
    room = 16 * SEVEN_B.num_params  # a checkpoint and the model, both on their way

    def disk_usage(folder: Path) -> Any:
        asked.append(folder)
        return usage(0, 0, room)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    preflight(config, made, is_local=True)
    assert asked == [tmp_path]  # the closest that is there
    room -= 1
    with pytest.raises(InputError, match=r"this machine: .*/copies/s3.*/bucket/run needs about 100\.4.GiB .* SOUL_STORE_COPIES"):
        preflight(config, made, is_local=True)
    preflight(config, made, is_local=False)  # on a cluster it is not this machine that writes


def test_what_a_resumed_run_has_on_its_disk_is_not_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 600))
    with pytest.raises(InputError, match="Lower --keep-checkpoints"):
        check_disk(str(tmp_path), 1000)
    kept = tmp_path / "checkpoints" / "x" / "step_00000010" / "data"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(bytes(400))
    check_disk(str(tmp_path), 1000)
