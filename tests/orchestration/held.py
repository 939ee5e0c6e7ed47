"""Which stage of a run held how many of Ray's GPUs, watched from outside while it works."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import ray

from soul.orchestration import evaluate, pipeline

# Where a stage begins and ends: the name it has in the table, and the function that does it.
STAGES: Mapping[str, tuple[Any, str]] = {
    "tokenise": (pipeline, "tokenise"),
    "prepare": (pipeline, "prepared_model"),
    "unlearn": (pipeline, "unlearn"),
    "evaluate": (evaluate.Judge, "judge"),
}
PERIOD_S = 0.05


def held_by_resources() -> dict[str, float]:
    """GPUs in use in the whole cluster, from Ray's own accounts."""
    return {"cluster": ray.cluster_resources().get("GPU", 0.0) - ray.available_resources().get("GPU", 0.0)}


def held_by_nodes() -> dict[str, float]:
    """GPUs of groups and of actors outside of any, by node, from Ray's state API (which needs the dashboard, and RAY_ADDRESS)."""
    from ray.util.state import list_actors, list_placement_groups

    found: dict[str, float] = defaultdict(float)
    for actor in list_actors(filters=[("state", "!=", "DEAD")], detail=True, limit=1000):
        if actor.placement_group_id is None:  # a process that is starting has its GPU already, on a node that is not told yet
            found[actor.node_id or "starting"] += (actor.required_resources or {}).get("GPU", 0.0)
    for group in list_placement_groups(filters=[("state", "=", "CREATED")], detail=True, limit=1000):
        for bundle in group.bundles or ():
            found[bundle["node_id"]] += bundle["unit_resources"].get("GPU", 0.0)
    return dict(found)


class Held:
    """`most`: by stage, the largest number of GPUs in use at once while it was under way, in all and on the node with the most."""

    def __init__(self) -> None:
        self.most: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self.most_on_a_node: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self.samples: list[tuple[float, str, float]] = []
        self._under_way: dict[str, int] = defaultdict(int)
        self._lock = threading.Lock()

    def note(self, now: Mapping[str, float], at: float) -> None:
        with self._lock:
            stages = [name for name, count in self._under_way.items() if count]
        total, one = sum(now.values()), max(now.values(), default=0.0)
        for stage in stages:
            self.most[stage] = max(self.most[stage], total)
            self.most_on_a_node[stage] = max(self.most_on_a_node[stage], one)
        self.samples.append((at, "+".join(stages), total))

    def wrapped(self, stage: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            with self._lock:
                self._under_way[stage] += 1
            try:
                return work(*args, **options)
            finally:
                with self._lock:
                    self._under_way[stage] -= 1

        return counted

    def table(self) -> str:
        """Spans of time in which the same stages held the same number of GPUs."""
        lines = ["  from     to  GPUs  stage"]
        start = 0
        for i in range(1, len(self.samples) + 1):
            if i == len(self.samples) or self.samples[i][1:] != self.samples[start][1:]:
                at, stage, total = self.samples[start]
                end = self.samples[min(i, len(self.samples) - 1)][0]
                lines.append(f"{at:6.1f} {end:6.1f}  {total:4g}  {stage or '-'}")
                start = i
        return "\n".join(lines)


@contextmanager
def watched(sample: Callable[[], Mapping[str, float]] = held_by_resources, *, period_s: float = PERIOD_S) -> Iterator[Held]:
    """While open, stages are noted as they begin and end, and GPUs are counted."""
    held, done, started = Held(), threading.Event(), time.monotonic()

    def work() -> None:
        while not done.wait(period_s):
            if ray.is_initialized():
                held.note(sample(), time.monotonic() - started)

    with pytest.MonkeyPatch.context() as patch:
        for stage, (owner, name) in STAGES.items():
            patch.setattr(owner, name, held.wrapped(stage, getattr(owner, name)))
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield held
        finally:
            done.set()
            thread.join(timeout=30)
