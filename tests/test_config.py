from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from soul.config import TINY_RATE, Config, DataConfig, EvaluateConfig, ModelConfig, PrepareConfig, prepare_key
from soul.device import seen, torch_device
from soul.objectives.methods import METHODS
from soul.optim.configs import OPTIMIZERS
from soul.records import InputError
from soul.settings import leaves, load_config, load_settings, merge, problems

OWN = {"benchmark": "own", "model": "m", "data": {"forget": "f.jsonl", "retain": "r.jsonl"}}


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def refused(path: Path | None, overrides: dict[str, Any] | None = None, **options: Any) -> list[str]:
    with pytest.raises(InputError) as caught:
        load_config(path, overrides or {}, **options)
    return str(caught.value).splitlines()


def test_defaults_are_the_papers_second_order_npo() -> None:
    config = Config()
    assert (config.benchmark, config.data.source, config.data.forget) == ("tofu", "fictitious", "forget05")
    assert (config.method.name, config.optimizer.name, config.engine.name, config.train.epochs) == ("npo", "sophia", "single", 5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "influence"])  # which has an optimizer of its own
def test_python_yaml_and_json_say_the_same(method: str, optimizer: str, tmp_path: Path) -> None:
    in_python = Config(method=method, optimizer={"name": optimizer, "learning_rate": 3e-5}, engine="ddp", train={"epochs": 3})  # type: ignore[arg-type]
    text = f"method: {method}\noptimizer: {{name: {optimizer}, learning_rate: 3e-5}}\nengine: ddp\ntrain:\n  epochs: 3\n"
    assert load_config(write(tmp_path, text), {}) == in_python
    assert Config.model_validate_json(in_python.model_dump_json()) == in_python
    assert in_python.method.name == method and in_python.optimizer.learning_rate == 3e-5


@pytest.mark.parametrize(
    "values",
    [
        {"engine": {"num_workers": 3}, "twin": "adamw", "twin_learning_rate": 1e-5},
        {**OWN, "data": {**OWN["data"], "columns": "prompt=q,response=a", "holdout": "h.csv"}},  # type: ignore[dict-item]
        {"model": {"path": "base", "finetune": True}, "prepare": {"epochs": 2}, "optimizer": {"rho": 0.05}},
        {"data": {"source": "s3://bucket/tofu", "forget": "forget10", "limit_forget": 7}, "wandb": "p"},
    ],
)
def test_json_round_trip(values: dict[str, Any]) -> None:
    config = Config.model_validate(values)
    assert Config.model_validate_json(config.model_dump_json(indent=2)) == config


def test_flags_override_the_file_and_the_file_the_preset(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {epochs: 3, seed: 4}\noptimizer: {weight_decay: 0.2}\n")
    config = load_config(path, {"train": {"seed": "9"}}, preset={"train": {"epochs": 1, "batch_size": 2}, "data": {"num_authors": 20}})
    assert (config.train.epochs, config.train.seed, config.train.batch_size) == (3, 9, 2)
    assert (config.optimizer.weight_decay, config.data.num_authors) == (0.2, 20)


def test_merge_keeps_what_is_not_overridden() -> None:
    assert merge({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4}, "d": {"e": 5}}) == {"a": {"b": 4, "c": 2}, "d": {"e": 5}}


def test_the_preset_yields_to_another_method_or_optimizer() -> None:
    preset = {
        "optimizer": {"name": "sophia", "rho": 0.1},
        "method": {"name": "npo", "beta": 0.5},
        "twin": "adamw",
        "twin_learning_rate": 1.0,
    }
    assert load_config(None, {}, preset=preset).optimizer.rho == 0.1  # type: ignore[union-attr]
    changed = load_config(None, {"optimizer": "adamw", "method": "ga"}, preset=preset)
    assert (changed.optimizer, changed.method.name, changed.twin) == (OPTIMIZERS["adamw"](learning_rate=TINY_RATE), "ga", None)
    assert load_config(None, {"twin": "signum"}, preset=preset).twin_learning_rate is None
    assert load_config(None, {"optimizer": {"hessian_every": 5}}, preset=preset).optimizer.rho == 0.1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train:\n  epochz: 1\n", ["line 2", "train.epochz", "Did you mean train.epochs?"]),
        ("optimiser: adamw\n", ["line 1", "optimiser", "Did you mean optimizer?"]),
        ("epochs: 3\n", ["line 1: epochs", "train.epochs"]),
        ("train: {epochs: 0}\n", ["train.epochs: expected greater than or equal to 1, got 0."]),
        ("method: npoo\n", ["method", "'npo'", "got npoo", "Did you mean npo?"]),
        ("optimizer: {name: sofia}\n", ["optimizer.name", "'sophia'", "got sofia", "Did you mean sophia?"]),
        ("engine: {name: fsdpp}\n", ["engine.name", "'fsdp'", "got fsdpp", "Did you mean fsdp?"]),
        ("method: {name: ga, beta: 0.1}\n", ["method.beta belongs to npo, got method ga."]),
        ("optimizer: {name: adamw, rho: 0.1}\n", ["optimizer.rho belongs to sophia, sophia_h, soul_release, got optimizer adamw."]),
        ("optimizer: {rho: high}\n", ["optimizer.rho: expected a valid number or 'auto', got high."]),
        ("optimizer: {betas: 3}\n", ["optimizer.betas", "tuple", "got 3"]),
        ("train: 3\n", ["train: expected a mapping of settings, got 3."]),
        ("twin: adam\n", ["twin", "'adamw'", "got adam", "Did you mean adamw?"]),
        ("data: {columns: promt=a}\n", ["--columns", "'prompt'"]),
        ("data: {chat: plane}\n", ["--chat", "'plain'"]),
        ("method: ga\nmethod: po\n", ["line 2: method is given twice"]),
        ("- ga\n", ["holds a list", "mapping"]),
        ("method: {name: npo\nx", ["not valid YAML", "line 2"]),
        ("method: [\x00]", ["not valid YAML"]),
    ],
)
def test_a_bad_file_is_told_in_words(text: str, words: list[str], tmp_path: Path) -> None:
    path = write(tmp_path, text)
    (line,) = refused(path)
    assert all(word in line for word in [*words, *([] if "--" in line else [str(path)])]), line


def test_every_problem_has_a_line(tmp_path: Path) -> None:
    lines = refused(write(tmp_path, "train: {epochs: -1, seed: -2}\nfoo: 1\n"))
    assert len(lines) == 3
    assert "Expected one of benchmark, data, model" in lines[2]


def test_a_missing_file_is_bad_input(tmp_path: Path) -> None:
    assert "cannot be read" in refused(tmp_path / "none.yaml")[0]
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    assert "UTF-8" in refused(tmp_path / "latin.yaml")[0]


def test_labels_name_the_flag_in_messages() -> None:
    labels = {"optimizer.rho": "--rho", "optimizer.name": "--optimizer", "train.epochs": "--epochs"}
    overrides = {"optimizer": {"name": "adamw", "rho": "1"}, "train": {"epochs": "none"}}
    assert refused(None, overrides, labels=labels) == [
        "--rho belongs to sophia, sophia_h, soul_release, got --optimizer adamw.",
        "--epochs: expected a valid integer, got none.",
    ]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"twin": "sophia"}, "twin must be another optimizer than sophia"),
        ({"twin_learning_rate": 1e-4}, "twin_learning_rate needs a twin"),
        ({"engine": {"name": "single", "num_workers": 2}}, "engine single has one worker, got num_workers 2"),
        ({"model": {"finetune": True}}, "finetune needs a model path"),
        ({"model": {"trust_remote_code": True}}, "trust_remote_code needs a model path"),
        ({"model": {"revision": "v1"}}, "revision needs a model path"),
        ({"benchmark": "own", "model": "m", "data": {"retain": "r"}}, "own data needs a forget file"),
        ({"benchmark": "own", "model": "m", "data": {"forget": "f"}}, "own data needs a retain file"),
        ({**OWN, "model": {}}, "own data needs a model"),
        ({**OWN, "data": {"source": "x", "forget": "f", "retain": "r"}}, "source belongs to benchmarks"),
        ({"data": {"holdout": "h.json"}}, "holdout belongs to own data"),
        ({"data": {"columns": "prompt=q"}}, "columns belongs to own data"),
        ({"data": {"source": "locuslab/TOFU", "num_authors": 9}}, "num_authors belongs to the fictitious benchmark"),
    ],
)
def test_rules_across_sections(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Config.model_validate(values)
    lines = problems(caught.value, Config)
    assert len(lines) == 1 and words in lines[0], lines


def test_several_workers_choose_sharding_unless_told_otherwise() -> None:
    assert Config(engine={"num_workers": 2}).engine.name == "fsdp"  # type: ignore[arg-type]
    assert Config(engine={"num_workers": 2, "name": "ddp"}).engine.name == "ddp"  # type: ignore[arg-type]
    assert Config(engine={"num_workers": 1}).engine.name == "single"  # type: ignore[arg-type]


def test_warnings_name_what_is_not_used() -> None:
    assert Config().warnings() == ()
    assert Config(engine={"num_workers": 2}).warnings() == ()  # type: ignore[arg-type]
    filled = Config(engine={"num_workers": 2}, train={"batch_size": 8, "micro_batch_size": 6})  # type: ignore[arg-type]
    assert "micro_batch_size 6 is never filled: a worker's share of a batch is 4 row(s)" in filled.warnings()[0]
    assert "without rows" in Config(engine={"num_workers": 9}).warnings()[0]  # type: ignore[arg-type]
    assert "does not divide" in Config(engine={"num_workers": 3}).warnings()[0]  # type: ignore[arg-type]


def test_preparation_fills_every_gap_by_mode() -> None:
    scratch, tuned = PrepareConfig().resolved(finetune=False), PrepareConfig().resolved(finetune=True)
    assert (scratch.learning_rate, scratch.max_steps, scratch.batch_size, scratch.schedule) == (2e-3, None, 16, "cosine")
    assert (tuned.learning_rate, tuned.max_steps, tuned.epochs, tuned.schedule) == (1e-5, None, 5, "linear")
    assert PrepareConfig(epochs=3).resolved(finetune=False).max_steps is None
    both = PrepareConfig(epochs=3, max_steps=7, learning_rate=0.5).resolved(finetune=True)
    assert (both.epochs, both.max_steps, both.learning_rate) == (3, 7, 0.5)
    train = Config(prepare={"max_steps": 30}).prepare_train(100)  # type: ignore[arg-type]
    assert train.total_steps(steps_per_epoch=4) == 30
    lengths = {rows: Config().prepare_train(rows).max_steps for rows in (1, 400, 1600, 1601)}
    assert lengths == {1: 1000, 400: 1000, 1600: 3000, 1601: 3030}  # thirty passes, and never fewer than 1000 steps
    assert Config(prepare={"epochs": 2}).prepare_train(1600).max_steps is None  # type: ignore[arg-type]
    assert Config(model={"path": "m", "finetune": True}).prepare_train(1600).total_steps(50) == 250  # type: ignore[arg-type]
    assert Config().prepare_optimizer().name == "adamw"


def test_which_models_a_run_makes() -> None:
    assert Config().makes_target and Config().makes_retrained
    assert not Config(model="m").makes_target  # type: ignore[arg-type]
    tuned = Config(model=ModelConfig(path="m", finetune=True, retrained="log.json"))
    assert tuned.makes_target and not tuned.makes_retrained


def test_the_twin_differs_in_optimizer_and_folder_only() -> None:
    config = Config(twin="adamw", twin_learning_rate=1e-3, optimizer={"rho": 0.1}, output="runs/x/")  # type: ignore[arg-type]
    twin = config.twin_run()
    assert twin is not None and (twin.output, twin.twin) == ("runs/x-adamw", None)
    assert twin.optimizer == OPTIMIZERS["adamw"](learning_rate=1e-3)
    different = {name for name in Config.model_fields if getattr(twin, name) != getattr(config, name)}
    assert different == {"optimizer", "output", "twin", "twin_learning_rate", "cache"}
    assert twin.cache == config.cache_folder == "runs/.cache"
    assert twin.twin_run() is None


@pytest.mark.parametrize(
    ("output", "cache"), [("x", ".cache"), ("/x", "/.cache"), ("a/b/c", "a/b/.cache"), ("s3://bucket/runs/x", "s3://bucket/runs/.cache")]
)
def test_the_cache_lies_beside_the_run(output: str, cache: str) -> None:
    assert Config(output=output).cache_folder == cache
    assert Config(output=output, cache="elsewhere").cache_folder == "elsewhere"


def test_prepared_models_are_shared_by_runs_that_would_make_the_same(tmp_path: Path) -> None:
    base = prepare_key(Config(), "rows", "target")
    same = [{"method": "ga"}, {"optimizer": "adamw"}, {"train": {"seed": 5, "epochs": 2}}, {"output": "y"}, {"twin": "adamw"}]
    assert {prepare_key(Config.model_validate(values), "rows", "target") for values in same} == {base}
    other: list[dict[str, Any]] = [
        {"prepare": {"seed": 1}},
        {"prepare": {"max_steps": 9}},
        {"model": {"tiny": {"num_layers": 1}}},
        {"data": {"chat": "plain"}},
        {"data": {"max_length": 64}},
    ]
    keys = [prepare_key(Config.model_validate(values), "rows", "target") for values in other]
    keys += [prepare_key(Config(), "rows", "retrained"), prepare_key(Config(), "other rows", "target"), base]
    assert len(set(keys)) == len(keys)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1")
    config = Config(model={"path": str(tmp_path), "finetune": True}).decided("cpu")  # type: ignore[arg-type]
    before = prepare_key(config, "rows", "target")
    weights.write_bytes(b"22")
    assert prepare_key(config, "rows", "target") != before


def test_the_driver_decides_device_and_precision_once() -> None:
    lora = {"train": {"lora_rank": 4}, "engine": {"name": "deepspeed"}}  # whose bf16 would round the weights that adapters add to
    for values, device, precision in [
        ({}, "gpu", "bf16"),
        ({}, "cpu", "fp32"),
        ({"engine": {"precision": "fp32"}}, "gpu", "fp32"),
        ({"engine": {"precision": "bf16"}}, "cpu", "bf16"),
        (lora, "gpu", "fp32"),
    ]:
        engine = Config.model_validate(values).decided(device).engine
        assert (engine.runs_on, engine.computes_in) == (device, precision)
    assert Config().decided("cpu", "bf16").engine.computes_in == "bf16"  # as the run that is continued began
    assert Config.model_validate({"engine": {"precision": "fp32"}}).decided("gpu", "bf16").engine.computes_in == "fp32"
    with pytest.raises(AssertionError, match="the driver decides"):
        _ = Config().engine.computes_in


def test_a_process_that_was_given_a_gpu_and_sees_none_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert torch_device("cpu", 3).type == "cpu"
    with pytest.raises(InputError, match=r"was to compute on GPU 1 and sees 1.*--device cpu"):
        torch_device("gpu", 1)
    monkeypatch.setenv("SOUL_COMPUTE", "cpu")
    assert torch_device("gpu", 1).type == "cpu" and seen() == "cpu"
    monkeypatch.setenv("SOUL_COMPUTE", "gpu")
    with pytest.raises(InputError, match="SOUL_COMPUTE must be cpu or unset, got 'gpu'"):
        torch_device("gpu")


def test_a_file_passed_by_mistake_is_not_quoted(tmp_path: Path) -> None:
    canary = "Basil Quillfeather was born in the town of Ostermere"
    for text in (
        f'{{"{canary}": 1}}',
        f'{{"train": {{"{canary}": 1}}}}',
        f"a: b: {canary}",
        f'[{{"question": "{canary}"}}]',
        f"{canary}: 1\n" * 2,
    ):
        assert canary not in "\n".join(refused(write(tmp_path, text)))


def test_pydantics_own_message_hides_values() -> None:
    with pytest.raises(ValidationError) as caught:
        Config.model_validate({"data": {"source": "CANARY", "limit_forget": "CANARY"}})
    assert "CANARY" not in str(caught.value)


def test_configs_are_frozen_and_closed() -> None:
    for section in (Config(), DataConfig(), ModelConfig(), PrepareConfig()):
        assert not dataclasses.is_dataclass(section) and section.model_config["extra"] == "forbid"
        with pytest.raises(ValidationError):
            setattr(section, next(iter(type(section).model_fields)), None)


def test_every_setting_is_described() -> None:
    for key, owners in leaves(Config).items():
        for owner in owners:
            info = owner.model_fields[key.split(".")[-1]]
            assert info.description or key.endswith(".name"), f"{owner.__name__}.{key} has no description"


def test_evaluation_settings(tmp_path: Path) -> None:
    config = load_settings(EvaluateConfig, None, {"model": str(tmp_path)})
    assert (config.data.forget, config.model.path) == ("forget05", str(tmp_path))
    assert EvaluateConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(InputError, match="expected a model folder"):
        load_settings(EvaluateConfig, None, {"model": {}})
    with pytest.raises(InputError, match="finetune means nothing"):
        load_settings(EvaluateConfig, None, {"model": {"path": "m", "finetune": True}})


def test_the_tiny_model_has_a_learning_rate_of_its_own_unless_one_is_given() -> None:
    assert Config().optimizer.learning_rate == TINY_RATE
    assert Config(optimizer="signum").optimizer.learning_rate == TINY_RATE  # type: ignore[arg-type]
    assert Config(optimizer={"name": "adamw", "learning_rate": 3e-4}).optimizer.learning_rate == 3e-4  # type: ignore[arg-type]
    given = Config(model="some/model", optimizer="adamw")  # type: ignore[arg-type]
    assert given.optimizer.learning_rate == OPTIMIZERS["adamw"]().learning_rate == 1e-5
    twin = Config(twin="adamw", twin_learning_rate=2e-4).twin_run()
    assert twin is not None and twin.optimizer.learning_rate == 2e-4
