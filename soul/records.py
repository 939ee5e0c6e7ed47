"""What a row of data is to the rest of the project, as text and as token ids, and the error that bad input raises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class InputError(ValueError):
    """Bad input from the user: the message says what was expected, what was got and what to do, and never quotes a row's text.

    The command line turns it into one line on stderr and exit code 2.
    """


@dataclass(frozen=True, slots=True)
class Record:
    """One question and its answer.

    `perturbed` are plausible wrong answers, `paraphrase` the right answer in other words, `paraphrased_prompt` the question in
    other words. Metrics that need a missing field are null with a reason.
    """

    id: str
    prompt: str
    response: str
    paraphrase: str | None = None
    perturbed: tuple[str, ...] = ()
    paraphrased_prompt: str | None = None


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One tokenised record. Supervised are the ids from `num_prompt` on: the answer and the EOS behind it.

    `index` is the record's position in its split: the key of every random draw made for it. `reference_logp` is the answer's
    log-probability under the frozen target (nats, summed over its tokens), None where no term needs it.
    """

    index: int
    ids: Sequence[int]
    num_prompt: int
    reference_logp: float | None = None

    @property
    def num_supervised(self) -> int:
        return len(self.ids) - self.num_prompt
