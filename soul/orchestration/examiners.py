"""Processes that judge one model: each has it in memory and works through items of the plan; one that dies is replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError, WorkerCrashedError
from transformers import PreTrainedModel

from soul.config import Config, EvaluateConfig
from soul.device import Device, torch_device
from soul.evaluate.plan import ItemResult, WorkItem, cost, run_item
from soul.models.load import load_model
from soul.orchestration.dealing import LOSSES, Answer, GivenUp, Lost, Ready, deal
from soul.records import InputError
from soul.store import local

# The examiner or its answer is gone: a killed process, a machine that went away or had no memory left. No error of the code is among these.
LOST = (RayActorError, NodeDiedError, WorkerCrashedError, OutOfMemoryError, ObjectLostError)
PATIENCE_S = 30.0


class EvaluationStopped(ChildProcessError):
    """An evaluation ended without a result because its processes kept dying. The message is for the user."""


@dataclass(frozen=True)
class Exam:
    """The model that is judged, and how it computes; all that an examiner is told."""

    model: str
    revision: str | None
    trust_remote_code: bool
    precision: str
    device: Device

    @classmethod
    def of(cls, config: Config | EvaluateConfig, model: str, revision: str | None) -> Exam:
        """`config` is decided."""
        decided = config if isinstance(config, EvaluateConfig) else config.engine
        assert decided.device != "auto" and decided.precision != "auto", "the driver decides device and precision before it judges"
        return cls(model, revision, config.model.trust_remote_code, decided.precision, decided.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and arithmetic. A CPU computes in fp32 whatever a GPU would."""
        return torch.float32 if self.precision == "fp32" or self.device == "cpu" else torch.bfloat16

    def load(self) -> tuple[PreTrainedModel, torch.device]:
        """The model on this process's device.

        Raises:
            InputError: there is no such model or device, or the one does not fit into the other.
        """
        device = torch_device(self.device)
        model = load_model(local(self.model), dtype=self.dtype, revision=self.revision, trust_remote_code=self.trust_remote_code)
        try:
            return model.eval().to(device), device
        except torch.OutOfMemoryError as error:
            advice = "--precision bf16 halves what it takes; else use" if self.dtype == torch.float32 else "Use"
            raise InputError(f"{self.model} does not fit into the memory of one GPU. {advice} GPUs with more memory.") from error


def shares(num_models: int, *, wanted: int, room: int) -> list[int]:
    """How many examiners each of the models judged together gets: as many as `wanted`, and together no more than there is room for.

    Models for which there is no room at the same time get one each, when it is their turn.
    """
    return [max(1, min(wanted, room // num_models + (place < room % num_models))) for place in range(num_models)]


@ray.remote
class Examiner:
    """A process with one loaded model, which works through items of an evaluation plan."""

    def __init__(self, exam: Exam) -> None:
        self.exam = exam

    def load(self) -> None:
        """Apart from the constructor: what this raises is told as what it is, not as a dead process."""
        torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
        self.model, self.device = self.exam.load()

    def run(self, item: WorkItem) -> ItemResult:
        return run_item(self.model, item, device=self.device)


class Examiners:
    """A `Pool` of examiners on the connected cluster. `say` hears what a person should know."""

    def __init__(self, exam: Exam, items: Sequence[WorkItem], say: Callable[[str], None]) -> None:
        # from inside a trial of a grid, too, it finds its place on the cluster: the trial's own group holds none for it
        options = {"num_cpus": 1, "num_gpus": 1 if exam.device == "gpu" else 0, "scheduling_strategy": "DEFAULT"}
        self.examiner: Any = Examiner.options(**options)  # type: ignore[attr-defined]
        self.exam, self.items, self.say = exam, items, say
        self.on_seat: dict[int, Any] = {}
        self.under_way: dict[Any, tuple[int, bool]] = {}  # seat, and whether it is an item
        self.ready: set[int] = set()

    def start(self, seat: int) -> None:
        self.on_seat[seat] = self.examiner.remote(self.exam)
        self.under_way[self.on_seat[seat].load.remote()] = (seat, False)

    def ask(self, seat: int, item: int) -> None:
        self.under_way[self.on_seat[seat].run.remote(self.items[item])] = (seat, True)

    def wait(self) -> Ready | Answer[ItemResult] | Lost:
        patience = None if self.ready else PATIENCE_S
        done: list[Any] = []
        while not done:
            done, _ = ray.wait(list(self.under_way), num_returns=1, timeout=patience)
            if not done:
                self.say(f"no process has its {self.exam.device.upper()} and its model yet; waiting")
                patience = None
        seat, is_item = self.under_way.pop(done[0])
        try:
            result: ItemResult = ray.get(done[0])
        except LOST as error:
            self.stop(seat)
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            self.say(f"an examiner was lost ({reason}); another one takes its place")
            return Lost(seat, reason)
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, InputError) else error from None
        self.ready.add(seat)
        return Answer(seat, result) if is_item else Ready(seat)

    def stop(self, seat: int) -> None:
        self.ready.discard(seat)
        ray.kill(self.on_seat.pop(seat))

    def close(self) -> None:
        """End those that are there, and those that never came."""
        for seat in list(self.on_seat):
            self.stop(seat)


def examine(
    exam: Exam, items: Sequence[WorkItem], *, stage: str, num_examiners: int, update: Callable[[int], None], say: Callable[[str], None]
) -> list[ItemResult]:
    """The results of all items, in their order: the same for any number of examiners, whoever of them dies on the way.

    Raises:
        EvaluationStopped: they die at the same item again and again.
    """
    pool = Examiners(exam, items, lambda text: say(f"{stage}: {text}"))
    try:
        return deal([cost(item) for item in items], pool, num_seats=num_examiners, done=update)
    except GivenUp as given_up:
        raise EvaluationStopped(f"{stage}: {_told(given_up, items)}") from None
    finally:
        pool.close()


def _told(given_up: GivenUp, items: Sequence[WorkItem]) -> str:
    if given_up.item is None:
        return (
            f"{LOSSES} processes in a row died before they had loaded the model ({given_up.reason}). If their machines ran out of memory, "
            "use larger ones; else look into Ray's logs."
        )
    item = items[given_up.item]
    return (
        f"{LOSSES} processes in a row died at the same {item.words} ({given_up.reason}). If their machines ran out of memory, lower "
        f"{item.setting}; else look into Ray's logs."
    )
