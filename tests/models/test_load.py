"""Model folders: what is saved is what is loaded, folders appear whole, and bad ones are refused with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from soul.models.load import check_model_folder, load_model, load_tokenizer, save_model
from soul.models.tiny import TinyConfig, tiny_model, tiny_tokenizer
from soul.records import InputError

SHAPE = TinyConfig(hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, vocab_size=300, max_length=32)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer(["a b c"], 300)


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return tiny_model(SHAPE, tokenizer, seed=1)


def assert_same_weights(one: Any, other: Any) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype and torch.equal(value, second[name]), name


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_is_loaded_bit_for_bit(tied: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=tied
    )
    model = LlamaForCausalLM(config)
    save_model(tmp_path / "deep" / "model", model, tokenizer)
    loaded = load_model(str(tmp_path / "deep" / "model"))
    assert_same_weights(loaded, model)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    stored = load_file(tmp_path / "deep" / "model" / "model.safetensors")
    assert ("lm_head.weight" in stored) != tied  # a tied weight is stored once


def test_the_tokenizer_comes_back(tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM, tmp_path: Path) -> None:
    save_model(tmp_path / "model", model, tokenizer)
    loaded = load_tokenizer(str(tmp_path / "model"))
    text = "a c b: Ğ"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)


def test_weights_are_cast_as_asked(tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_model(tmp_path / "model", model, tokenizer, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {value.dtype for value in load_file(tmp_path / "model" / "model.safetensors").values()} == {torch.bfloat16}
    loaded = load_model(str(tmp_path / "model"))  # float32 unless told otherwise: unlearning steps vanish in bfloat16
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, before[name].bfloat16().float()), name
    assert load_model(str(tmp_path / "model"), dtype=torch.bfloat16).dtype == torch.bfloat16
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert str(model.config.dtype).endswith("float32")  # the model in memory is as it was


def test_given_weights_replace_the_models_own(tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM, tmp_path: Path) -> None:
    other = tiny_model(SHAPE, tokenizer, seed=2)
    save_model(tmp_path / "model", model, tokenizer, state=other.state_dict())
    assert_same_weights(load_model(str(tmp_path / "model")), other)


def test_dropout_is_off_whatever_the_config_says(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=61, hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2)
    config.attention_dropout = 0.5
    save_model(tmp_path / "model", LlamaForCausalLM(config), tokenizer)
    loaded = load_model(str(tmp_path / "model")).train()
    ids = torch.arange(3, 20)[None]
    assert loaded.config.attention_dropout == 0.0
    assert torch.equal(loaded(input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_an_architecture_without_sdpa_is_loaded_with_the_attention_it_has(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = Gemma2Config(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
    )
    model = Gemma2ForCausalLM(config)
    save_model(tmp_path / "model", model, tokenizer)
    assert_same_weights(load_model(str(tmp_path / "model")), model)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_saving_again_replaces_the_folder(tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM, tmp_path: Path) -> None:
    save_model(tmp_path / "model", model, tokenizer)
    (tmp_path / "model" / "left-over.safetensors").touch()
    other = tiny_model(SHAPE, tokenizer, seed=2)
    save_model(tmp_path / "model", other, tokenizer)
    assert_same_weights(load_model(str(tmp_path / "model")), other)
    assert not (tmp_path / "model" / "left-over.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("there_before", [True, False])
def test_a_save_that_fails_changes_nothing(
    there_before: bool, tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if there_before:
        save_model(tmp_path / "model", model, tokenizer)
    before = files(tmp_path)

    def disk_full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", disk_full)  # the weights are written by then
    with pytest.raises(OSError, match="no space left"):
        save_model(tmp_path / "model", tiny_model(SHAPE, tokenizer, seed=2), tokenizer)
    assert files(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["model"] if there_before else [])


def test_a_saved_folder_can_be_read_by_others(tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    save_model(tmp_path / "model", model, tokenizer)
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "plain").stat().st_mode


def folder_with(tmp_path: Path, *names: str) -> str:
    for name in names:
        (tmp_path / name).write_text("{}")
    return str(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("model.safetensors",), "has no config.json. Pass a Hugging Face model folder"),
        (("config.json",), r"has no weights, expected \*.safetensors. Convert it with save_pretrained"),
        (("config.json", "pytorch_model.bin"), r"has only pickled weights \(pytorch_model.bin\), expected \*.safetensors. Convert it"),
    ],
)
def test_folders_that_cannot_be_loaded_safely_are_refused(names: tuple[str, ...], message: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, *names)
    for refuse in (check_model_folder, load_model):
        with pytest.raises(InputError, match=message):
            refuse(folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    for missing in (str(tmp_path / "nowhere"), "./nowhere", "runs/x/model"):
        with pytest.raises(InputError, match=r"does not exist\. Pass a folder with config\.json and"):
            load_model(missing)
    check_model_folder("meta-llama/Llama-3.2-1B-Instruct")  # a hub id is not looked for here


def test_a_broken_folder_is_one_line(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "config.json", "model.safetensors")
    for load in (load_model, load_tokenizer):
        with pytest.raises(InputError, match=r"could be loaded from|no whole safetensors file") as caught:
            load(folder)
        assert "\n" not in str(caught.value)


def test_damaged_weights_are_refused(tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM, tmp_path: Path) -> None:
    save_model(tmp_path / "model", model, tokenizer)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match=r"could be loaded from|no whole safetensors file"):
        load_model(str(tmp_path / "model"))
