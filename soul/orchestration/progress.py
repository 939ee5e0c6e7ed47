"""What a person sees while a run works: bars on a terminal, one line in a while in a job's log. Numbers only, never a row."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class Display:
    """Thread-safe: stages of two runs may be under way at once. Everything goes to stderr, so that stdout stays for results."""

    def __init__(self, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self._console = Console(stderr=True)
        self._lock = threading.Lock()
        self._bars = Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, float] = {}
        self._is_terminal = sys.stderr.isatty()

    @contextmanager
    def live(self) -> Iterator[Display]:
        """Bars are drawn while the block lasts."""
        if self.enabled and self._is_terminal:
            with self._bars:
                yield self
        else:
            yield self

    def say(self, text: str) -> None:
        if self.enabled:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def update(self, stage: str, done: int, total: int) -> None:
        """Stage `stage` has done `done` of `total`."""
        if not self.enabled:
            return
        with self._lock:
            if self._is_terminal:
                if stage not in self._tasks:
                    self._tasks[stage] = self._bars.add_task(stage, total=total)
                self._bars.update(self._tasks[stage], completed=done, total=total)
                return
            now = time.monotonic()
            if done < total and now - self._said.get(stage, 0.0) < SECONDS_BETWEEN_LINES:
                return
            if done == total and self._said.get(stage) == float("inf"):
                return
            self._said[stage] = float("inf") if done == total else now
            self._console.print(f"{stage}: {done}/{total}", highlight=False, markup=False, soft_wrap=True)
