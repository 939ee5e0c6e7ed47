"""Records in TOFU's shape whose lengths fit no batch evenly."""

from __future__ import annotations

import random
import string

import torch

from soul.records import Record

CPU = torch.device("cpu")
WORDS = [first + vowel + last for first in "bdfgklmnprst" for vowel in "aeiou" for last in "lnrs"]
ALPHABET = " ".join([*WORDS, string.ascii_letters])


def sentence(rng: random.Random, longest: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, longest)))


def make_records(split: str, count: int, *, num_wrong: int, paraphrased: bool, seed: int = 0) -> list[Record]:
    rng = random.Random(f"{split}-{seed}")
    return [
        Record(
            id=f"{split}/{row}",
            prompt=f"What of {sentence(rng, 9)}?",
            response=sentence(rng, 14),
            paraphrase=sentence(rng, 14) if paraphrased else None,
            perturbed=tuple(sentence(rng, 14) for _ in range(num_wrong)),
            paraphrased_prompt=f"Say {sentence(rng, 5)}." if paraphrased else None,
        )
        for row in range(count)
    ]


def tofu_like_splits() -> dict[str, list[Record]]:
    return {
        "forget": make_records("forget", 7, num_wrong=5, paraphrased=True),
        "retain": make_records("retain", 5, num_wrong=5, paraphrased=True),
        "real_authors": make_records("real_authors", 4, num_wrong=3, paraphrased=False),
        "world_facts": make_records("world_facts", 3, num_wrong=3, paraphrased=False),
        "holdout": make_records("holdout", 6, num_wrong=0, paraphrased=False),
    }
