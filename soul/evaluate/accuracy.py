"""SOUL's accuracy: is the generated answer nearer to the right answer than to every wrong one, by a sentence-embedding model?

Its offline neighbour, which compares likelihoods instead of generations, is `choice_accuracy`; neither is shown as the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from soul.records import InputError


@dataclass(frozen=True)
class SentenceEncoder:
    """Mean of the last hidden states over real tokens, scaled to length one: what MiniLM and its like were trained for."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    batch_size: int = 64

    @staticmethod
    def load(folder: str | Path, device: torch.device) -> SentenceEncoder:
        """From a Hugging Face folder or hub id with safetensors weights.

        Raises:
            InputError: no encoder can be loaded from there.
        """
        try:
            model = AutoModel.from_pretrained(str(folder), use_safetensors=True, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(str(folder))
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"no sentence-embedding model could be loaded from {folder} ({type(error).__name__}). Expected a folder with config.json, "
                "tokenizer and *.safetensors, such as paraphrase-MiniLM-L6-v2; without one, choice_accuracy is still reported."
            ) from error
        return SentenceEncoder(model.to(device).eval(), tokenizer)

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors on the CPU, shape (number of texts, D). Texts longer than the encoder's input are cut."""
        order = sorted(range(len(texts)), key=lambda position: len(texts[position]))
        parts: list[Tensor] = []
        for start in range(0, len(order), self.batch_size):
            batch = [texts[position] for position in order[start : start + self.batch_size]]
            inputs = self.tokenizer(batch, padding=True, truncation=True, max_length=self._max_length(), return_tensors="pt")
            inputs = inputs.to(self.model.device)
            with torch.inference_mode():
                hidden_BTD = self.model(**inputs).last_hidden_state
            mask_BT1 = inputs["attention_mask"][..., None].to(hidden_BTD.dtype)
            mean_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp_min(1)
            parts.append(torch.nn.functional.normalize(mean_BD, dim=-1).cpu())
        vectors_ND = torch.cat(parts)
        return vectors_ND[torch.argsort(torch.tensor(order))]

    def _max_length(self) -> int:
        positions = getattr(self.model.config, "max_position_embeddings", 512)
        return min(int(self.tokenizer.model_max_length), int(positions))


def nearest_is_right(
    encoder: SentenceEncoder, generated: Sequence[str], rights: Sequence[str], wrongs: Sequence[Sequence[str]]
) -> list[bool]:
    """Per row: cosine to the right answer at least that to every wrong one (a tie counts as right, as in SOUL)."""
    texts = [text for row in zip(generated, rights, wrongs, strict=True) for text in (row[0], row[1], *row[2])]
    vectors_ND = encoder.embed(texts)
    verdicts: list[bool] = []
    start = 0
    for wrong in wrongs:
        row_KD = vectors_ND[start : start + 2 + len(wrong)]
        cosines_K = row_KD[1:] @ row_KD[0]
        verdicts.append(bool((cosines_K[0] >= cosines_K[1:]).all()))
        start += len(row_KD)
    return verdicts
