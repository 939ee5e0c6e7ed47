"""Counters for Prometheus: routes, statuses, seconds, tokens and model ids; nothing of what was asked or answered."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from soul.serving.work import Usage

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Label values come from fixed lists (routes, statuses, models of the catalogue), so that nobody can add series by asking."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter("soul_requests", "Requests answered.", ["route", "status"], registry=self._registry)
        self._seconds = Histogram(
            "soul_request_seconds", "Time to the end of the answer.", ["route"], buckets=SECONDS, registry=self._registry
        )
        self._tokens = Counter("soul_tokens", "Tokens read and written.", ["model", "kind"], registry=self._registry)
        self._in_flight = Gauge("soul_in_flight", "Requests being answered.", registry=self._registry)
        self._models = Gauge("soul_models", "Models by what the gate says.", ["state"], registry=self._registry)

    def answered(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def used(self, model: str, usage: Usage) -> None:
        self._tokens.labels(model, "prompt").inc(usage.prompt_tokens)
        self._tokens.labels(model, "completion").inc(usage.completion_tokens)

    def text(self, *, in_flight: int, hosted: int, refused: int) -> bytes:
        self._in_flight.set(in_flight)
        self._models.labels("hosted").set(hosted)
        self._models.labels("refused").set(refused)
        return generate_latest(self._registry)
