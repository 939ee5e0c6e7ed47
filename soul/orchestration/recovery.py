"""What becomes of a training run whose workers fail: which losses are charged to its budget, and what a person is told in the end."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from ray.exceptions import RayActorError
from ray.train import FailureConfig, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.context import get_train_context

from soul.object_store import find
from soul.plan import REMEDIES
from soul.records import InputError
from soul.report.numbers import memory
from soul.store import is_uri, path_of
from soul.train.engine import Engine, EngineConfig, Need

POLL_VARIABLE = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
POLL_GIVEN = POLL_VARIABLE in os.environ
SMALL_GROUP, SMALL_GROUP_POLL_S = 8, "0.2"
GRACE_S = 60.0
QUIET_S = 120.0
STEP = re.compile(r"step_(\d+)")
LOST = (RayActorError, WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError)
Failures: Any = FailureConfig  # Ray chooses the V2 class at import; what type checkers see under this name is V1's


class TrainingStopped(ArithmeticError):
    """Training ended without a result, for a reason that trying again would not mend. The message is for the user."""


class TrainingBroken(TrainingStopped):
    """As above, for a reason that may be gone the next time or on other machines: a full disk or card, a network, a mount."""


class RankFailed(RuntimeError):
    """A rank's card or network failed; the message says which rank, on which machine, and what to do."""


def failure_config(engine: EngineConfig) -> Any:
    """Announced losses (a drained or reclaimed node) are free; the others count, until there has been progress (`renews`)."""
    return Failures(
        max_failures=engine.max_failures, max_preemption_failures=-1, relax_collectives_on_preemption=True, preemption_grace_s=GRACE_S
    )


def poll_workers(num_workers: int) -> None:
    """How often Ray Train asks its workers: a report waits for the next time, and many workers are not to be asked five times a second."""
    if POLL_GIVEN:
        return
    if num_workers <= SMALL_GROUP:
        os.environ[POLL_VARIABLE] = SMALL_GROUP_POLL_S
    else:
        os.environ.pop(POLL_VARIABLE, None)


class Notice:
    """Called by a rank in every step: whether Ray Train has told it that nodes are about to go, and no checkpoint has been saved since.

    Ranks hear of it one after the other; `answered` is called on all of them, so that one notice makes one checkpoint.
    """

    def __init__(self) -> None:
        self._quiet_until = 0.0

    def __call__(self) -> bool:
        return time.monotonic() >= self._quiet_until and _announced() is not None

    def answered(self) -> None:
        self._quiet_until = time.monotonic() + QUIET_S


def _announced() -> Any:
    """What the public `ray.train.get_preemption_info` returns, without its barrier: the ranks agree in a reduction of their own."""
    return get_train_context().preemption_context.preemption_info


def newest_step(run_dir: str, name: str) -> int:
    """The step of the newest checkpoint of a Ray Train run; 0 where there is none."""
    place = f"{run_dir}/checkpoints/{name}"
    if is_uri(place):
        names = [file.partition("/")[0] for file in find(place) or {}]
    else:
        folder = path_of(place)
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return max((int(found[1]) for name in names if (found := STEP.fullmatch(name))), default=0)


def renews(error: WorkerGroupError, before: int, now: int) -> bool:
    """Whether a run that has used up its budget begins a new one: a process or node was lost, and the run has come further since."""
    return now > before and any(isinstance(failure, (*LOST, PeerLost)) for failure in error.worker_failures.values())


class PeerLost(RankFailed):
    """A collective failed: another rank is gone, or cannot be reached. It is often heard of before the loss itself is."""


@contextmanager
def located(engine: Engine, needs: tuple[Need, ...]) -> Iterator[None]:
    """Let what a card or a network says name the rank and its machine.

    Raises:
        RankFailed: out of memory.
        PeerLost: a collective failed.
    """
    where = f"rank {engine.rank} on {socket.gethostname()}"
    try:
        yield
    except torch.OutOfMemoryError as error:
        planned = "; planned were " + needs_in_words(needs) if needs else ""
        raise RankFailed(f"{where} ran out of GPU memory ({_first_line(error)}){planned}. {REMEDIES}") from error
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):  # whose errors have no type of their own
            raise
        raise PeerLost(
            f"{where} lost the others ({type(error).__name__}: {_first_line(error)}). Look at that machine and its network first; "
            "NCCL_DEBUG=INFO says more."
        ) from error


class SmallCard(InputError):
    """A card cannot hold what a run is sure to need. Raised on every rank, before the model is loaded."""


def check_card(engine: Engine, needs: tuple[Need, ...]) -> None:
    """Compare the smallest card of all ranks with what is sure to be needed. Collective.

    Raises:
        SmallCard: on every rank.
    """
    if engine.device.type != "cuda":
        return
    properties = torch.cuda.get_device_properties(engine.device)
    mine = (int(properties.total_memory), properties.name, engine.rank, socket.gethostname())
    cards: list[Any] = [None] * engine.world
    if engine.world > 1:
        dist.all_gather_object(cards, mine)
    refuse_small(cards if engine.world > 1 else [mine], needs)


def refuse_small(cards: list[tuple[int, str, int, str]], needs: tuple[Need, ...]) -> None:
    """`cards`: bytes, name, rank and machine of each. What is an upper bound in the plan (activations, logits) refuses nobody.

    Raises:
        SmallCard: the smallest one cannot hold what every plan of this run has.
    """
    size, kind, rank, machine = min(cards)
    sure = sum(need.num_bytes for need in needs if need.is_sure)
    if sure > size:
        raise SmallCard(
            f"the {kind} of rank {rank} on {machine} has {memory(size)}, a worker needs at least {memory(sure)}: {needs_in_words(needs)}. "
            f"{REMEDIES}"
        )


def needs_in_words(needs: tuple[Need, ...]) -> str:
    return ", ".join(f"{need.name} {memory(need.num_bytes)}" for need in needs)


def explained(error: WorkerGroupError) -> InputError | TrainingStopped | None:
    """What a person can mend (bad input, a full disk or card, a lost mount) in one line; None for a defect, which keeps its traceback."""
    for failure in error.worker_failures.values():
        if isinstance(failure, InputError):
            return failure
        if isinstance(failure, OSError):
            return TrainingBroken(f"training stopped: {failure}. The last checkpoint is kept: mend this, then run the same again.")
    told = [str(failure) for failure in error.worker_failures.values() if isinstance(failure, RankFailed)]
    full = [line for line in told if "ran out of GPU memory" in line]  # the others only miss the one that did
    return TrainingBroken((full or told)[0]) if told else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
