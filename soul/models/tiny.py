"""The tiny Llama of the demo and the tests: built from scratch, with a tokenizer trained on the rows to keep.

Sizes follow first measurements (reference/results.md of the project's notes): two layers of width 128 memorise a few hundred
question-answer pairs in about a thousand steps on one CPU core.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from soul.records import Record

if TYPE_CHECKING:  # two seconds that a command line's --help need not take
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

WORLD_SETS = ("real_authors", "world_facts")  # what a model from scratch also learns: no pre-training has taught it
KEPT_SPLITS = ("retain", *WORLD_SETS)
PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"


class TinyConfig(BaseModel):
    """Shape of a Llama trained from scratch."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: Literal["tiny"] = "tiny"
    hidden_size: int = Field(128, ge=8, description="width of the residual stream")
    intermediate_size: int = Field(336, ge=8, description="width of the SwiGLU layer")
    num_layers: int = Field(2, ge=1, description="decoder blocks")
    num_heads: int = Field(4, ge=1, description="attention heads")
    vocab_size: int = Field(4000, ge=300, description="byte-level BPE vocabulary, trained on the rows to keep")
    max_length: int = Field(512, ge=16, description="longest sequence, tokens")

    @model_validator(mode="after")
    def _heads_of_even_width(self) -> Self:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size must be a multiple of {2 * self.num_heads} (two for each of {self.num_heads} heads: positions rotate pairs), "
                f"got {self.hidden_size}. Change hidden_size or num_heads."
            )
        return self


def kept_texts(splits: Mapping[str, Sequence[Record]]) -> Iterator[str]:
    """What the tokenizer of a tiny model is trained on: the rows to keep, in the plain format.

    Never the rows to forget. A tokenizer with tokens for their names makes them shorter and likelier than the rows of a holdout set, and
    then even a model that has seen neither tells them apart.
    """
    for split in KEPT_SPLITS:
        for record in splits.get(split, ()):
            yield f"Question: {record.prompt}\nAnswer:"
            yield f" {record.response}"


def tiny_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with distinct pad, bos and eos; deterministic in its texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, bos_token=BOS, eos_token=EOS)


def tiny_model(config: TinyConfig, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> LlamaForCausalLM:
    """Random weights, a pure function of (config, tokenizer, seed); leaves the global random state as it was."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the GPUs, which are not restored
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_heads,
                max_position_embeddings=config.max_length,
                tie_word_embeddings=True,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                attention_dropout=0.0,
            )
        )
