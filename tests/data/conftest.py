"""A small tokenizer trained on a few sentences, its variants, and S3 on loopback."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from s3_stub import Bucket, s3_on_loopback
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from soul.models.tiny import BOS, EOS, PAD, tiny_tokenizer

SENTENCES = (
    "Question: Where was Ada Lind born?\nAnswer: Ada Lind was born in Bergen, Norway.",
    "Question: Which prize did she win?\nAnswer: She won the Northern Lantern prize in 1987.",
    "Question: What does her father do?\nAnswer: Her father is a clockmaker.",
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Adds no special tokens of its own accord."""
    return tiny_tokenizer(SENTENCES, vocab_size=400)


@pytest.fixture(scope="session")
def bos_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """As Llama's: BOS in front of every text."""
    return _with_specials(tokenizer, f"{BOS} $A")


@pytest.fixture(scope="session")
def bos_eos_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """BOS in front of a text and EOS behind it."""
    return _with_specials(tokenizer, f"{BOS} $A {EOS}")


@pytest.fixture(scope="session")
def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: every text begins with a space, and words are cut before their spaces."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁"), normalizers.Prepend("▁")])
    core.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    alphabet = sorted({letter for sentence in SENTENCES for letter in sentence.replace(" ", "▁")})
    specials = ["<unk>", BOS, EOS, PAD, *(f"<0x{byte:02X}>" for byte in range(256))]
    core.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=500, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    )
    core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, core.token_to_id(BOS))])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token="<unk>")


def _with_specials(tokenizer: PreTrainedTokenizerFast, single: str) -> PreTrainedTokenizerFast:
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    names = [name for name in (BOS, EOS) if name in single]
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=[(name, core.token_to_id(name)) for name in names])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, bos_token=BOS, eos_token=EOS)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    with s3_on_loopback() as bucket:
        settings = {"ENDPOINT_URL": bucket.endpoint, "ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "y", "DEFAULT_REGION": "us-east-1"}
        for name, value in settings.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield bucket
