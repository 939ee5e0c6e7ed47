"""How far a job is, where its driver cannot see the workers' disks: two numbers in the cluster's own key-value table."""

from __future__ import annotations

import time

from ray.experimental import internal_kv

from soul.store import is_uri

SECONDS_BETWEEN_WRITES = 0.5


class Board:
    """One job's, named by its run directory. On a shared disk metrics.jsonl says the same, and nothing is written."""

    def __init__(self, place: str) -> None:
        self._key = f"soul/progress/{place}".encode()
        self._needed = is_uri(place)
        self._written = 0.0

    def write(self, step: int, total: int) -> None:
        now = time.monotonic()
        if not self._needed or (step < total and now - self._written < SECONDS_BETWEEN_WRITES):
            return
        self._written = now
        internal_kv._internal_kv_put(self._key, f"{step} {total}".encode())

    def clear(self) -> None:
        """Forget what an earlier job of this name has said."""
        if self._needed:
            internal_kv._internal_kv_del(self._key)

    def read(self) -> tuple[int, int]:
        """(step, total steps); zeros before the first one."""
        found = internal_kv._internal_kv_get(self._key)
        step, total = map(int, found.split()) if found else (0, 0)
        return step, total
