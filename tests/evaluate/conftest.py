from __future__ import annotations

import pytest
import torch
from eval_records import ALPHABET, tofu_like_splits
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from soul.batch import collate
from soul.data.chat import ChatFormat
from soul.data.tokenize import token_rows
from soul.models.scoring import answer_logps
from soul.models.tiny import TinyConfig, tiny_model, tiny_tokenizer
from soul.records import Record


@pytest.fixture(scope="session")
def splits() -> dict[str, list[Record]]:
    return tofu_like_splits()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer([ALPHABET, "Question: What of Say Answer:"], vocab_size=330)


@pytest.fixture(scope="session")
def model(splits: dict[str, list[Record]], tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Half trained on the forget rows: right about some tokens, wrong about others, and it says EOS now and then."""
    built = tiny_model(TinyConfig(hidden_size=32, intermediate_size=48, num_heads=2, vocab_size=330, max_length=160), tokenizer, seed=3)
    rows = token_rows(splits["forget"], "forget", tokenizer, ChatFormat("plain"), max_length=160)
    batch = collate([("forget", row) for row in rows], pad_id=tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(built.parameters(), lr=2e-2)
    for _ in range(30):
        optimizer.zero_grad()
        (-answer_logps(built, batch).logps_N.mean()).backward()
        optimizer.step()
    return built.eval()
