"""Architectures that differ where sharding and scoring could notice: norms, biases, soft-capping, untied heads, learned positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from soul.batch import Batch, collate
from soul.models.scoring import answer_logits, answer_logps
from soul.records import InputError
from soul.train.engine import EngineConfig
from soul.train.engines import make_engine
from soul.train.sharding import decoder_blocks
from tests.train.engine_runs import VOCAB, ragged_stores

NUM_BLOCKS = 3
HEADS = {"num_attention_heads": 4, "num_hidden_layers": NUM_BLOCKS, "hidden_size": 24, "max_position_embeddings": 64, "vocab_size": VOCAB}
GROUPED = {**HEADS, "num_key_value_heads": 2, "intermediate_size": 36}
WIDE = {**HEADS, "intermediate_size": 36}

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED, initializer_range=0.2)),
    "qwen2, tied": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED, tie_word_embeddings=True, initializer_range=0.2)),
    "gemma2, soft-capped": lambda: Gemma2ForCausalLM(
        Gemma2Config(**GROUPED, head_dim=6, final_logit_softcapping=2.0, attn_logit_softcapping=3.0, initializer_range=0.2)
    ),
    "phi": lambda: PhiForCausalLM(PhiConfig(**{**WIDE, "num_attention_heads": 3}, initializer_range=0.2)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**WIDE, initializer_range=0.2)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**HEADS, ffn_dim=36, word_embed_proj_dim=24, dropout=0.0, init_std=0.2)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB, n_embd=24, n_head=4, n_layer=NUM_BLOCKS, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        )
    ),
    "mixtral, experts": lambda: MixtralForCausalLM(MixtralConfig(**GROUPED, num_local_experts=4, initializer_range=0.2)),
}


def family(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return FAMILIES[name]()


def ragged_batch() -> Batch:
    stores = ragged_stores()
    return collate([("forget", stores["forget"].row(i)) for i in range(5)], pad_id=0)


def full_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The plain way: logits of every position of every row on its own, unpadded; then those that predict a label."""
    found = []
    for ids_T, mask_T, wanted_T in zip(batch.input_ids_BT, batch.attention_mask_BT, batch.supervised_BT, strict=True):
        length = int(mask_T.sum())
        found.append(model(input_ids=ids_T[None, :length], use_cache=False).logits[0][wanted_T[:length]])
    return torch.cat(found)


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_are_found(name: str) -> None:
    model = family(name)
    blocks = decoder_blocks(model)
    assert len(blocks) == NUM_BLOCKS
    assert {type(block).__name__ for block in blocks} <= set(model._no_split_modules)  # type: ignore[arg-type, operator]


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(InputError, match="list of decoder blocks, got Linear"):
        decoder_blocks(nn.Linear(2, 2))


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_sharded_model_scores_answers_and_learns_like_the_plain_one(name: str) -> None:
    plain, batch = family(name).train(), ragged_batch()
    engine = make_engine(EngineConfig(name="fsdp", device="cpu", max_grad_norm=None), rank=0, world=1, local_rank=0)
    engine.prepare(lambda: family(name), lambda model: torch.optim.SGD(model.parameters(), lr=0.0))
    sharded = engine.model.train()
    assert sum(isinstance(module, FSDPModule) for module in sharded.modules()) == NUM_BLOCKS + 1
    assert_same_ties(sharded, plain)

    expected = full_logits(plain, batch)
    torch.testing.assert_close(answer_logits(sharded, batch), expected, rtol=1e-4, atol=1e-5)
    scores = answer_logps(sharded, batch)
    torch.testing.assert_close(scores.logps_N, expected.log_softmax(-1).gather(-1, batch.targets_N[:, None])[:, 0], rtol=1e-4, atol=1e-5)

    engine.backward(scores.logps_N.sum(), last=True)
    answer_logps(plain, batch).logps_N.sum().backward()
    gradients = {key: parameter.grad for key, parameter in plain.named_parameters()}
    for key, parameter in sharded.named_parameters():
        assert parameter.grad is not None, key
        torch.testing.assert_close(parameter.grad.full_tensor(), gradients[key], rtol=1e-4, atol=1e-4)  # type: ignore[attr-defined]


def assert_same_ties(one: nn.Module, other: nn.Module) -> None:
    def names(model: nn.Module, *, unique: bool) -> list[str]:
        return [name for name, _ in model.named_parameters(remove_duplicate=unique)]

    for unique in (True, False):
        assert names(one, unique=unique) == names(other, unique=unique)


def test_pickling_shares_a_skeleton_not_the_weights(monkeypatch: pytest.MonkeyPatch, group_of_one: Any) -> None:
    sent: list[Any] = []
    broadcast = dist.broadcast_object_list
    monkeypatch.setattr(dist, "broadcast_object_list", lambda payload: (sent.append(list(payload)), broadcast(payload)))
    engine = make_engine(EngineConfig(name="fsdp", device="cpu"), rank=0, world=1, local_rank=0)
    wide = LlamaConfig(**{**GROUPED, "vocab_size": 50_000})
    engine.prepare(lambda: LlamaForCausalLM(wide), lambda model: torch.optim.SGD(model.parameters(), lr=0.0))
    assert sum(parameter.numel() for parameter in engine.model.parameters()) * 4 > 9_000_000
    assert max(len(item) for payload in sent for item in payload if isinstance(item, bytes)) < 50_000
