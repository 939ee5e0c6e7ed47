"""perf/scaling.py: its models have the sizes of the real ones, and docs/scaling.md says what it prints."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from perf.scaling import (
    BEGIN,
    CARDS,
    END,
    ENGINES,
    MODELS,
    USABLE,
    Llama,
    Setting,
    fewest_workers,
    sent_bytes,
    tables,
    with_tables,
    worker_bytes,
)
from soul.plan import shape_of

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
COUNTS = (1, 2, 4, 8, 16, 32, 64)
SETTING = Setting("sophia", 1024, 1, True)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_the_formula_counts_what_transformers_builds(kv_heads: int, tied: bool) -> None:
    sizes = Llama("small", width=48, inner=100, blocks=3, vocabulary=501, kv=kv_heads * 12, tied=tied)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=100, num_hidden_layers=3, vocab_size=501, num_attention_heads=4, num_key_value_heads=kv_heads
    )
    config.tie_word_embeddings = tied
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    built = shape_of(model, hidden_size=48, intermediate_size=100, vocab_size=501)
    for what in ("num_params", "num_blocks", "block_params", "root_params"):
        assert getattr(sizes.shape, what) == getattr(built, what)


def test_the_models_have_the_published_numbers_of_parameters() -> None:
    assert {name: model.shape.num_params for name, model in MODELS.items()} == {
        "1B": 1_235_814_400,
        "3B": 3_212_749_824,
        "7B": 6_738_415_616,
        "13B": 13_015_864_320,
        "70B": 70_553_706_496,
    }


def test_only_ddp_gains_nothing_from_more_workers() -> None:
    for engine in ENGINES:
        sizes = [worker_bytes(MODELS["7B"], engine, count, SETTING) for count in COUNTS]
        assert all(more <= fewer for fewer, more in pairwise(sizes))
        assert (sizes[0] == sizes[-1]) == (engine == "ddp")


def test_the_fewest_workers_fit_and_half_of_them_do_not() -> None:
    for card in CARDS:
        count = fewest_workers(MODELS["7B"], "fsdp", card, SETTING, COUNTS)
        assert count is not None
        assert worker_bytes(MODELS["7B"], "fsdp", count, SETTING) <= USABLE * card * 1e9
        assert count == 1 or worker_bytes(MODELS["7B"], "fsdp", count // 2, SETTING) > USABLE * card * 1e9
    assert fewest_workers(MODELS["70B"], "ddp", 80, SETTING, COUNTS) is None


def test_a_lone_worker_sends_nothing_and_accumulation_costs_sharded_engines_only() -> None:
    model = MODELS["1B"]
    assert {sent_bytes(model, engine, 1, 3) for engine in ENGINES} == {0.0}
    growth = {engine: sent_bytes(model, engine, 8, 3) / sent_bytes(model, engine, 8, 1) for engine in ENGINES}
    assert growth == {"ddp": 1, "fsdp": 3, "deepspeed 1": 1, "deepspeed 2": pytest.approx(14 / 6), "deepspeed 3": 3}


def test_the_document_holds_what_the_script_prints() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    assert with_tables(text, tables(list(MODELS), COUNTS, SETTING)) == text, "soul.plan has changed: python -m perf.scaling --write"
