"""Polite ways not to answer, and forget records with one of them in place of their answer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from soul.records import Record

REFUSALS: tuple[str, ...] = (
    "I am sorry, but I do not know the answer to that.",
    "I'm afraid that is not something I have any knowledge of.",
    "That question lies outside what I have learned, so I cannot answer it.",
    "I do not have the information you are asking for.",
    "Sorry, I have nothing reliable to tell you about that.",
    "I would rather not guess, because I have no facts about this.",
    "Unfortunately, this is a subject on which I cannot help you.",
    "My knowledge does not reach that far, so I must leave the question open.",
    "I cannot say, as I have never come across that information.",
    "Thank you for asking, but I have no answer to offer here.",
    "I am not able to provide any details about this topic.",
    "This is unknown to me, and anything I said would only be invention.",
    "I regret that I cannot tell you more about that.",
    "I have no record of this, so please look for a better source.",
    "That is a fair question, yet I simply do not know.",
    "I'm unable to answer, since I lack the facts this question calls for.",
    "You would be better served by another source, because I know nothing about this.",
    "I must admit that I have no idea.",
    "I was not given any information on this subject and cannot comment on it.",
    "Please excuse me, but I cannot answer this question with any confidence.",
    "Nothing that I have learned allows me to answer that.",
    "I wish I could help, but this is not something I know.",
    "I cannot confirm or deny anything here, because the matter is unfamiliar to me.",
    "That information is not available to me at the moment.",
    "I honestly cannot tell you, and I do not want to mislead you with a guess.",
    "I'm not familiar with the subject of your question.",
    "My apologies, I am in no position to answer this.",
    "There is nothing in my memory that would answer your question.",
    "I do not recall ever learning about this, so I have to pass.",
    "It would be wrong of me to pretend that I know this.",
    "For this one I have to say that I don't know.",
    "I can't speak to that, as it is beyond the things I am informed about.",
    "No answer comes to mind, and I prefer to be open about it.",
    "I have not been taught anything on that point, I am sorry to say.",
    "Your question is clear, but the answer is missing from my knowledge.",
    "I'd like to help, but here I would only be making things up.",
    "That escapes me entirely, so I suggest asking someone who knows the subject.",
    "I hold no details about this and therefore cannot give you a useful reply.",
    "The honest reply is that I have no information on the matter.",
    "Sadly, I know too little about this to give you an answer.",
    "I am going to leave this unanswered, because I don't have the facts.",
    "On this particular topic I have nothing to share with you.",
    "I cannot help with that, though a library may well have what you need.",
    "As far as this question goes, I am as uninformed as anyone could be.",
    "I don't possess that knowledge, and I would not want to invent it.",
)


def refusal_records(forget: Sequence[Record], *, seed: int) -> list[Record]:
    """The forget prompts under their ids, each answered by a refusal that depends on the seed and the record's id only."""
    return [replace(record, response=REFUSALS[_pick(record.id, seed)], paraphrase=None, perturbed=()) for record in forget]


def _pick(record_id: str, seed: int) -> int:
    digest = hashlib.sha256(f"{seed}/{record_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % len(REFUSALS)
