"""What every comparison runs on: rows of real, ragged length, and a model of a published shape with random weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from soul.batch import TokenRow
from soul.data.chat import ChatFormat
from soul.data.feed import LocalFeed
from soul.data.pairing import PairedPlan
from soul.data.sources import FICTITIOUS, open_benchmark
from soul.data.store import TokenStore
from soul.data.tokenize import token_rows
from soul.evaluate.likelihood import score_answers
from soul.models.tiny import TinyConfig, tiny_model, tiny_tokenizer
from soul.records import Record
from soul.train.config import TrainConfig

TOFU = Path(__file__).resolve().parents[1] / ".." / "shared" / "data" / "tofu"
SPLITS = ("forget", "retain")
# Llama shapes; `tiny` is the demo's. 50m is the largest that a CPU core steps in about a second.
SHAPES: dict[str, dict[str, Any]] = {
    "50m": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 32000},
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000},
}
MODELS = ("tiny", *SHAPES)


@dataclass(frozen=True)
class Workload:
    """One model and one set of rows for all sides. `precision` is the compute precision; weights stay float32."""

    model_name: str
    source: str
    records: Mapping[str, Sequence[Record]]
    tokenizer: PreTrainedTokenizerFast
    device: torch.device
    precision: str
    batch_size: int
    micro_batch_size: int

    def build_model(self) -> LlamaForCausalLM:
        """The same weights at every call, on the device."""
        if self.model_name == "tiny":
            model: Any = tiny_model(TinyConfig(), self.tokenizer, seed=0)
            model = model.to(self.device)
        else:
            torch.manual_seed(0)
            ids = {"pad_token_id": self.pad_id, "bos_token_id": self.tokenizer.bos_token_id, "eos_token_id": self.tokenizer.eos_token_id}
            with self.device:
                model = LlamaForCausalLM(LlamaConfig(**SHAPES[self.model_name], **ids, max_position_embeddings=512))
        model.config.use_cache = False
        assert isinstance(model, LlamaForCausalLM)
        return model

    @property
    def pad_id(self) -> int:
        pad_id = self.tokenizer.pad_token_id
        assert isinstance(pad_id, int)
        return pad_id

    @cached_property
    def rows(self) -> dict[str, list[TokenRow]]:
        return {split: token_rows(self.records[split], split, self.tokenizer, ChatFormat(), max_length=512) for split in SPLITS}

    @cached_property
    def rows_with_reference(self) -> dict[str, list[TokenRow]]:
        """The rows with the forget answers' log-probabilities under the model as it is built: one pass, before training."""
        scores = score_answers(self.build_model(), self.rows["forget"], pad_id=self.pad_id, device=self.device)
        known = [replace(row, reference_logp=sum(score.logps)) for row, score in zip(self.rows["forget"], scores, strict=True)]
        return {**self.rows, "forget": known}

    def feed(self, *, reference: bool, window: int = TrainConfig().bucket_window) -> LocalFeed:
        """The steps of a single rank; `window` 1 draws rows whatever their length."""
        rows = self.rows_with_reference if reference else self.rows
        stores = {split: TokenStore.of_rows(rows[split]) for split in SPLITS}
        plan = PairedPlan({split: store.lengths_R for split, store in stores.items()}, batch_size=self.batch_size, seed=0, window=window)
        return LocalFeed(plan, stores, 0, 1, self.micro_batch_size, self.pad_id)

    def describe(self) -> dict[str, Any]:
        lengths = [len(row.ids) for split in SPLITS for row in self.rows[split]]
        answers = [row.num_supervised for split in SPLITS for row in self.rows[split]]
        return {
            "model": self.model_name,
            "rows": {split: len(self.rows[split]) for split in SPLITS},
            "source": self.source,
            "tokens_per_row": {"mean": sum(lengths) / len(lengths), "longest": max(lengths), "answer_share": sum(answers) / sum(lengths)},
            "batch_size": self.batch_size,
            "micro_batch_size": self.micro_batch_size,
            "precision": self.precision,
        }


def make_workload(
    *, model: str, device: str, precision: str, rows: int, batch_size: int, micro_batch_size: int, data: Path | None = None
) -> Workload:
    """`rows` forget rows and twice as many retain rows: of TOFU where its files are, of the invented authors elsewhere."""
    folder = data or TOFU
    source = str(folder) if folder.is_dir() else FICTITIOUS
    splits = open_benchmark(source, forget="forget10", limit_forget=rows, limit_retain=2 * rows).splits
    everything = [f"{record.prompt} {record.response}" for record in open_benchmark(source, forget="forget10").splits["retain"]]
    vocab_size = TinyConfig().vocab_size if model == "tiny" else min(int(SHAPES[model]["vocab_size"]), 32000)
    return Workload(
        model,
        "TOFU" if folder.is_dir() else FICTITIOUS,
        {split: splits[split] for split in SPLITS},
        tiny_tokenizer(everything, vocab_size),
        torch.device(device),
        precision,
        batch_size,
        micro_batch_size,
    )
