"""Refusals: every answer that is not a result, in the shape that OpenAI's clients expect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """`message` says what was expected, what was got and what to do, and never quotes a prompt. `retry_after_s` becomes a header."""

    status: int
    message: str
    code: str
    param: str | None = None
    retry_after_s: int | None = None

    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Refused(Exception):
    """Carries a refusal up to the route that answers with it."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.code)
        self.refusal = refusal


def refuse(status: int, message: str, code: str, *, param: str | None = None, retry_after_s: int | None = None) -> Refused:
    return Refused(Refusal(status, message, code, param, retry_after_s))
