"""How often a trial of a grid is begun again: as often as it got further, and twice where it did not.

Tune counts failures without asking why. A machine that is reclaimed is no fault of a trial, so Tune is told to go on, and each attempt
looks by itself what the ones before it have reached. The count is kept in the run directory: the next attempt may be on another node.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from soul.benchmarks.outcomes import CRASHED, FAILED
from soul.object_store import find
from soul.rundir import RunDir
from soul.store import is_uri, place_of

STAGE = "attempts"
REPEATS = 2
BACKSTOP = 64  # of Tune's own: for a trial whose process cannot even start, and so cannot count
_NO_PROGRESS = (STAGE, CRASHED, FAILED, "precision")
_STEP = re.compile(r"\bstep_(\d+)")


@dataclass(frozen=True)
class Attempt:
    """`starts`: how often the trial was begun at what it had `reached`, this time counted. `cause`: what ended the attempt before."""

    run: RunDir
    session: str
    reached: tuple[int, int]
    starts: int
    cause: str | None

    @classmethod
    def begin(cls, run: RunDir, session: str) -> Self:
        """`session` names the grid's driver: what an earlier one counted is forgotten."""
        reached = reached_by(run)
        before = run.finished(STAGE, session) or {"reached": (-1, -1), "starts": 0, "cause": None}
        starts = before["starts"] + 1 if tuple(before["reached"]) >= reached else 1
        attempt = cls(run, session, reached, starts, before["cause"])
        attempt._write(None)
        return attempt

    @property
    def is_one_too_many(self) -> bool:
        return self.starts > REPEATS + 1

    @property
    def reason(self) -> str:
        last = f"{self.cause}; see error.txt in tune/" if self.cause else "its process or its node was lost"
        return f"it broke off {self.starts - 1} times without getting any further ({last}); run again"

    def _write(self, cause: str | None) -> None:
        self.run.finish(STAGE, self.session, {"reached": self.reached, "starts": self.starts, "cause": cause})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None and issubclass(kind, Exception):
            self._write(kind.__name__)


def reached_by(run: RunDir) -> tuple[int, int]:
    """(stages that are finished, step of the last checkpoint): what only grows while a trial gets on."""
    stages = [marker for marker in (run.path / ".stages").glob("*.json") if marker.stem not in _NO_PROGRESS]
    place = place_of(run.checkpoints)
    names = list(find(place) or ()) if is_uri(place) else [path.name for path in run.checkpoints.glob("*/step_*")]
    return len(stages), max((int(step) for name in names for step in _STEP.findall(name)), default=0)
