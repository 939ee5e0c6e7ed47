"""A model left in its files: the skeleton and the weights are those of the loaded model, and no more is read than asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from soul.models.load import load_model
from soul.models.stored import StoredModel, in_memory, stored_model
from soul.records import InputError
from tests.train.test_families import FAMILIES, GROUPED, assert_same_ties, family


@pytest.mark.parametrize("name", FAMILIES)
def test_the_stored_model_is_the_loaded_one(name: str, tmp_path: Path) -> None:
    family(name).save_pretrained(tmp_path, max_shard_size="20KB" if "llama" in name else "5GB")  # type: ignore[operator]
    stored, loaded = stored_model(str(tmp_path)), load_model(str(tmp_path))
    if stored is None:
        assert name in ("mixtral, experts", "gpt_neox"), "transformers joins or renames their weights when it loads them"
        return
    assert all(parameter.is_meta for parameter in stored.skeleton.parameters())
    assert_same_ties(stored.skeleton, loaded)
    assert set(stored.weights) == {key for key, _ in loaded.named_parameters()} and len(stored.weights) == len(list(stored.weights))
    for key, parameter in loaded.named_parameters():
        assert torch.equal(stored.weights[key], parameter), key
    buffers = dict(stored.skeleton.named_buffers())
    assert buffers.keys() == dict(loaded.named_buffers()).keys()
    for key, buffer in loaded.named_buffers():
        assert not buffers[key].is_meta and torch.equal(buffers[key], buffer), key
    assert stored.skeleton.config.to_diff_dict() == loaded.config.to_diff_dict()  # type: ignore[operator, union-attr]
    assert stored.skeleton.generation_config.to_dict() == loaded.generation_config.to_dict()  # type: ignore[operator, union-attr]
    whole, ids = in_memory(stored).eval(), torch.arange(3, 12)[None]
    assert torch.equal(whole(input_ids=ids).logits, loaded.eval()(input_ids=ids).logits)
    assert in_memory(whole) is whole


def test_weights_are_read_in_float32(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**GROUPED)).bfloat16().save_pretrained(tmp_path)
    stored = stored_model(str(tmp_path))
    assert isinstance(stored, StoredModel)
    assert {p.dtype for p in stored.skeleton.parameters()} == {value.dtype for value in stored.weights.values()} == {torch.float32}


def test_modules_register_parameters_as_ever_afterwards(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**GROUPED)).save_pretrained(tmp_path)
    stored_model(str(tmp_path))
    assert not nn.Linear(2, 2).weight.is_meta


def test_files_that_do_not_match_are_left_to_the_loader(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**GROUPED)).save_pretrained(tmp_path)
    LlamaConfig(**{**GROUPED, "intermediate_size": 40}).save_pretrained(tmp_path)
    assert stored_model(str(tmp_path)) is None
    LlamaConfig(**GROUPED).save_pretrained(tmp_path)
    assert stored_model(str(tmp_path)) is not None
    (tmp_path / "adapter_config.json").write_text("{}")  # transformers would add the adapters
    assert stored_model(str(tmp_path)) is None
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    assert stored_model(str(tmp_path)) is None
    with pytest.raises(InputError, match="does not exist"):
        stored_model(str(tmp_path / "nowhere"))


def test_one_file_goes_before_an_index_as_in_the_loader(tmp_path: Path) -> None:
    for seed in (1, 2):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**GROUPED)).save_pretrained(tmp_path, max_shard_size="20KB" if seed == 1 else "5GB")
        if seed == 1:
            kept = {path: path.read_bytes() for path in tmp_path.glob("model*")}
    for path, data in kept.items():
        path.write_bytes(data)
    stored, loaded = stored_model(str(tmp_path)), load_model(str(tmp_path))
    assert isinstance(stored, StoredModel) and (tmp_path / "model.safetensors.index.json").exists()
    assert all(torch.equal(stored.weights[key], parameter) for key, parameter in loaded.named_parameters())
    (tmp_path / "model.safetensors").unlink()
    next(tmp_path.glob("model-*.safetensors")).unlink()
    assert stored_model(str(tmp_path)) is None  # for the loader to complain of


def test_ties_that_the_files_contradict_are_left_to_the_loader(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**GROUPED, tie_word_embeddings=True)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    save_file(weights | {"lm_head.weight": head}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert stored_model(str(tmp_path)) is not None
    save_file(weights | {"lm_head.weight": head + 1}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert stored_model(str(tmp_path)) is None


def test_a_file_that_is_cut_short_is_bad_input(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**GROUPED)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="no causal language model could be loaded from"):
        stored_model(str(tmp_path))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_weights_are_read_to_where_and_as_what_they_are_wanted(dtype: torch.dtype | None, tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**GROUPED, tie_word_embeddings=True)).save_pretrained(tmp_path)
    stored, loaded = stored_model(str(tmp_path)), load_model(str(tmp_path))
    assert isinstance(stored, StoredModel)
    model = in_memory(stored, device="cpu", dtype=dtype)
    assert_same_ties(model, loaded)
    for key, parameter in loaded.named_parameters():
        found = model.get_parameter(key)
        assert torch.equal(found, parameter.to(dtype or torch.float32)) and found.dtype == (dtype or torch.float32), key
